"""Reads inputs' bytes; the headers themselves are the family's."""

from __future__ import annotations

import os

from ambergrade.errors import BadInput
from ambergrade.family.dtypes import FLOATS, ITEM
from ambergrade.family.header import Entry, Header, header_bytes, read_header

__all__ = ["FLOATS", "ITEM", "Entry", "Header", "header_bytes", "read_exactly", "read_header"]


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
