"""Writes a release's weights: a merged file's tensors, byte for byte, below a header that says what is released."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from ambergrade.family.digests import listed_digests, weights_sha256
from ambergrade.family.header import header_bytes, read_header
from ambergrade.identity import file_digest
from ambergrade.release.facts import Weights

HASH = "modelspec.hash_sha256"
SPEC = "1.0.1"
"""The version of ModelSpec that the keys below are of."""
CHUNK = 4 << 20


def about(
    *, title: str, author: str, license: str, resolution: int, clip_skip: int, thumbnail: bytes | None
) -> dict[str, str]:
    """Return ModelSpec's keys for a release; what the merge says of itself (merged_from, …) stands beside them.

    thumbnail: a small JPEG. The hash of the tensors is added when they are written.
    """
    found = {
        "sai_model_spec": SPEC,
        "title": title,
        "author": author,
        "license": license,
        "resolution": f"{resolution}x{resolution}",
        "encoder_layer": str(clip_skip),
        "thumbnail": data_url(thumbnail) if thumbnail else "",
    }
    return {f"modelspec.{key}": text for key, text in found.items() if text}


def data_url(jpeg: bytes) -> str:
    """Return a JPEG as text."""
    import base64

    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


def write_weights(source: Path, target: Path, told: Mapping[str, str]) -> dict[str, str]:
    """Copy the tensors of a merged file below a header that says `told` beside what it said; return `told` and HASH.

    The hash is ModelSpec's: sha256 of all bytes after the header, in hexadecimal digits after `0x`.
    """
    header = read_header(source)
    described = {name: (entry.dtype, entry.shape) for name, entry in header.entries.items()}
    stand_in = {**told, HASH: "0x" + "0" * 64}
    text, offsets = header_bytes(described, {**header.metadata, **stand_in})
    hasher = hashlib.sha256()
    with source.open("rb") as read, target.open("wb") as written:
        written.write(text)
        for name in sorted(offsets, key=lambda one: (offsets[one], one)):
            entry = header.entries[name]
            read.seek(entry.start)
            left = entry.size
            while left:
                data = read.read(min(left, CHUNK))
                hasher.update(data)
                written.write(data)
                left -= len(data)
        said = {**told, HASH: "0x" + hasher.hexdigest()}
        text, _ = header_bytes(described, {**header.metadata, **said})
        written.seek(0)
        written.write(text)
    return said


def describe(file: Path, name: str, header: Mapping[str, str]) -> Weights:
    """Compute every digest of a released file."""
    return Weights(
        name, file.stat().st_size, file_digest(file), weights_sha256(file), listed_digests(file), dict(header)
    )
