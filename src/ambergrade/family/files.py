"""Safetensors files: read strictly, written canonically, so that equal weights are equal bytes.

A checkpoint is a single file or a diffusers folder. In a folder the keys of a component's files begin with its name and
a slash (`unet/conv_in.weight`); what no network holds lies in a file of our own beside the components.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open

from ambergrade.errors import BadInput, MissingObject
from ambergrade.store import written_aside

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    DTYPES: dict[torch.dtype, str]
    TORCH: dict[str, torch.dtype]

NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
"""safetensors' words for dtypes, to torch's names."""
PICKLES = {".ckpt", ".pt", ".pth", ".bin"}
PASSIVE_FILE = "passive.safetensors"
"""In a folder: the tensors that no network holds, under their single-file names. diffusers does not look at it."""


@functools.cache
def torch_dtypes() -> dict[str, torch.dtype]:
    """safetensors' words to torch's dtypes."""
    import torch

    return {word: getattr(torch, name) for word, name in NAMES.items()}


def __getattr__(name: str) -> object:
    """`TORCH`, the dtypes of safetensors' words, and `DTYPES`, the words of dtypes: made when first asked for, since
    headers are read without torch, which takes seconds and hundreds of MB to import."""
    if name == "TORCH":
        return torch_dtypes()
    if name == "DTYPES":
        return {dtype: word for word, dtype in torch_dtypes().items()}
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _word(tensor: Tensor) -> str:
    return next(word for word, dtype in torch_dtypes().items() if dtype == tensor.dtype)


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


def weight_files(path: Path) -> list[Path]:
    """The file itself or, of one component's folder, its one plain file or the shards that its index names.

    Variants such as `.fp16` are taken where there is nothing plainer. Raises MissingObject where there is none or a
    shard is missing, BadInput where several files hold the component and no index says which count.
    """
    if path.is_file():
        return [path]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise MissingObject(f"{path} holds no .safetensors file. A diffusers folder needs one in each component.")
    indexes = sorted(path.glob("*.safetensors.index*.json"), key=lambda index: (index.name.count("."), index.name))
    plainest = [file for file in files if file.name.count(".") == min(each.name.count(".") for each in files)]
    if indexes and (len(plainest) > 1 or _SHARD.search(plainest[0].name)):
        return _shards(indexes[0])
    shards = [_SHARD.search(file.name) for file in plainest]
    stems = {_SHARD.sub("", file.name) for file in plainest}
    whole = len(stems) == 1 and {int(shard[2]) if shard else 1 for shard in shards} == {len(plainest)}
    if whole:
        return plainest
    names = ", ".join(file.name for file in plainest)
    raise BadInput(
        f"{path} holds several files of one network, and no index says which count: {names}.\n"
        "Keep one of them, or all shards with their .safetensors.index.json, and move the others away."
    )


_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?=\.)")


def _shards(index: Path) -> list[Path]:
    """The files that an index names, all beside it."""
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        plain = all(name == Path(name).name and name.endswith(".safetensors") for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        names, plain = [], False
    if not (names and plain):
        raise BadInput(f"{index} is no index of shards: its weight_map must map tensors to files beside it.")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise MissingObject(f"{index} names {', '.join(missing)}, which {index.parent} does not hold. Fetch it again.")
    return [index.parent / name for name in names]


def entries(path: Path, components: Iterable[str] = ()) -> dict[str, Entry]:
    """Every tensor of a single file or, of a folder, of the `components` that it has, from the headers alone."""
    if not path.is_dir():
        return _header(path)
    found: dict[str, Entry] = {}
    for name in sorted(set(components)):
        for file in weight_files(path / name) if (path / name).is_dir() else []:
            found |= {f"{name}/{key}": entry for key, entry in _header(file).items()}
    if not found:
        raise MissingObject(no_checkpoint(path, components))
    return found | (_header(path / PASSIVE_FILE) if (path / PASSIVE_FILE).is_file() else {})


def no_checkpoint(folder: Path, components: Iterable[str]) -> str:
    """What to say of a folder that is no checkpoint: most often the checkpoints lie in it."""
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    holds = (
        f"it holds {len(files)} checkpoints: name one, such as {folder / files[0]}" if files else "it holds no model"
    )
    known = ", ".join(sorted(set(components)))
    return f"{folder} is no diffusers folder, which has some of the folders {known}; {holds}."


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file's header holds beside its tensors."""
    _refuse(path)
    try:
        with safe_open(path, "np") as file:
            return dict(file.metadata() or {})
    except SafetensorError as error:
        raise BadInput(f"{path} is not a whole safetensors file: {error}.\nFetch or write it again.") from error


def _header(path: Path) -> dict[str, Entry]:
    _refuse(path)
    try:
        with safe_open(path, "np"):  # the library checks the header against the file
            pass
    except SafetensorError as error:
        raise BadInput(f"{path} is not a whole safetensors file: {error}.\nFetch or write it again.") from error
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = {}
    for key, value in header.items():
        if value["dtype"] not in NAMES:
            raise BadInput(f"'{key}' in {path.name} is of dtype {value['dtype']}; known: {', '.join(NAMES)}.")
        start, end = value["data_offsets"]
        found[key] = Entry(path, key, value["dtype"], tuple(value["shape"]), 8 + length + start, end - start)
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. Raises BadInput for a pickle or a damaged file."""
    from safetensors.torch import load_file

    _refuse(path)
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except SafetensorError as error:
        raise BadInput(f"{path} is not a whole safetensors file: {error}.\nFetch or write it again.") from error
    return tensors


def _refuse(path: Path) -> None:
    """Refuse a path that is not there and a pickle."""
    if not path.is_file():
        raise MissingObject(f"No file at {path}.")
    if path.suffix in PICKLES:
        raise BadInput(
            f"{path.name} is a pickle, which can run code when it is read; only safetensors are read.\n"
            'Convert it: python -c "import torch, safetensors.torch as s, sys; w = torch.load(sys.argv[1], '
            "weights_only=True); s.save_file(w.get('state_dict', w), sys.argv[2])\" "
            f"{path} {path.with_suffix('.safetensors')}"
        )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write safetensors whose bytes depend on the arguments alone; returns the `weights_digest`.

    The header is sorted and padded to 8 bytes. The data lie by item size (largest first, so that every
    tensor is aligned), then by name. The library's own writer orders metadata at random.
    """
    layout = {name: (_word(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_streamed(path, layout, tensors.__getitem__, metadata)
    return weights_digest(tensors)


def write_streamed(
    path: Path,
    layout: Mapping[str, tuple[str, tuple[int, ...]]],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> None:
    """The file that `write_tensors` writes, with one tensor in memory at a time.

    `layout` maps names to dtype (as safetensors spells it) and shape; `read(name)` gives the tensor.
    """
    item = {name: torch_dtypes()[dtype].itemsize for name, (dtype, _) in layout.items()}
    order = sorted(layout, key=lambda name: (-item[name], name))
    header: dict[str, object] = {}
    offset = 0
    for name in order:
        dtype, shape = layout[name]
        end = offset + math.prod(shape) * item[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = {"__metadata__": dict(sorted(metadata.items())), **dict(sorted(header.items()))}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with written_aside(path) as aside, aside.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for name in order:
            tensor = read(name)
            assert (_word(tensor), tuple(tensor.shape)) == layout[name], name
            file.write(tensor_bytes(tensor))


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (64 hex digits) over names, dtypes, shapes and bytes in name order."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(f"{name}\0{_word(tensor)}\0{list(tensor.shape)}\0".encode())
        hasher.update(tensor_bytes(tensor))
    return hasher.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values, row by row, as the machine's (little-endian) bytes."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
