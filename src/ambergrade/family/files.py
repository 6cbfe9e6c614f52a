"""Safetensors files: read strictly, written canonically, so that equal weights are equal bytes.

A checkpoint is a single file or a diffusers folder. In a folder the keys of a component's files begin with its name and
a slash (`unet/conv_in.weight`); what no network holds lies in a file of our own beside the components.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ambergrade.errors import BadInput, MissingObject
from ambergrade.family.dtypes import words
from ambergrade.family.header import Entry, header_bytes, read_header
from ambergrade.store import written_aside

if TYPE_CHECKING:
    from torch import Tensor

PASSIVE_FILE = "passive.safetensors"
"""In a folder: the tensors that no network holds, under their single-file names. diffusers does not look at it."""


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
        return dict(read_header(path).entries)
    found: dict[str, Entry] = {}
    for name in sorted(set(components)):
        for file in weight_files(path / name) if (path / name).is_dir() else []:
            found |= {f"{name}/{key}": entry for key, entry in read_header(file).entries.items()}
    if not found:
        raise MissingObject(no_checkpoint(path, components))
    return found | (dict(read_header(path / PASSIVE_FILE).entries) if (path / PASSIVE_FILE).is_file() else {})


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
    return dict(read_header(path).metadata)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. Raises BadInput for anything else, such as a pickle or a damaged file."""
    from safetensors.torch import load_file

    read_header(path)  # refuses by name what the library would tell in its own words
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write safetensors whose bytes depend on the arguments alone; returns the `weights_digest`.

    The header is sorted and padded to 8 bytes. The data lie by item size (largest first, so that every
    tensor is aligned), then by name. The library's own writer orders metadata at random.
    """
    layout = {name: (words()[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
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
    text, offsets = header_bytes(layout, metadata)
    with written_aside(path) as aside, aside.open("wb") as file:
        file.write(text)
        for name in offsets:  # in the order of the bytes
            tensor = read(name)
            assert (words()[tensor.dtype], tuple(tensor.shape)) == layout[name], name
            file.write(tensor_bytes(tensor))


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 (64 hex digits) over names, dtypes, shapes and bytes in name order."""
    hasher = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        hasher.update(f"{name}\0{words()[tensor.dtype]}\0{list(tensor.shape)}\0".encode())
        hasher.update(tensor_bytes(tensor))
    return hasher.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values, row by row, as the machine's (little-endian) bytes."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
