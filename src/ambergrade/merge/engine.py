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
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from ambergrade.errors import BadInput, BadSetting
from ambergrade.family.files import torch_dtypes
from ambergrade.merge.checks import NUMPY, Array, check_operands, finite, needs_values, numbers, refuse_nonfinite
from ambergrade.merge.halves import Halves
from ambergrade.merge.header import ITEM, header_bytes, read_exactly
from ambergrade.merge.inputs import Digests, Range, Stored, input_digest
from ambergrade.merge.job import BATCH, Job
from ambergrade.merge.plan import Task
from ambergrade.merge.recipe import Recipe
from ambergrade.merge.weights import weights_of
from ambergrade.store import written_aside

if TYPE_CHECKING:
    from ambergrade.merge.evaluate import Evaluator

ALIGN, PAGE = 64, 4096
DIRECT_LEAST = 1 << 18
"""Bytes of a stretch that is worth reading past the page cache."""
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
    small = task.kind == "ids" or needs_values(task)
    return transposed or small or not task.mixture.linear


def _placed(job: Job, segments: list[Segment]) -> Batch:
    """Where everything lies in the slot: what is together in a file stays together, at its place in a page."""
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
                at = _up(at, PAGE) + part.start % PAGE
            places[number][owner] = Place(owner, (part,), at, part.size)
            at, end = at + part.size, part.start + part.size
        at = _up(at, PAGE)
    for number, owner, ranges in alone:
        size = sum(part.size for part in ranges)
        places[number][owner] = Place(owner, ranges, at, size)
        at = _up(at + size, ALIGN)
    out_at = []
    for segment in segments:
        out_at.append(at)
        at = _up(at + segment.count * ITEM[segment.task.dtype], ALIGN)
    return Batch(tuple(segments), tuple(places), tuple(out_at), at)


def _up(place: int, unit: int) -> int:
    return -(-place // unit) * unit


def _slot(size: int) -> Slot:
    """Memory that begins with a page."""
    raw = np.empty(size + PAGE, np.uint8)
    start = -raw.ctypes.data % PAGE
    return raw[start : start + size]


# --- reading


class _Readers:
    """One thread for each file, which reads in order and hashes what it reads."""

    def __init__(self, job: Job, digests: Digests, stack: contextlib.ExitStack) -> None:
        self.job, self.digests = job, digests
        direct = job.bytes_in > _memory() // 2
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
        made: dict[str, str] = {}
        for alias, owner in self.job.owner.items():
            opened = self.job.inputs[owner]
            names = [os.path.relpath(file, opened.path) for file in opened.files]
            made[alias] = input_digest(names, [found[owner, number] for number in range(len(names))])
        return made


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
        """`direct`: what memory does not hold already is read past its cache."""
        self.file, self.size, self.known = file, size, known
        self.descriptor = os.open(file, os.O_RDONLY)
        self.stat = os.fstat(self.descriptor)
        with contextlib.suppress(OSError):
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        self.direct = -1
        if direct and hasattr(os, "O_DIRECT"):
            with contextlib.suppress(OSError):  # not every file system can
                self.direct = os.open(file, os.O_RDONLY | os.O_DIRECT)
        self.pool = ThreadPoolExecutor(1)
        self.in_order = True
        self.bytes_read = self.hashed = 0
        self.hasher = hashlib.sha256()

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
            self.bytes_read += size
            if self.known is None and self.in_order:
                self.skip_to(start)
                self.hasher.update(view)
                self.hashed += size

    def past_cache(self, start: int, at: int, size: int, slot: Slot) -> int:
        """Fill a stretch, or its beginning, without the page cache but for what is in it; returns how much of it."""
        if (start - at) % PAGE:
            return 0
        done = 0
        with contextlib.suppress(OSError):  # nothing there, or a file system that cannot tell
            done = os.preadv(self.descriptor, [slot.data[at : at + size]], start, os.RWF_NOWAIT)
        place = (start + done) // PAGE * PAGE
        try:
            while place < start + size:
                first = place - start + at  # whole pages: those around the stretch are nobody else's
                got = os.preadv(self.direct, [slot.data[first : _up(at + size, PAGE)]], place)
                place += got
                if got % PAGE or not got:  # the end of the file
                    break
        except OSError:
            return done
        return max(done, min(place - start, size))

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


# --- merging


@dataclass
class _Tools:
    """What a thread works with: buffers of its own."""

    halves: Halves
    evaluator: Evaluator | None
    """None where no tensor needs torch."""


class _Pipeline:
    def __init__(
        self, job: Job, sink: Sink, readers: _Readers, offsets: Mapping[str, int], threads: int, device: str
    ) -> None:
        self.job, self.sink, self.readers, self.offsets, self.device = job, sink, readers, offsets, device
        self.threads = threads
        self.tools: queue.SimpleQueue[_Tools] = queue.SimpleQueue()
        general = not all(self.plain(task) for task in job.plan.tasks.values())
        for _ in range(threads):
            self.tools.put(_Tools(Halves(), self.evaluator() if general else None))

    def evaluator(self) -> Evaluator:
        from ambergrade.merge.evaluate import Evaluator

        return Evaluator(self.job.plan.base, self.job.parts, self.job.lora_tensors, self.device)

    def plain(self, task: Task) -> bool:
        """Whether bytes are copied, or fp16 is summed with weights of few digits; then torch is not needed."""
        if task.kind != "merge":
            return True
        if self.device != "cpu" or not task.mixture.linear:
            return False
        dtypes = {self.job.stored(alias, task.name).dtype for alias in self.job.operands(task)}
        if task.mixture.only(task.mixture.models[0]):
            return dtypes == {task.dtype}
        return dtypes == {task.dtype} == {"F16"} and weights_of(task.mixture).light

    def run(self, batches: Sequence[Batch]) -> None:
        """All batches, a few at a time; the first failure ends the rest."""
        capacity = int(np.median([batch.size for batch in batches])) if batches else 0
        slots: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for _ in range(self.threads + 2):
            slots.put(_slot(capacity + (capacity >> 2)))
        working: list[Future[None]] = []
        with _single_threaded(), ThreadPoolExecutor(self.threads) as pool:
            for batch in batches:
                home = slots.get()
                while working and working[0].done():
                    working.pop(0).result()
                if any(future.done() and future.exception() for future in working):
                    slots.put(home)
                    break
                slot = home if batch.size <= len(home) else _slot(batch.size)
                reads = self.readers.read(batch, slot)
                back: Callable[[], None] = lambda home=home: slots.put(home)  # type: ignore[misc] # noqa: E731
                working.append(pool.submit(self.work, batch, slot, reads, back))
            for future in working:
                future.result()

    def work(self, batch: Batch, slot: Slot, reads: list[Future[None]], back: Callable[[], None]) -> None:
        tools = self.tools.get()
        try:
            for future in reads:
                future.result()
            for segment, places, at in zip(batch.segments, batch.places, batch.out_at, strict=True):
                self.segment(tools, segment, places, slot, at)
        finally:
            self.tools.put(tools)
            back()

    def segment(
        self,
        tools: _Tools,
        segment: Segment,
        places: Mapping[str, Place],
        slot: Slot,
        at: int,
    ) -> None:
        task, job = segment.task, self.job
        operands = {}
        for alias in job.operands(task):
            place, stored = places[job.owner[alias]], job.stored(alias, task.name)
            operands[alias] = _Operand(slot[place.offset : place.offset + place.size], stored)
        if segment.whole and needs_values(task):
            values = {
                alias: operand.shaped(operand.numbers).reshape(operand.stored.shape)
                for alias, operand in operands.items()
            }
            check_operands(task, values, job.plan.base, cosmetic=job.policies["cosmetic"])
        out = slot[at : at + segment.count * ITEM[task.dtype]]
        if self.plain(task):
            sound = self.straight(tools.halves, task, operands, out)
        else:
            assert tools.evaluator is not None
            sound = self.general(tools.evaluator, segment, operands, out)
        if not sound:
            found = {alias: finite(operand.stored.dtype, operand.data) for alias, operand in operands.items()}
            refuse_nonfinite(task, found, f"{job.plan.formula.text} at {dict(job.plan.coefficients)}")
        self.sink.write(self.offsets[task.name] + segment.start * ITEM[task.dtype], out.data)

    def straight(self, halves: Halves, task: Task, operands: Mapping[str, _Operand], out: Slot) -> bool:
        """What needs no torch; returns whether the result is finite."""
        first = operands[task.mixture.models[0]]
        if task.kind != "merge" and first.stored.dtype != task.dtype:
            out.view(np.dtype("<" + NUMPY[task.dtype]))[:] = first.numbers
            return True
        if task.mixture.only(task.mixture.models[0]):
            width = f"u{ITEM[task.dtype]}"
            out.view(width)[:] = first.shaped(first.data.view(width)).reshape(-1)
            return finite(task.dtype, out)
        bits = {alias: operand.shaped(operand.data.view(np.int16)).reshape(-1) for alias, operand in operands.items()}
        xs = [bits[alias] for alias in task.mixture.models]
        return halves.combine(weights_of(task.mixture), xs, out.view(np.int16), bits.get(self.job.plan.base))

    def general(self, evaluator: Evaluator, segment: Segment, operands: Mapping[str, _Operand], result: Slot) -> bool:
        """The same by torch: other dtypes, weights of many digits, methods, GPUs."""
        import torch

        task = segment.task
        tensors = {}
        for alias, operand in operands.items():
            flat = torch.from_numpy(operand.data).view(torch_dtypes()[operand.stored.dtype])
            whole = flat.reshape(operand.stored.shape[::-1]).T if operand.stored.transposed else flat
            tensors[alias] = (whole.reshape(operand.stored.shape) if segment.whole else flat).to(self.device)
        out = torch.from_numpy(result).view(torch_dtypes()[task.dtype])
        target = out if self.device == "cpu" else torch.empty_like(out, device=self.device)
        if task.mixture.linear:
            sound = evaluator.linear(task, {alias: tensor.reshape(-1) for alias, tensor in tensors.items()}, target)
        else:
            target.copy_(evaluator.whole(task, tensors).reshape(-1))
            sound = evaluator.combiner.finite(target)
        if target is not out:
            out.copy_(target)
        return sound


@dataclass(frozen=True)
class _Operand:
    """A stretch of one tensor of one input."""

    data: Slot
    stored: Stored

    @cached_property
    def numbers(self) -> Array:
        return numbers(self.stored.dtype, self.data)

    def shaped(self, flat: Array) -> Array:
        """A transposed tensor as the single file has it, which is read whole; any other as it is, flat."""
        return flat.reshape(self.stored.shape[::-1]).T if self.stored.transposed else flat


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    """Threads of our own instead of torch's, where that is imported, which would wait for each other."""
    torch = sys.modules.get("torch")
    before = torch.get_num_threads() if torch else 0
    if torch:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if torch:
            torch.set_num_threads(before)
