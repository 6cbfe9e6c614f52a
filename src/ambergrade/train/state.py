"""Writes and reads the resumable state of a run: sharded, hashed, and complete or not there at all.

    <scratch>/state/000012800/shard-000.safetensors …   tensors, at most SHARD bytes a file
                              state.json                progress and every shard's sha256; written last

The newest two are kept: should one be damaged later, the other still holds.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ambergrade.errors import BadInput, MissingObject
from ambergrade.family.files import read_tensors, write_tensors
from ambergrade.identity import file_digest
from ambergrade.store import write_json

SHARD = 2_000_000_000
"""Bytes of tensors in one file."""
KEPT = 2


def write_state(
    folder: Path, tensors: Mapping[str, Tensor], progress: Mapping[str, Any], *, shard: int = SHARD
) -> None:
    """Write the state after `progress["seen"]` images under `folder`, and drop all but the newest.

    Raises:
        MissingObject: it cannot be written (a full disk, say); the states before are still whole.
    """
    place = folder / f"{progress['seen']:09d}"
    try:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        hashes = {}
        for number, part in enumerate(_shards(tensors, shard)):
            path = place / f"shard-{number:03d}.safetensors"
            write_tensors(path, part, {})
            hashes[path.name] = file_digest(path)
        write_json(place / "state.json", {"progress": progress, "shards": hashes})
    except OSError as error:
        shutil.rmtree(place, ignore_errors=True)
        before = _complete(folder)
        last = f"The last whole one is of {int(before[-1].name):,} images." if before else "There is none before it."
        raise MissingObject(
            f"The state after {progress['seen']:,} images cannot be written to {folder}: {error.strerror or error}.\n"
            f"{last} Make room and run the same command again."
        ) from error
    for old in _complete(folder)[:-KEPT]:
        shutil.rmtree(old)


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Read (tensors, progress) of the newest state that is whole; None if there is no state at all.

    Raises:
        BadInput: there are states, and every one is damaged.
    """
    damaged = []
    for place in reversed(_complete(folder)):
        about = json.loads((place / "state.json").read_text())
        wrong = [
            name
            for name, sha256 in about["shards"].items()
            if not (place / name).is_file() or file_digest(place / name) != sha256
        ]
        if not wrong:
            found: dict[str, Tensor] = {}
            for name in about["shards"]:
                found |= read_tensors(place / name)
            return found, about["progress"]
        damaged.append(f"{place.name} ({', '.join(wrong)})")
    if damaged:
        raise BadInput(
            f"Every state in {folder} is damaged: {'; '.join(damaged)}.\nRemove the folder to begin the run anew."
        )
    return None


def images_seen(folder: Path) -> int:
    """Read off how many images the newest state is of; 0 where there is no state."""
    return max((int(place.name) for place in _complete(folder)), default=0)


def _complete(folder: Path) -> list[Path]:
    """List the states that were written to the end, oldest first."""
    return sorted(path.parent for path in folder.glob("*/state.json"))


def _shards(tensors: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    part: dict[str, Tensor] = {}
    held = 0
    for name in sorted(tensors):
        bytes_ = tensors[name].numel() * tensors[name].element_size()
        if part and held + bytes_ > size:
            yield part
            part, held = {}, 0
        part[name] = tensors[name]
        held += bytes_
    yield part
