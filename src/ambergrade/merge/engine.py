"""Merging files: every input read once, in file order, the output streamed under a header known beforehand.

One reader for each file runs ahead of a pool that merges and writes. A batch is a few megabytes of every input in one
of a few reusable slots, so memory does not grow with the models. No value is decided here: see `plan` and `evaluate`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ambergrade.errors import BadSetting
from ambergrade.family.dtypes import torch_dtypes
from ambergrade.merge.batches import Batch, Place, Segment, Slot, gather, new_slot
from ambergrade.merge.checks import NUMPY, Array, check_operands, finite, needs_values, numbers, refuse_nonfinite
from ambergrade.merge.header import ITEM, header_bytes
from ambergrade.merge.inputs import Digests, Stored
from ambergrade.merge.job import BATCH, Job
from ambergrade.merge.kernel import FORMATS
from ambergrade.merge.plan import Task
from ambergrade.merge.reading import Readers, large
from ambergrade.merge.recipe import Recipe
from ambergrade.merge.sums import combine
from ambergrade.merge.writing import Sink, file_sink
from ambergrade.store import written_aside

if TYPE_CHECKING:
    from ambergrade.merge.evaluate import Evaluator


@dataclass(frozen=True)
class Report:
    """What a merge did."""

    recipe: Recipe
    audit: Sequence[str]
    bytes_read: int
    bytes_written: int
    seconds: float


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
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadSetting(f"{out.parent} cannot be made: {error.strerror}. Name another place.") from None
    if not os.access(out.parent, os.W_OK):
        raise BadSetting(f"Nothing can be written into {out.parent}. Name another place.")
    with written_aside(out) as aside, file_sink(aside, job.bytes_out, out, direct=large(job)) as sink:
        return run(job, sink, threads=threads, batch=batch, device=device, digests=digests)


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
    length = job.header_length
    with contextlib.ExitStack() as stack:
        readers = Readers(job, digests, stack)
        parts = list(gather(job, batch))
        readers.plan(parts)
        _Pipeline(job, sink, readers, threads or _threads(), device).run(parts)
        recipe = job.recipe(readers.finish(), digests)
    header, _ = header_bytes(job.described, job.metadata(recipe))
    assert len(header) <= length, (len(header), length)
    # Two aliases of one file share an entry, so the final text may be shorter than the reserved one.
    text = header[8:].ljust(length - 8)
    sink.write(0, memoryview((length - 8).to_bytes(8, "little") + text))
    digests.save()
    return Report(recipe, tuple(job.plan.audit), readers.bytes_read, job.bytes_out, time.perf_counter() - start)


def _threads() -> int:
    """Half of the processors, up to four: the readers, which hash, take as much again."""
    return min(4, ((os.cpu_count() or 1) + 1) // 2)


class _Pipeline:
    def __init__(self, job: Job, sink: Sink, readers: Readers, threads: int, device: str) -> None:
        self.job, self.sink, self.readers, self.device = job, sink, readers, device
        self.threads = threads
        self.evaluators: queue.SimpleQueue[Evaluator | None] = queue.SimpleQueue()
        """One for each thread, with buffers of its own; None where no tensor needs torch."""
        self.straights = {name for name, task in job.plan.tasks.items() if self.plain(task)}
        self.sums = {name for name in self.straights if self.summed(job.plan.tasks[name])}
        general = len(self.straights) < len(job.plan.tasks)
        for _ in range(threads):
            self.evaluators.put(self.evaluator() if general else None)

    def evaluator(self) -> Evaluator:
        from ambergrade.merge.evaluate import Evaluator

        return Evaluator(self.job.plan.base, self.job.parts, self.job.lora_tensors, self.device)

    def plain(self, task: Task) -> bool:
        """Whether bytes are copied, or models summed on the CPU; then torch is not needed."""
        if task.kind != "merge":
            return True
        if not task.mixture.linear:  # a GPU takes methods; sums wait for the disk in any case
            return False
        dtypes = {self.job.stored(alias, task.name).dtype for alias in self.job.operands(task)}
        if task.mixture.only(task.mixture.models[0]) and dtypes == {task.dtype}:
            return True
        return {*dtypes, task.dtype} <= FORMATS.keys()

    def run(self, batches: Sequence[Batch]) -> None:
        """All batches, a few at a time; the first failure ends the rest."""
        capacity = int(np.median([batch.size for batch in batches])) if batches else 0
        slots: queue.SimpleQueue[Slot] = queue.SimpleQueue()
        for _ in range(self.threads + 2):
            slots.put(new_slot(capacity + (capacity >> 2)))
        working: list[Future[None]] = []
        with _single_threaded(), ThreadPoolExecutor(self.threads, initializer=keep_subnormals) as pool:
            for batch in batches:
                home = slots.get()
                while working and working[0].done():
                    working.pop(0).result()
                if any(future.done() and future.exception() for future in working):
                    slots.put(home)
                    break
                place = home if batch.size <= len(home) else new_slot(batch.size)
                reads = self.readers.read(batch, place)
                back: Callable[[], None] = lambda home=home: slots.put(home)  # type: ignore[misc] # noqa: E731
                working.append(pool.submit(self.work, batch, place, reads, back))
            for future in working:
                future.result()

    def work(self, batch: Batch, slot: Slot, reads: list[Future[None]], back: Callable[[], None]) -> None:
        evaluator = self.evaluators.get()
        try:
            for future in reads:
                future.result()
            for first, end in self.stretches(batch):
                if end - first > 1 and self.together(batch, first, end, slot):
                    continue
                for number in range(first, end):
                    self.segment(evaluator, batch.segments[number], batch.places[number], slot, batch.out_at[number])
            for offset, at, size in batch.writes:
                self.sink.write(offset, slot.data[at : at + size])
        finally:
            self.evaluators.put(evaluator)
            back()

    def stretches(self, batch: Batch) -> Iterator[tuple[int, int]]:
        """Segments that are summed alike and lie together in the slot, from one to before another: most are small."""
        first = 0
        for number in range(1, len(batch.segments) + 1):
            if number == len(batch.segments) or not self.follows(batch, number):
                yield first, number
                first = number

    def follows(self, batch: Batch, number: int) -> bool:
        """Whether a segment is the one before it, continued."""
        before, task = batch.segments[number - 1], batch.segments[number].task
        return (
            before.task.name in self.sums
            and task.name in self.sums
            and before.task.mixture is task.mixture
            and self.dtypes(before.task) == self.dtypes(task)
            and batch.out_at[number] == batch.out_at[number - 1] + before.count * ITEM[task.dtype]
            and all(
                place.offset == (last := batch.places[number - 1][owner]).offset + last.size
                for owner, place in batch.places[number].items()
            )
        )

    def summed(self, task: Task) -> bool:
        """Whether of what needs no torch this is a sum, element by element, and nothing else."""
        if task.kind != "merge" or needs_values(task) or task.mixture.only(task.mixture.models[0]):
            return False
        return not any(self.job.stored(alias, task.name).transposed for alias in task.mixture.models)

    def dtypes(self, task: Task) -> tuple[str, ...]:
        """The operands' and the result's."""
        return (*(self.job.stored(alias, task.name).dtype for alias in task.mixture.models), task.dtype)

    def together(self, batch: Batch, first: int, end: int, slot: Slot) -> bool:
        """Several segments in one sum; returns whether the result is finite."""
        task, places, at = batch.segments[first].task, batch.places[first], batch.out_at[first]
        count = sum(segment.count for segment in batch.segments[first:end])
        stretches = {}
        for alias, dtype in zip(task.mixture.models, self.dtypes(task), strict=False):
            offset = places[self.job.owner[alias]].offset
            stretches[alias] = slot[offset : offset + count * ITEM[dtype]]
        return self.sum(task, stretches, slot[at : at + count * ITEM[task.dtype]])

    def sum(self, task: Task, operands: Mapping[str, Array], out: Slot) -> bool:
        """Bytes of the operands and of the result; returns whether that is finite."""
        models, (*dtypes, dtype) = task.mixture.models, self.dtypes(task)
        base = models.index(self.job.plan.base) if self.job.plan.base in models else None
        xs = [operands[alias].view(f"u{ITEM[kind]}") for alias, kind in zip(models, dtypes, strict=True)]
        return combine(task.mixture.weights, dtypes, xs, dtype, out.view(f"u{ITEM[dtype]}"), base=base)

    def segment(
        self,
        evaluator: Evaluator | None,
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
        if task.name in self.straights:
            sound = self.straight(task, operands, out)
        else:
            assert evaluator is not None
            sound = self.general(evaluator, segment, operands, out)
        if not sound and not task.schedule:
            found = {alias: finite(operand.stored.dtype, operand.data) for alias, operand in operands.items()}
            refuse_nonfinite(task, found, f"{job.plan.formula.text} at {dict(job.plan.coefficients)}")

    def straight(self, task: Task, operands: Mapping[str, _Operand], out: Slot) -> bool:
        """What needs no torch; returns whether the result is finite."""
        first = operands[task.mixture.models[0]]
        if task.kind != "merge" and first.stored.dtype != task.dtype:
            out.view(np.dtype("<" + NUMPY[task.dtype]))[:] = first.numbers
            return True
        if task.mixture.only(task.mixture.models[0]) and first.stored.dtype == task.dtype:
            out[:] = first.flat
            return finite(task.dtype, out)
        return self.sum(task, {alias: operands[alias].flat for alias in task.mixture.models}, out)

    def general(self, evaluator: Evaluator, segment: Segment, operands: Mapping[str, _Operand], result: Slot) -> bool:
        """The same by torch: other dtypes, methods, GPUs."""
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

    @property
    def flat(self) -> Array:
        """The bytes, in the single file's order."""
        if not self.stored.transposed:
            return self.data
        return self.shaped(self.data.view(f"u{ITEM[self.stored.dtype]}")).reshape(-1).view(np.uint8)

    def shaped(self, flat: Array) -> Array:
        """A transposed tensor as the single file has it, which is read whole; any other as it is, flat."""
        return flat.reshape(self.stored.shape[::-1]).T if self.stored.transposed else flat


def keep_subnormals() -> None:
    """Keep this thread's processor from flushing subnormal numbers to zero, as a program may have asked of torch."""
    if torch := sys.modules.get("torch"):
        torch.set_flush_denormal(False)


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
