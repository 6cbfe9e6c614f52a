"""Merging files: every input read once, in file order, the output streamed under a header known beforehand.

One reader for each file runs ahead of a pool that merges and writes. A batch is a few megabytes of every input in one
of a few reusable slots, so memory does not grow with the models. No value is decided here: see `plan` and `evaluate`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ambergrade.errors import BadInput, BadSetting
from ambergrade.family.files import TORCH
from ambergrade.merge.evaluate import Evaluator, check_operands, operands, refuse_nonfinite
from ambergrade.merge.header import ITEM, header_bytes, read_exactly
from ambergrade.merge.inputs import Digests, Range, Stored, input_digest
from ambergrade.merge.job import Job
from ambergrade.merge.plan import Task
from ambergrade.merge.recipe import Recipe
from ambergrade.store import written_aside

BATCH = 4 << 20
"""Bytes of each input in a batch, unless one tensor that must be whole is larger."""
ALIGN = 64
Slot: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.uint8]]"


@dataclass(frozen=True)
class Report:
    """What a merge did."""

    recipe: Recipe
    audit: Sequence[str]
    bytes_read: int
    bytes_written: int
    seconds: float


class Sink(Protocol):
    def write(self, offset: int, data: memoryview) -> None: ...


def merge(
    job: Job,
    out: Path,
    *,
    threads: int | None = None,
    batch: int = BATCH,
    device: str = "cpu",
    digests: Digests | None = None,
) -> Report:
    """Write the merge of `job` to `out`: aside first, then renamed, or not at all.

    threads, batch (bytes), device: how fast; they change no bit. `digests` remembers the inputs' sha256.
    """
    if any(out.exists() and out.samefile(file) for opened in job.inputs.values() for file in opened.files):
        raise BadSetting(f"{out} is one of the inputs. Name another output.")
    if out.is_dir():
        raise BadSetting(f"{out} is a folder. Name the file to write, such as {out / 'merged.safetensors'}.")
    with written_aside(out) as aside:
        descriptor = os.open(aside, os.O_RDWR)
        try:
            _reserve(descriptor, job.bytes_out, out)
            return run(job, _File(descriptor), threads=threads, batch=batch, device=device, digests=digests)
        finally:
            os.close(descriptor)


def run(
    job: Job,
    sink: Sink,
    *,
    threads: int | None = None,
    batch: int = BATCH,
    device: str = "cpu",
    digests: Digests | None = None,
) -> Report:
    """The merge's bytes into a sink, in any order; the header last, since it holds the inputs' digests."""
    start = time.perf_counter()
    digests = digests or Digests()
    length, offsets = job.header_length, job.offsets
    with contextlib.ExitStack() as stack:
        readers = _Readers(job, digests, stack)
        batches = list(_batches(job, batch))
        readers.plan(batches)
        _Pipeline(job, sink, readers, offsets, threads or min(4, os.cpu_count() or 1), device).run(batches)
        recipe = job.recipe(readers.finish())
    header, _ = header_bytes(job.described, job.metadata(recipe))
    assert len(header) <= length, (len(header), length)
    # Two aliases of one file share an entry, so the final text may be shorter than the reserved one.
    text = header[8:].ljust(length - 8)
    sink.write(0, memoryview((length - 8).to_bytes(8, "little") + text))
    digests.save()
    return Report(recipe, tuple(job.plan.audit), readers.bytes_read, job.bytes_out, time.perf_counter() - start)


class _File:
    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def write(self, offset: int, data: memoryview) -> None:
        while len(data):
            done = os.pwrite(self.descriptor, data, offset)
            data, offset = data[done:], offset + done


def _reserve(descriptor: int, size: int, out: Path) -> None:
    """Take the space now: a full disk is told before the work, not in its middle."""
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise BadInput(f"{out.parent} has no room for {size:,} bytes. Free some, or name another place.") from None
        os.ftruncate(descriptor, size)


# --- batches


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
    size: int
    """Bytes of the slot."""


def _batches(job: Job, limit: int) -> Iterator[Batch]:
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
    small = task.kind == "ids" or bool(task.compared) or task.name.endswith(("position_ids", "text_projection"))
    return transposed or small or not task.mixture.linear


def _placed(job: Job, segments: list[Segment]) -> Batch:
    places: list[dict[str, Place]] = []
    at = 0
    out_at = []
    for segment in segments:
        mine: dict[str, Place] = {}
        for alias in job.operands(segment.task):
            owner = job.owner[alias]
            if owner in mine:
                continue
            stored = job.stored(alias, segment.task.name)
            item = ITEM[stored.dtype]
            ranges = tuple(stored.slice(segment.start * item, segment.count * item))
            mine[owner] = Place(owner, ranges, at, segment.count * item)
            at += -(-segment.count * item // ALIGN) * ALIGN
        places.append(mine)
        out_at.append(at)
        at += -(-segment.count * ITEM[segment.task.dtype] // ALIGN) * ALIGN
    return Batch(tuple(segments), tuple(places), tuple(out_at), at)


# --- reading


class _Readers:
    """One thread for each file, which reads in order and hashes what it reads."""

    def __init__(self, job: Job, digests: Digests, stack: contextlib.ExitStack) -> None:
        self.job, self.digests = job, digests
        self.files: dict[tuple[str, int], _FileReader] = {}
        for owner in dict.fromkeys(job.owner.values()):
            opened = job.inputs[owner]
            for number, (file, size) in enumerate(zip(opened.files, opened.sizes, strict=True)):
                reader = _FileReader(file, size, known=digests.known(file))
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

    def read(self, batch: Batch, slot: memoryview) -> list[Future[None]]:
        return [
            self.files[key].pool.submit(self.files[key].read, ranges, slot) for key, ranges in _by_file(batch).items()
        ]

    def finish(self) -> dict[str, str]:
        """Every input's digest; what was not read on the way is read now."""
        waiting = {key: reader.pool.submit(reader.digest) for key, reader in self.files.items()}
        found = {key: future.result() for key, future in waiting.items()}
        for key, reader in self.files.items():
            self.digests.tell(reader.stat, reader.file, found[key])
        made: dict[str, str] = {}
        for alias, owner in self.job.owner.items():
            opened = self.job.inputs[owner]
            names = [os.path.relpath(file, opened.path) for file in opened.files]
            made[alias] = input_digest(names, [found[owner, number] for number in range(len(names))])
        return made


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
    def __init__(self, file: Path, size: int, known: str | None) -> None:
        self.file, self.size, self.known = file, size, known
        self.descriptor = os.open(file, os.O_RDONLY)
        self.stat = os.fstat(self.descriptor)
        with contextlib.suppress(OSError):
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self.pool = ThreadPoolExecutor(1)
        self.in_order = True
        self.bytes_read = self.hashed = 0
        self.hasher = hashlib.sha256()

    def read(self, ranges: list[tuple[Range, int]], slot: memoryview) -> None:
        """Fill the slot; neighbours in the file are read at once."""
        views = [(part.start, slot[at : at + part.size]) for part, at in ranges if part.size]
        while views:
            run = [views[0]]
            for start, view in views[1:]:
                if start != run[-1][0] + len(run[-1][1]):
                    break
                run.append((start, view))
            views = views[len(run) :]
            buffers = [view for _, view in run]
            read_exactly(self.descriptor, buffers, run[0][0])
            self.bytes_read += sum(map(len, buffers))
            if self.known is None and self.in_order:
                self.skip_to(run[0][0])
                for buffer in buffers:
                    self.hasher.update(buffer)
                    self.hashed += len(buffer)

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


# --- merging


class _Pipeline:
    def __init__(
        self, job: Job, sink: Sink, readers: _Readers, offsets: Mapping[str, int], threads: int, device: str
    ) -> None:
        self.job, self.sink, self.readers, self.offsets, self.device = job, sink, readers, offsets, device
        self.threads = threads
        self.evaluators: queue.SimpleQueue[Evaluator] = queue.SimpleQueue()
        for _ in range(threads):
            self.evaluators.put(Evaluator(job.plan.base, job.parts, job.lora_tensors, device))

    def run(self, batches: Sequence[Batch]) -> None:
        """All batches, a few at a time; the first failure ends the rest."""
        capacity = int(np.median([batch.size for batch in batches])) if batches else 0
        slots: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for _ in range(self.threads + 2):
            slots.put(np.empty(capacity + (capacity >> 2), np.uint8))
        working: list[Future[None]] = []
        with _single_threaded(), ThreadPoolExecutor(self.threads) as pool:
            for batch in batches:
                home = slots.get()
                while working and working[0].done():
                    working.pop(0).result()
                if any(future.done() and future.exception() for future in working):
                    slots.put(home)
                    break
                slot = home if batch.size <= len(home) else np.empty(batch.size, np.uint8)
                reads = self.readers.read(batch, slot.data)
                back: Callable[[], None] = lambda home=home: slots.put(home)  # type: ignore[misc] # noqa: E731
                working.append(pool.submit(self.work, batch, slot, reads, back))
            for future in working:
                future.result()

    def work(self, batch: Batch, slot: Slot, reads: list[Future[None]], back: Callable[[], None]) -> None:
        evaluator = self.evaluators.get()
        try:
            for future in reads:
                future.result()
            for segment, places, at in zip(batch.segments, batch.places, batch.out_at, strict=True):
                self.segment(evaluator, segment, places, slot, at)
        finally:
            self.evaluators.put(evaluator)
            back()

    def segment(
        self,
        evaluator: Evaluator,
        segment: Segment,
        places: Mapping[str, Place],
        slot: Slot,
        at: int,
    ) -> None:
        task, job = segment.task, self.job
        tensors: dict[str, Tensor] = {}
        for alias in job.operands(task):
            place = places[job.owner[alias]]
            stored = job.stored(alias, task.name)
            flat = torch.from_numpy(slot[place.offset : place.offset + place.size]).view(TORCH[stored.dtype])
            tensors[alias] = (_shaped(flat, stored) if segment.whole else flat).to(self.device)
        if segment.whole:
            check_operands(task, tensors, job.plan.base, cosmetic=job.policies["cosmetic"])
        size = segment.count * ITEM[task.dtype]
        out = torch.from_numpy(slot[at : at + size]).view(TORCH[task.dtype])
        target = out if self.device == "cpu" else torch.empty_like(out, device=self.device)
        finite = True
        if not task.mixture.linear:
            made = evaluator.whole(task, tensors).reshape(-1)
            target.copy_(made)
            finite = evaluator.combiner.finite(target)
        elif task.kind == "ids" or not target.is_floating_point():
            target.copy_(tensors[task.mixture.models[0]].reshape(-1))
        else:
            flat_tensors = {alias: tensor.reshape(-1) for alias, tensor in tensors.items()}
            finite = evaluator.linear(task, flat_tensors, target)
        if not finite:
            refuse_nonfinite(task, tensors, f"{job.plan.formula.text} at {dict(job.plan.coefficients)}")
        if target is not out:
            out.copy_(target)
        offset = self.offsets[task.name] + segment.start * ITEM[task.dtype]
        self.sink.write(offset, slot.data[at : at + size])


def _shaped(flat: Tensor, stored: Stored) -> Tensor:
    if stored.transposed:
        return flat.reshape(stored.shape[::-1]).T
    return flat.reshape(stored.shape)


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    """Threads of our own instead of torch's, which would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


__all__ = ["BATCH", "Report", "Sink", "merge", "operands", "run"]
