"""Opens a merge's inputs by their headers: a single file, a diffusers folder, or tensors in memory.

Every tensor is known by its single-file name; where it lies in files is a list of byte ranges.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ambergrade.errors import BadInput
from ambergrade.family.detect import Layout, detect
from ambergrade.family.digests import folder_files
from ambergrade.family.layouts import Source
from ambergrade.family.load import Family
from ambergrade.family.prediction import lacking_marks, prediction_type, read_scheduler
from ambergrade.identity import canonical_json
from ambergrade.merge.header import Entry, Header, read_header
from ambergrade.merge.lora import lora_file
from ambergrade.store import Digests

__all__ = ["Digests", "Input", "Range", "Stored", "default_cache", "open_input", "parent_recipe"]

Shape = tuple[int, ...]
MOST_NESTED = 1 << 18
"""Characters of an input's own recipe, or of its ancestors', that are written again."""


@dataclass(frozen=True)
class Range:
    """Names some bytes of one of an input's files."""

    file: int
    start: int
    size: int


@dataclass(frozen=True)
class Stored:
    """Describes one tensor of an input, under its single-file name."""

    dtype: str
    """As safetensors spells it."""
    shape: Shape
    """In the single-file layout."""
    ranges: tuple[Range, ...]
    """One after the other they are the values, but for a transposed one."""
    transposed: bool = False

    @property
    def size(self) -> int:
        return sum(part.size for part in self.ranges)

    def slice(self, start: int, size: int) -> list[Range]:
        """Return the ranges of some of its bytes."""
        found = []
        for part in self.ranges:
            first, last = max(start, 0), min(start + size, part.size)
            if first < last:
                found.append(Range(part.file, part.start + first, last - first))
            start -= part.size
        return found


@dataclass(frozen=True)
class Input:
    """Describes one model, or LoRA, of a merge."""

    alias: str
    path: Path
    files: tuple[Path, ...]
    sizes: tuple[int, ...]
    """Bytes of the files."""
    tensors: Mapping[str, Stored]
    """By single-file name, in file order. A LoRA's keep their own names."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    layout: Layout | None = None
    """None for a family that is not known, and for a LoRA."""
    prediction: str | None = None
    """What its weights predict, as its files say: see `family.prediction`."""

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: stored.shape for name, stored in self.tensors.items()}


def open_input(alias: str, path: Path, *, plain: bool = False, like: Family | None = None) -> Input:
    """Read the headers of a single file or a diffusers folder; `plain` keeps the names of the file, which is a LoRA.

    `like` is the family of the model beside it: a VAE file alone may be of several. A mark of the prediction type that
    a single file would have, and this one says in another place, is among the tensors.

    Raises MissingObject for what is not there, BadInput for what is damaged.
    """
    path = lora_file(path) if plain else path
    found = {path.name: (path, "")} if not path.is_dir() else folder_files(path)
    headers = {name: read_header(file) for name, (file, _) in found.items()}
    keys: dict[str, tuple[int, Entry]] = {}
    for number, (name, (_, prefix)) in enumerate(found.items()):
        mine = {prefix + key: (number, entry) for key, entry in headers[name].entries.items()}
        if twice := sorted(keys.keys() & mine.keys()):
            raise BadInput(f"{path} holds '{twice[0]}' in {found[name][0].name} and in another file. Keep one of them.")
        keys |= mine
    layout = None
    if not plain:
        try:
            layout = detect({key: entry.shape for key, (_, entry) in keys.items()}, like)
        except BadInput:
            if path.is_dir():
                raise
    sources = dict(layout.sources) if layout else {key: Source((key,)) for key in keys}
    if layout:  # moving averages and leftovers of training keep their own names
        used = {key for source in sources.values() for key in source.keys}
        sources |= {key: Source((key,)) for key in keys if key not in used and not path.is_dir()}
    tensors = {name: _stored(name, source, keys, alias) for name, source in sources.items()}
    metadata, scheduler = _metadata(headers), read_scheduler(path) if path.is_dir() else {}
    for mark in () if plain else lacking_marks(tensors, metadata, scheduler):
        tensors[mark] = Stored("F32", (0,), (Range(0, 8, 0),))
    order = sorted(tensors, key=lambda name: (tensors[name].ranges[0].file, tensors[name].ranges[0].start, name))
    files = tuple(file for file, _ in found.values())
    return Input(
        alias,
        path,
        files,
        tuple(header.size for header in headers.values()),
        {name: tensors[name] for name in order},
        metadata,
        layout,
        None if plain else prediction_type(tensors, metadata, scheduler),
    )


def _metadata(headers: Mapping[str, Header]) -> Mapping[str, str]:
    return next(iter(headers.values())).metadata if len(headers) == 1 else {}


def _stored(name: str, source: Source, keys: Mapping[str, tuple[int, Entry]], alias: str) -> Stored:
    parts = [keys[key] for key in source.keys]
    dtypes = {entry.dtype for _, entry in parts}
    if len(dtypes) > 1:
        raise BadInput(f"{', '.join(source.keys)} of {alias} are one tensor of several dtypes: {sorted(dtypes)}.")
    shape = source.shape({key: keys[key][1].shape for key in source.keys})
    ranges = tuple(Range(number, entry.start, entry.size) for number, entry in parts)
    return Stored(parts[0][1].dtype, shape, ranges, source.form == "transposed")


def default_cache() -> Path:
    """Return the file in the user's cache folder that remembers digests between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "ambergrade" / "sha256.json"


def parent_recipe(metadata: Mapping[str, str]) -> tuple[Any, dict[str, Any]]:
    """Return `sd_merge_recipe` and `sd_merge_models` of an input that is itself a merge, as A1111 nests them.

    What is no JSON that a header could hold again, or larger than MOST_NESTED, counts as nothing.
    """
    recipe, models = (_nested(metadata.get(key, "null")) for key in ("sd_merge_recipe", "sd_merge_models"))
    return recipe, models if isinstance(models, dict) else {}


def _nested(text: str) -> Any:
    try:
        value = json.loads(text) if len(text) <= MOST_NESTED else None
        canonical_json(value).encode()  # refuses NaN, infinities and halves of characters
    except (ValueError, RecursionError):
        return None
    return value
