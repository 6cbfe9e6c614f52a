"""Reads safetensors headers with suspicion: what a header says must be so, or the file is refused by name.

A damaged or hostile file costs at most MOST_HEADER bytes and is never believed about sizes.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ambergrade.errors import BadInput, MissingObject

ITEM = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
"""Bytes of one element."""
FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
MOST_HEADER = 8 << 20
"""Bytes; SDXL's header has 0.35 MB."""
_PICKLES = (b"PK\x03\x04", b"\x80")


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class Header:
    entries: Mapping[str, Entry]
    """In the order of the bytes."""
    metadata: Mapping[str, str]
    size: int
    """Bytes of the whole file."""


def read_header(path: Path) -> Header:
    """Read one file's header. Raises MissingObject for no file, BadInput for anything but a whole safetensors file."""
    if not path.is_file():
        raise MissingObject(f"No file at {path}.")
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        text = file.read(length) if 2 <= length <= min(MOST_HEADER, size - 8) else b""
    if head.startswith(_PICKLES[0]) or (head.startswith(_PICKLES[1]) and not text.startswith(b"{")):
        raise BadInput(
            f"{path.name} is a pickle, which can run code when it is read; only safetensors are read.\n"
            'Convert it: python -c "import torch, safetensors.torch as s, sys; w = torch.load(sys.argv[1], '
            "weights_only=True); s.save_file(w.get('state_dict', w), sys.argv[2])\" "
            f"{path.name} {path.with_suffix('').name}-converted.safetensors"
        )
    try:
        if len(head) < 8:
            raise _Wrong(f"it has only {size} bytes")
        if length > size - 8:
            raise _Wrong(f"the header should have {length:,} bytes, the file has {size:,}")
        if length > MOST_HEADER:
            raise _Wrong(f"the header has {length:,} bytes; more than {MOST_HEADER:,} are not read")
        return _checked(_parsed(text), 8 + length, size)
    except _Wrong as error:
        raise BadInput(f"{path.name} is not a whole safetensors file: {error}.\nFetch or write it again.") from None


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


def _checked(header: dict[str, Any], data: int, size: int) -> Header:
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
        entries[name] = Entry(dtype, tuple(shape), data + start, end - start)
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


def header_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Make the canonical header of a file to be written, and each tensor's offset in the file.

    Tensors lie by item size (largest first, so that each is aligned), then by name: as `family.files` writes them.
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


def read_exactly(descriptor: int, buffers: list[memoryview], offset: int) -> None:
    """Fill the buffers, one after the other, from one place of a file. Raises BadInput if it became shorter."""
    buffers = [buffer for buffer in buffers if len(buffer)]
    while buffers:
        got = os.preadv(descriptor, buffers[:512], offset)
        if got == 0:
            raise BadInput("An input became shorter while it was read. Fetch or write it again.")
        offset += got
        while buffers and got >= len(buffers[0]):
            got -= len(buffers.pop(0))
        if got:
            buffers[0] = buffers[0][got:]
