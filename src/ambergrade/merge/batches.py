"""What is read, merged and written together: some megabytes of every input, and where they lie in a slot of memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from ambergrade.merge.checks import needs_values
from ambergrade.merge.header import ITEM
from ambergrade.merge.inputs import Range
from ambergrade.merge.job import Job
from ambergrade.merge.plan import Task

ALIGN, PAGE = 64, 4096
Slot: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.uint8]]"


@dataclass(frozen=True)
class Segment:
    """A stretch of one tensor."""

    task: Task
    start: int
    """Elements."""
    count: int
    whole: bool


@dataclass(frozen=True)
class Place:
    """Where a stretch of an operand goes in the slot."""

    owner: str
    """Alias under which the input was opened first."""
    ranges: tuple[Range, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Batch:
    segments: tuple[Segment, ...]
    places: tuple[Mapping[str, Place], ...]
    """For each segment, by owner."""
    out_at: tuple[int, ...]
    writes: tuple[tuple[int, int, int], ...]
    """What is together in the output: offset in the file, place in the slot, bytes."""
    size: int
    """Bytes of the slot."""


def gather(job: Job, limit: int) -> Iterator[Batch]:
    """All stretches in the base's order, gathered until one input's share reaches `limit`."""
    waiting: list[Segment] = []
    filled = 0
    for task in job.plan.tasks.values():
        total = task.size // ITEM[task.dtype]
        widest = max([ITEM[task.dtype], *(ITEM[job.stored(alias, task.name).dtype] for alias in job.operands(task))])
        whole = _must_be_whole(job, task)
        step = total if whole else max(1, limit // widest // 2)
        for start in range(0, total, step) if total else [0]:
            count = min(step, total - start)
            waiting.append(Segment(task, start, count, whole or count == total))
            filled += count * widest
            if filled >= limit:
                yield _placed(job, waiting)
                waiting, filled = [], 0
    if waiting:
        yield _placed(job, waiting)


def _must_be_whole(job: Job, task: Task) -> bool:
    transposed = any(job.stored(alias, task.name).transposed for alias in job.operands(task))
    small = task.kind == "ids" or needs_values(task)
    return transposed or small or not task.mixture.linear


def _placed(job: Job, segments: list[Segment]) -> Batch:
    """Where everything lies in the slot: what is together in a file stays together, at its place in a page.

    So whole pages can be moved between the slot and the files past the page cache.
    """
    places: list[dict[str, Place]] = [{} for _ in segments]
    stretches: dict[tuple[str, int], list[tuple[Range, int]]] = {}
    alone: list[tuple[int, str, tuple[Range, ...]]] = []
    for number, segment in enumerate(segments):
        for owner in dict.fromkeys(job.owner[alias] for alias in job.operands(segment.task)):
            stored = job.stored(owner, segment.task.name)
            item = ITEM[stored.dtype]
            ranges = tuple(stored.slice(segment.start * item, segment.count * item))
            if len(ranges) == 1 and ranges[0].start % item == 0:
                stretches.setdefault((owner, ranges[0].file), []).append((ranges[0], number))
            else:
                alone.append((number, owner, ranges))
    at = 0
    for (owner, _), parts in stretches.items():
        end = -1
        for part, number in sorted(parts, key=lambda pair: pair[0].start):
            if part.start != end:
                at = up(at, PAGE) + part.start % PAGE
            places[number][owner] = Place(owner, (part,), at, part.size)
            at, end = at + part.size, part.start + part.size
        at = up(at, PAGE)
    for number, owner, ranges in alone:
        size = sum(part.size for part in ranges)
        places[number][owner] = Place(owner, ranges, at, size)
        at = up(at + size, ALIGN)
    out_at, writes = [], [(-1, 0, 0)]
    for segment in segments:
        item = ITEM[segment.task.dtype]
        start, size = job.offsets[segment.task.name] + segment.start * item, segment.count * item
        before, first, length = writes[-1]
        if before + length == start:
            at = first + length
            writes[-1] = before, first, length + size
        else:
            at = up(at, PAGE) + start % PAGE
            writes.append((start, at, size))
        out_at.append(at)
        at += size
    return Batch(tuple(segments), tuple(places), tuple(out_at), tuple(writes[1:]), up(at, PAGE))


def up(place: int, unit: int) -> int:
    return -(-place // unit) * unit


def new_slot(size: int) -> Slot:
    """Memory that begins with a page."""
    raw = np.empty(size + PAGE, np.uint8)
    start = -raw.ctypes.data % PAGE
    return raw[start : start + size]
