"""The canonical header of a merged file, and reading its inputs' bytes."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping

from ambergrade.errors import BadInput
from ambergrade.family.dtypes import FLOATS, ITEM
from ambergrade.family.header import Entry, Header, read_header

__all__ = ["FLOATS", "ITEM", "Entry", "Header", "header_bytes", "read_exactly", "read_header"]


def header_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """The canonical header of a file to be written, and each tensor's offset in the file.

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
