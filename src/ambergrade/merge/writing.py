"""Writes a merge's bytes: whole pages of a large output past the page cache, which spares a copy of each."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from ambergrade.errors import BadInput
from ambergrade.merge.batches import PAGE
from ambergrade.merge.reading import DIRECT_LEAST


class Sink(Protocol):
    """Takes stretches in any order, from several threads."""

    def write(self, offset: int, data: memoryview) -> None: ...


class FileSink:
    """Writes into a file that has its size already."""

    def __init__(self, descriptor: int, direct: int) -> None:
        """`direct`: the same file, opened to be written past the page cache, or -1."""
        self.descriptor, self.direct = descriptor, direct

    def write(self, offset: int, data: memoryview) -> None:
        """Write whole pages straight, where they lie in memory as in the file; its first and last page as usual."""
        first = -offset % PAGE
        last = first + (len(data) - first) // PAGE * PAGE
        aligned = (np.frombuffer(data, np.uint8).ctypes.data - offset) % PAGE == 0
        if self.direct < 0 or last - first < DIRECT_LEAST or not aligned:
            _write(self.descriptor, data, offset)
            return
        _write(self.descriptor, data[:first], offset)
        _write(self.descriptor, data[last:], offset + last)
        try:
            _write(self.direct, data[first:last], offset + first)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that wants larger units
                raise
            _write(self.descriptor, data[first:last], offset + first)


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done


@contextlib.contextmanager
def file_sink(aside: Path, size: int, out: Path, *, direct: bool) -> Iterator[FileSink]:
    """Yield a sink into the empty file `aside`, whose space is taken now: a full disk is told before the work.

    Raises BadInput where `size` bytes do not fit, naming `out`'s folder.
    """
    with contextlib.ExitStack() as stack:
        descriptor = os.open(aside, os.O_RDWR)
        stack.callback(os.close, descriptor)
        _reserve(descriptor, size, out)
        past_cache = -1
        if direct and hasattr(os, "O_DIRECT"):
            with contextlib.suppress(OSError):  # not every file system can
                past_cache = os.open(aside, os.O_WRONLY | os.O_DIRECT)
                stack.callback(os.close, past_cache)
        yield FileSink(descriptor, past_cache)


def _reserve(descriptor: int, size: int, out: Path) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise BadInput(f"{out.parent} has no room for {size:,} bytes. Free some, or name another place.") from None
        os.ftruncate(descriptor, size)
