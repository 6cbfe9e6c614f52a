"""Computes the digests of model files: of the file's bytes, of its weights alone, and the short ones that sites list.

The weights' digest is `family.files.weights_digest` without torch: two files have it in common where they hold the same
tensors under the same names, whatever their metadata and the order of their bytes.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ambergrade import identity
from ambergrade.errors import BadInput, MissingObject
from ambergrade.family.detect import detect, families
from ambergrade.family.files import PASSIVE_FILE, entries, read_metadata, weight_files
from ambergrade.family.header import Entry
from ambergrade.family.layouts import Source
from ambergrade.family.prediction import lacking_marks, read_scheduler
from ambergrade.store import Digests

CHUNK = 4 << 20
"""Bytes read at once."""
MOST_KEPT = 64 << 20
"""Bytes of tensors that wait for their turn."""


@dataclass(frozen=True)
class ModelDigests:
    """Names a model by both of its digests."""

    file: str
    """sha256 of a single file's bytes; of a folder, `files_digest`."""
    weights: str
    """sha256 over names, dtypes, shapes and bytes of the tensors in name order; of a folder, under the names that a
    single file would give them."""


def model_digests(path: Path, known: Digests) -> ModelDigests:
    """Return both digests of a single file or a diffusers folder; what `known` remembers is not read again.

    Raises MissingObject for what is not there, BadInput for what is damaged or no safetensors.
    """
    file = files_digest(path, {part: known.of_file(part) for part in model_files(path)})
    return ModelDigests(file, model_weights(path, file, known))


def model_weights(path: Path, file: str, known: Digests) -> str:
    """Return the weights' digest of what has the digest `file`. Raises as `model_digests`."""
    weights = known.derived("weights", file)
    if weights is None:
        weights = weights_sha256(path)
        now = {part: sha256 for part in model_files(path) if (sha256 := known.known(part)) is not None}
        if files_digest(path, now) == file:  # it did not change between the two readings
            known.tell_derived("weights", file, weights)
    return weights


def model_files(path: Path) -> list[Path]:
    """List the safetensors files that a model is read from: the file itself, or those of a diffusers folder."""
    return [path] if not path.is_dir() else [file for file, _ in folder_files(path).values()]


def folder_files(path: Path) -> dict[str, tuple[Path, str]]:
    """List the files of a diffusers folder that are read, by relative name, with what their keys are prefixed with."""
    found: dict[str, tuple[Path, str]] = {}
    for part in sorted({part for family in families() for part in family.components}):
        for file in weight_files(path / part) if (path / part).is_dir() else []:
            found[f"{part}/{file.name}"] = (file, f"{part}/")
    if not found:
        raise MissingObject(f"{path} is no diffusers folder: no folder in it holds weights of a known network.")
    if (path / PASSIVE_FILE).is_file():
        found[PASSIVE_FILE] = (path / PASSIVE_FILE, "")
    return found


def files_digest(path: Path, digests: Mapping[Path, str]) -> str:
    """Return one file's own sha256; for a folder, the sha256 over its files' relative names and digests."""
    if len(digests) == 1:
        return next(iter(digests.values()))
    return identity.digest({os.path.relpath(file, path): sha256 for file, sha256 in digests.items()})


class FileHasher:
    """Hashes a single file's bytes and its weights while it is read once, from front to back.

    Tensors that lie before their turn in name order are kept until then. Where that would take more than MOST_KEPT,
    there is no digest of the weights.
    """

    def __init__(self, file: Path) -> None:
        self._entries = entries(file)
        self._names = sorted(self._entries, reverse=True)
        """What is not hashed yet, the next one last."""
        self._coming = sorted(self._entries.items(), key=lambda item: (-item[1].start, -item[1].size, item[0]))
        """What is not read to its end, the next one last."""
        self._kept: dict[str, bytearray] = {}
        self._file, self._weights = hashlib.sha256(), hashlib.sha256()
        self._place = self._bytes_kept = 0

    def update(self, data: memoryview) -> None:
        """Take the file's next bytes."""
        self._file.update(data)
        start, self._place = self._place, self._place + len(data)
        while self._coming and self._bytes_kept <= MOST_KEPT:
            name, entry = self._coming[-1]
            if entry.start > self._place or (entry.start == self._place and entry.size):
                return
            end = entry.start + entry.size
            part = data[max(entry.start - start, 0) : end - start]
            if name == self._names[-1]:
                if entry.start >= start:
                    self._weights.update(_described(name, entry.dtype, entry.shape))
                self._weights.update(part)
            else:
                self._kept.setdefault(name, bytearray()).extend(part)
                self._bytes_kept += len(part)
            if end > self._place:
                return
            self._coming.pop()
            if name == self._names[-1]:
                self._names.pop()
                self._hash_kept()

    def _hash_kept(self) -> None:
        """Hash the tensors whose turn has come and that were read before."""
        while self._names and self._names[-1] in self._kept:
            name = self._names.pop()
            self._weights.update(_described(name, self._entries[name].dtype, self._entries[name].shape))
            value = self._kept.pop(name)
            self._weights.update(value)
            self._bytes_kept -= len(value)

    def hexdigest(self) -> str:
        """Return the sha256 of the file's bytes."""
        return self._file.hexdigest()

    @property
    def weights(self) -> str | None:
        """Return the digest of the weights, once all is read; None where too much would have been kept."""
        return None if self._names else self._weights.hexdigest()


def weights_sha256(path: Path) -> str:
    """Compute the weights' digest of a single file or a diffusers folder, read in pieces of a few megabytes."""
    parts = entries(path, [part for family in families() for part in family.components])
    sources = {key: Source((key,)) for key in parts}
    if path.is_dir():
        sources = dict(detect({key: entry.shape for key, entry in parts.items()}).sources)
    # As `Family.read_checkpoint`: what a scheduler or a header says of the prediction type is a mark in a single file.
    told = (None, read_scheduler(path)) if path.is_dir() else (read_metadata(path), None)
    marks = lacking_marks(sources, *told)
    hasher = hashlib.sha256()
    for name in sorted([*sources, *marks]):
        if name in marks:
            hasher.update(f"{name}\0F32\0[0]\0".encode())
            continue
        source = sources[name]
        shape = source.shape({key: parts[key].shape for key in source.keys})
        hasher.update(_described(name, parts[source.keys[0]].dtype, shape))
        for piece in _pieces([parts[key] for key in source.keys], source):
            hasher.update(piece)
    return hasher.hexdigest()


def _described(name: str, dtype: str, shape: Sequence[int]) -> bytes:
    """Return what is hashed before a tensor's bytes, as `family.files.weights_digest` has it."""
    return f"{name}\0{dtype}\0{list(shape)}\0".encode()


def _pieces(parts: Sequence[Entry], source: Source) -> Iterator[bytes | memoryview]:
    """Yield the bytes of one tensor in the single file's layout."""
    if source.form == "transposed":
        (entry,) = parts
        values = np.frombuffer(
            b"".join(_read(entry)), np.dtype(f"V{entry.size // max(entry.shape[0] * entry.shape[1], 1)}")
        )
        yield np.ascontiguousarray(values.reshape(entry.shape).T).data
        return
    assert source.form != "third", source  # a single file's tensor is never a part of a folder's
    for entry in parts:
        yield from _read(entry)


def _read(entry: Entry) -> Iterator[bytes]:
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        left = entry.size
        while left:
            data = file.read(min(left, CHUNK))
            if not data:
                raise BadInput(f"{entry.file} became shorter while it was read. Fetch or write it again.")
            left -= len(data)
            yield data


def tensors_sha256(file: Path) -> str:
    """Compute the sha256 of all bytes after a safetensors file's header: ModelSpec's `hash_sha256`."""
    hasher = hashlib.sha256()
    with file.open("rb") as opened:
        opened.seek(struct.unpack("<Q", opened.read(8))[0], os.SEEK_CUR)
        while chunk := opened.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def listed_digests(file: Path) -> dict[str, str]:
    """Compute the digests by which A1111 and Civitai list a safetensors file, by their names there, in lower case.

    AutoV1 is 8 digits of the sha256 of 64 KiB at 1 MiB (left out where the file ends before), AutoV2 10 digits of the
    file's sha256, AutoV3 12 of the sha256 of all bytes after the header (kohya's `sshs_model_hash`). The first two are
    stable-diffusion-webui's (`modules/hashes.py`), the third is `addnet_hash_safetensors` of sd-scripts
    (`library/train_util.py`, kohya-ss/sd-scripts#102), which Civitai took over (mcmonkeyprojects/SwarmUI#26).
    """
    whole, data = hashlib.sha256(), hashlib.sha256()
    with file.open("rb") as opened:
        head = opened.read(8)
        header = 8 + struct.unpack("<Q", head)[0]
        opened.seek(0)
        place = 0
        while chunk := opened.read(CHUNK):
            whole.update(chunk)
            data.update(memoryview(chunk)[max(0, min(header - place, len(chunk))) :])
            place += len(chunk)
        opened.seek(1 << 20)
        sample = opened.read(1 << 16)
    first = {"AutoV1": hashlib.sha256(sample).hexdigest()[:8]} if sample else {}
    return {**first, "AutoV2": whole.hexdigest()[:10], "AutoV3": data.hexdigest()[:12]}
