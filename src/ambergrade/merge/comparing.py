"""Holds a merge's bytes against a file's, and says of every tensor that differs by how much."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ambergrade.family.dtypes import ITEM
from ambergrade.merge.header import Header
from ambergrade.merge.job import Job


@dataclass(frozen=True)
class Differing:
    """Says how far a file's tensor lies from the one that its recipe gives."""

    tensor: str
    numbers: int
    """How many of its numbers differ."""
    ulp: int
    """The farthest, in units in the last place of the tensor's dtype; -1 where the two have other dtypes or shapes."""

    def __str__(self) -> str:
        how = "another dtype or shape" if self.ulp < 0 else f"{self.numbers:,} numbers, at most {self.ulp:,} ulp"
        return f"{self.tensor}: {how}"


class Comparing:
    """Takes a merge's bytes (merge/writing.py: Sink) and compares; nothing is written."""

    def __init__(self, descriptor: int, job: Job, header: Header) -> None:
        """`descriptor`: the open file whose `header` was read."""
        self.descriptor, self.job, self.header = descriptor, job, header
        self.first: int | None = None
        """Offset of the first byte that differs."""
        self.compared = self.end = 0
        self._lock = threading.Lock()
        self._tensors = sorted((offset, name) for name, offset in job.offsets.items())
        self._found: dict[str, tuple[int, int]] = {}

    def write(self, offset: int, data: memoryview) -> None:
        """Compare a stretch with what the file holds at the same place."""
        there = os.pread(self.descriptor, len(data), offset)
        with self._lock:
            if there != data:
                self._differs(offset, data, there)
            self.compared += len(data)
            self.end = max(self.end, offset + len(data))

    @property
    def differing(self) -> tuple[Differing, ...]:
        """The tensors whose values differ, the farthest first."""
        found = [Differing(name, numbers, ulp) for name, (numbers, ulp) in self._found.items()]
        return tuple(sorted(found, key=lambda one: (-one.ulp, one.tensor)))

    def _differs(self, offset: int, data: memoryview, there: bytes) -> None:
        same = min(len(there), len(data))
        apart = np.flatnonzero(np.frombuffer(data, np.uint8, same) != np.frombuffer(there, np.uint8, same))
        place = offset + int(apart[0] if len(apart) else same)
        self.first = place if self.first is None else min(self.first, place)
        number = max(bisect_right(self._tensors, offset, key=lambda item: item[0]) - 1, 0)
        for start, name in self._tensors[number:]:
            if start >= offset + len(data):
                return
            size = self.job.plan.tasks[name].size
            low, high = max(start, offset), min(start + size, offset + len(data))
            if low < high:
                self._compare(name, low - start, data[low - offset : high - offset])

    def _compare(self, name: str, within: int, data: memoryview) -> None:
        """Compare a stretch of one tensor, `within` bytes from its beginning, with the file's tensor of that name."""
        dtype, shape = self.job.described[name]
        entry = self.header.entries.get(name)
        if entry is None or (entry.dtype, entry.shape) != (dtype, shape):
            self._found[name] = (0, -1)
            return
        kind = np.dtype(f"<u{ITEM[dtype]}")
        ours = np.frombuffer(data, kind)
        theirs = np.frombuffer(os.pread(self.descriptor, len(data), entry.start + within).ljust(len(data), b"\0"), kind)
        apart = ulps(ours, theirs)
        if apart.any():
            numbers, ulp = self._found.get(name, (0, 0))
            self._found[name] = (numbers + int(np.count_nonzero(apart)), max(ulp, int(apart.max())))


def ulps(ours: npt.NDArray[np.unsignedinteger], theirs: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.uint64]:
    """Count the floating-point numbers from one to the other, given the bits of both; the two zeros are one step apart.

    >>> bits = [np.array([value], np.float32).view(np.uint32) for value in (1.0, 1.0 + 2**-23, -0.0, 0.0)]
    >>> int(ulps(bits[0], bits[1])[0]), int(ulps(bits[2], bits[3])[0])
    (1, 1)
    """
    sign = ours.dtype.type(1 << (ours.dtype.itemsize * 8 - 1))

    def place(bits: npt.NDArray[np.unsignedinteger]) -> npt.NDArray[np.uint64]:
        """Its rank among all numbers of that width, the most negative first."""
        return np.where(bits & sign, ~bits, bits | sign).astype(np.uint64)

    one, other = place(ours), place(theirs)
    return np.maximum(one, other) - np.minimum(one, other)
