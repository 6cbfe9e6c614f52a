"""Reading the inputs of a merge: each file once, in its order, by a thread of its own that hashes what it reads.

Inputs that would fill a good part of the memory are read past the page cache, unless they are in it already: that
spares copies and the search for free pages, and leaves the cache to others.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ambergrade.family.digests import FileHasher, files_digest
from ambergrade.merge.batches import PAGE, Batch, Slot, up
from ambergrade.merge.header import read_exactly
from ambergrade.merge.inputs import Digests, Range
from ambergrade.merge.job import Job

DIRECT_LEAST = 1 << 18
"""Bytes of a stretch that is worth reading or writing past the page cache."""
PROBES = 16


class Readers:
    """One thread for each file, which reads in order and hashes what it reads."""

    def __init__(self, job: Job, digests: Digests, stack: contextlib.ExitStack) -> None:
        self.job, self.digests = job, digests
        direct = large(job)
        self.files: dict[tuple[str, int], _FileReader] = {}
        for owner in dict.fromkeys(job.owner.values()):
            opened = job.inputs[owner]
            for number, (file, size) in enumerate(zip(opened.files, opened.sizes, strict=True)):
                reader = _FileReader(file, size, known=digests.known(file), direct=direct)
                stack.callback(reader.close)
                self.files[owner, number] = reader

    @property
    def bytes_read(self) -> int:
        return sum(reader.bytes_read for reader in self.files.values())

    def plan(self, batches: Sequence[Batch]) -> None:
        """A file that is not read from front to back cannot be hashed on the way."""
        ends: dict[tuple[str, int], int] = {}
        for batch in batches:
            for key, ranges in _by_file(batch).items():
                for part, _ in ranges:
                    if part.start < ends.get(key, 0):
                        self.files[key].in_order = False
                    ends[key] = part.start + part.size

    def read(self, batch: Batch, slot: Slot) -> list[Future[None]]:
        return [
            self.files[key].pool.submit(self.files[key].read, ranges, slot) for key, ranges in _by_file(batch).items()
        ]

    def finish(self) -> dict[str, str]:
        """Every input's digest; what was not read on the way is read now."""
        waiting = {key: reader.pool.submit(reader.digest) for key, reader in self.files.items()}
        found = {key: future.result() for key, future in waiting.items()}
        for key, reader in self.files.items():
            self.digests.tell(reader.stat, reader.file, found[key])
            if reader.known is None and reader.hasher.weights is not None:
                self.digests.tell_derived("weights", found[key], reader.hasher.weights)
        made: dict[str, str] = {}
        for alias, owner in self.job.owner.items():
            opened = self.job.inputs[owner]
            made[alias] = files_digest(opened.path, {file: found[owner, k] for k, file in enumerate(opened.files)})
        return made


def large(job: Job) -> bool:
    """Whether the inputs would fill a good part of the memory that is free now."""
    return job.bytes_in > _memory() // 4


def _memory() -> int:
    """Bytes that the machine could give, as the kernel estimates; enough for anything where it does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 1 << 62


def _by_file(batch: Batch) -> dict[tuple[str, int], list[tuple[Range, int]]]:
    """For each file its ranges and where they go, in file order."""
    found: dict[tuple[str, int], list[tuple[Range, int]]] = {}
    for places in batch.places:
        for place in places.values():
            at = place.offset
            for part in place.ranges:
                found.setdefault((place.owner, part.file), []).append((part, at))
                at += part.size
    for ranges in found.values():
        ranges.sort(key=lambda item: item[0].start)
    return found


class _FileReader:
    def __init__(self, file: Path, size: int, *, known: str | None, direct: bool) -> None:
        """`direct`: read past the page cache, unless most of the file is in it."""
        self.file, self.size, self.known = file, size, known
        self.descriptor = os.open(file, os.O_RDONLY)
        self.stat = os.fstat(self.descriptor)
        self.direct = -1
        if direct and hasattr(os, "O_DIRECT") and not _in_cache(file, size):
            with contextlib.suppress(OSError):  # not every file system can
                self.direct = os.open(file, os.O_RDONLY | os.O_DIRECT)
        with contextlib.suppress(OSError):
            ahead = os.POSIX_FADV_SEQUENTIAL if self.direct < 0 else os.POSIX_FADV_RANDOM
            os.posix_fadvise(self.descriptor, 0, 0, ahead)
        self.pool = ThreadPoolExecutor(1)
        self.in_order = True
        self.bytes_read = self.hashed = 0
        self.hasher = FileHasher(file)
        self.last = -1, b""
        """The page in which the last stretch ended: its offset in the file, and its bytes."""

    def read(self, ranges: list[tuple[Range, int]], slot: Slot) -> None:
        """Fill the slot; what is together in both is read at once."""
        stretches: list[tuple[int, int, int]] = []
        for part, at in ranges:
            start, place, size = stretches[-1] if stretches else (-1, -1, 0)
            if stretches and (start + size, place + size) == (part.start, at):
                stretches[-1] = start, place, size + part.size
            elif part.size:
                stretches.append((part.start, at, part.size))
        for start, at, size in stretches:
            view = slot.data[at : at + size]
            done = self.past_cache(start, at, size, slot) if self.direct >= 0 and size >= DIRECT_LEAST else 0
            read_exactly(self.descriptor, [view[done:]], start + done)
            self.bytes_read += size - done
            if self.known is None and self.in_order:
                self.skip_to(start)
                self.hasher.update(view)
                self.hashed += size

    def past_cache(self, start: int, at: int, size: int, slot: Slot) -> int:
        """Fill a stretch, or its beginning, in whole pages; returns how much of it."""
        if (start - at) % PAGE:
            return 0
        ahead = at - start  # pages around the stretch are nobody else's in the slot
        place, end = start // PAGE * PAGE, start + size
        if self.last[0] == place:
            slot[place + ahead : place + ahead + PAGE] = np.frombuffer(self.last[1], np.uint8)
            place += PAGE
        try:
            while place < end:
                got = os.preadv(self.direct, [slot.data[place + ahead : up(end + ahead, PAGE)]], place)
                place += got
                self.bytes_read += got
                if got % PAGE or not got:  # the end of the file
                    break
        except OSError:
            return max(0, min(place - start, size))
        whole = end // PAGE * PAGE
        if place >= whole + PAGE:
            self.last = whole, slot[whole + ahead : whole + ahead + PAGE].tobytes()
        return max(0, min(place - start, size))

    def skip_to(self, offset: int) -> None:
        """Hash what lies between, which no tensor of the merge needs."""
        scratch = bytearray(min(1 << 20, max(offset - self.hashed, 0)))
        while self.hashed < offset:
            view = memoryview(scratch)[: offset - self.hashed]
            read_exactly(self.descriptor, [view], self.hashed)
            self.hasher.update(view)
            self.hashed += len(view)
            self.bytes_read += len(view)

    def digest(self) -> str:
        if self.known is not None:
            return self.known
        self.skip_to(self.size)
        return self.hasher.hexdigest()

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        os.close(self.descriptor)
        if self.direct >= 0:
            os.close(self.direct)


def _in_cache(file: Path, size: int) -> bool:
    """Whether most of some bytes of the file, spread evenly, come without waiting for the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # or one look would bring in megabytes
        return 2 * sum(_at_hand(descriptor, size * part // PROBES) for part in range(PROBES)) > PROBES
    finally:
        os.close(descriptor)


def _at_hand(descriptor: int, place: int) -> bool:
    try:
        return os.preadv(descriptor, [bytearray(1)], place, os.RWF_NOWAIT) == 1
    except OSError:  # not there, or a file system that cannot tell
        return False
