"""Safetensors files: read strictly, written canonically, so that equal weights are equal bytes."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ambergrade.errors import BadInput, MissingObject
from ambergrade.store import written_aside

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
PICKLES = {".ckpt", ".pt", ".pth", ".bin"}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. Raises BadInput for a pickle or a damaged file."""
    if not path.is_file():
        raise MissingObject(f"No file at {path}.")
    if path.suffix in PICKLES:
        raise BadInput(
            f"{path.name} is a pickle, which can run code when it is read; only safetensors are read.\n"
            'Convert it: python -c "import torch, safetensors.torch as s, sys; w = torch.load(sys.argv[1], '
            "weights_only=True); s.save_file(w.get('state_dict', w), sys.argv[2])\" "
            f"{path} {path.with_suffix('.safetensors')}"
        )
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise BadInput(f"{path} is not a whole safetensors file: {error}.\nFetch or write it again.") from error
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write safetensors whose bytes depend on the arguments alone; returns the `weights_digest`.

    The header is sorted and padded to 8 bytes. The data lie by item size (largest first, so that every
    tensor is aligned), then by name. The library's own writer orders metadata at random.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    entries: dict[str, object] = {}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    header = {"__metadata__": dict(sorted(metadata.items())), **dict(sorted(entries.items()))}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with written_aside(path) as aside, aside.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in order:
            file.write(tensor_bytes(tensors[name]))
    return weights_digest(tensors)


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (64 hex digits) over names, dtypes, shapes and bytes in name order."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(f"{name}\0{DTYPES[tensor.dtype]}\0{list(tensor.shape)}\0".encode())
        hasher.update(tensor_bytes(tensor))
    return hasher.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values, row by row, as the machine's (little-endian) bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
