"""Safetensors headers, read with suspicion: what a header says must be so, or the file is refused by name.

A damaged or hostile file costs at most MOST_HEADER bytes and is never believed about sizes.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambergrade.errors import BadInput, MissingObject
from ambergrade.family.dtypes import ITEM, torch_dtypes

if TYPE_CHECKING:
    from torch import Tensor

MOST_HEADER = 8 << 20
"""Bytes; SDXL's header has 0.35 MB."""
CONVERT = (
    'python -c "import sys, torch, safetensors.torch as s; '
    "w = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "w = next((w[k] for k in ('state_dict', 'params_ema', 'params') if k in w), w); "  # the last two: R-ESRGAN
    's.save_file({k: v.contiguous().clone() for k, v in w.items() if torch.is_tensor(v)}, sys.argv[2])"'  # tied ones
)
"""A pickle's tensors as safetensors, without running what else is in it; two file names follow."""


@dataclass(frozen=True)
class Entry:
    """One tensor as a header describes it."""

    file: Path
    key: str
    """In that file."""
    dtype: str
    """As safetensors spells it; `torch_dtypes` has torch's."""
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    size: int
    """Bytes."""

    def read(self) -> Tensor:
        """The values, in memory of their own."""
        import numpy as np
        import torch

        dtype = torch_dtypes()[self.dtype]
        if not self.size:  # a marker such as v_pred
            return torch.empty(self.shape, dtype=dtype)
        with self.file.open("rb") as file:
            file.seek(self.start)
            data = np.fromfile(file, np.uint8, self.size)
        if len(data) != self.size:
            raise BadInput(f"{self.file} became shorter while it was read. Fetch or write it again.")
        return torch.from_numpy(data).view(dtype).reshape(self.shape)


@dataclass(frozen=True)
class Header:
    entries: Mapping[str, Entry]
    """In the order of the bytes."""
    metadata: Mapping[str, str]
    size: int
    """Bytes of the whole file."""


def read_header(path: Path) -> Header:
    """The header of one file. Raises MissingObject for no file, BadInput for anything but a whole safetensors file."""
    if not path.is_file():
        raise MissingObject(f"No file at {path}.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(256)
        head = start[:8]
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        file.seek(8)
        text = file.read(length) if 2 <= length <= min(MOST_HEADER, size - 8) else b""
    if not text.startswith(b"{"):
        _refuse_others(path, start)
    try:
        if len(head) < 8:
            raise _Wrong(f"it has only {size} bytes")
        if length > size - 8:
            raise _Wrong(f"the header should have {length:,} bytes, the file has {size:,}")
        if length > MOST_HEADER:
            raise _Wrong(f"the header has {length:,} bytes; more than {MOST_HEADER:,} are not read")
        return _checked(path, _parsed(text), 8 + length, size)
    except _Wrong as error:
        raise BadInput(f"{path.name} is not a whole safetensors file: {error}.\nFetch or write it again.") from None


def header_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Return the canonical header of a file to be written, and each tensor's offset in the file.

    The header is sorted and padded to 8 bytes; `tensors` maps names to dtype (safetensors' word) and shape. Tensors lie
    by item size (largest first, so that each is aligned), then by name.
    """
    order = sorted(tensors, key=lambda name: (-ITEM[tensors[name][0]], name))
    described: dict[str, object] = {}
    offsets: dict[str, int] = {}
    place = 0
    for name in order:
        dtype, shape = tensors[name]
        offsets[name] = place
        place += math.prod(shape) * ITEM[dtype]
        described[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offsets[name], place]}
    whole = {"__metadata__": dict(sorted(metadata.items())), **dict(sorted(described.items()))}
    text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, {name: 8 + len(text) + offset for name, offset in offsets.items()}


def _refuse_others(path: Path, start: bytes) -> None:
    """Call what is often saved under this name by what it is."""
    shown = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"PK\x03\x04", b"\x80")):
        raise BadInput(
            f"{path.name} is a pickle, which can run code when it is read; only safetensors are read.\n"
            f"Convert it: {CONVERT} {path.name} {path.with_suffix('').name}-converted.safetensors"
        )
    if shown.startswith(b"version https://git-lfs"):
        raise BadInput(
            f"{path.name} is a Git-LFS pointer of {path.stat().st_size} bytes, which stands for the file.\n"
            f"Fetch the file itself: git lfs pull --include {path.name}"
        )
    if shown.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise BadInput(
            f"{path.name} is a web page saved under that name, such as a login or an error.\n"
            "Fetch the file itself; where the site asks for it, with an access token."
        )
    if shown.startswith((b'{"', b"gguf")):
        kind = "a GGUF file" if shown.startswith(b"gguf") else "JSON, perhaps a site's answer saved under that name"
        raise BadInput(f"{path.name} is {kind}; only safetensors are read.\nFetch the safetensors file.")


class _Wrong(Exception):
    """What a header says is not so."""


def _parsed(text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise _Wrong(f"its header names '{twice[:80]}' twice")
        return found

    if not text.startswith(b"{"):
        raise _Wrong("its header does not begin with a brace")
    try:
        value = json.loads(text.decode(), object_pairs_hook=unique, parse_float=_refuse, parse_constant=_refuse)
        if rb"\ud" in text.lower():  # an escape may be half of a character, which no file can hold again
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"its header is no JSON ({str(error)[:80]})") from None
    if not isinstance(value, dict):
        raise _Wrong("its header is no JSON object")
    return value


def _refuse(text: str) -> None:
    raise _Wrong(f"its header holds the number {text[:40]}")


def _checked(path: Path, header: dict[str, Any], data: int, size: int) -> Header:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _Wrong("its metadata are not texts")
    entries = {}
    for name, value in header.items():
        shown = f"'{name[:80]}'"
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise _Wrong(f"{shown} is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in ITEM:
            raise _Wrong(f"{shown} has the unknown dtype {str(dtype)[:20]}")
        if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2 and len(shape) <= 16):
            raise _Wrong(f"{shown} has a shape or offsets that are no whole numbers")
        start, end = offsets
        if end > size - data or start > end:
            raise _Wrong(f"{shown} ends at byte {data + end:,} of {size:,}")
        if math.prod(shape) * ITEM[dtype] != end - start:
            raise _Wrong(f"{shown} of shape {shape} and dtype {dtype} has {end - start:,} bytes")
        entries[name] = Entry(path, name, dtype, tuple(shape), data + start, end - start)
    order = sorted(entries, key=lambda name: (entries[name].start, entries[name].size, name))
    place = data
    for name in order:
        entry = entries[name]
        if entry.start != place:
            fault = "overlaps the tensor before it" if entry.start < place else "leaves a hole before it"
            raise _Wrong(f"'{name[:80]}' {fault}")
        place += entry.size
    if place != size:
        raise _Wrong(f"{size - place:,} bytes after the last tensor belong to none")
    return Header({name: entries[name] for name in order}, metadata, size)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 for value in values
    )
