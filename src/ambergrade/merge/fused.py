"""Linear merges on a GPU in one pass over memory: every input read once, the result written straight where it lives.

Whole weights over one divisor in float64, exact for fp16 with weights of up to six digits, one division, one rounding
to odd on the way to fp16: the exact value rounded once, as on the CPU (`sums`). So its bits are the CPU's. One launch
serves thousands of tensors, each with weights of its own; inputs in the host's memory cross the bus stretch by stretch.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from ambergrade.errors import BadSetting
from ambergrade.merge.weights import Weights

MOST_MODELS = 4
BLOCK = 4096
"""Elements of one program."""
STRETCH = 1 << 24
"""Elements of each input that cross the bus together."""
OUTPUTS = (torch.float16, torch.float32, torch.bfloat16)
NOT_FINITE, FAR = 1, 2
"""What a pass says of a part: its result is infinite or NaN; or its inputs were so large that bits may be wrong."""


@dataclass(frozen=True)
class Part:
    """Flat fp16 weights: what they are made of, and where they go.

    An fp32 output holds the same values, a bf16 one is rounded from them, as a copy into such a network rounds.
    """

    inputs: tuple[Tensor, ...]
    factors: tuple[int, ...]
    """One whole number for each input, over `divisor`."""
    divisor: int
    out: Tensor
    signed: bool
    """Whether a zero is -0.0 where the first input is."""

    def piece(self, start: int, inputs: tuple[Tensor, ...]) -> Part:
        """The stretch that begins at an element, its inputs lying elsewhere."""
        return replace(self, inputs=inputs, out=self.out[start : start + len(inputs[0])])


def fits(weights: Weights, inputs: Sequence[Tensor], out: Tensor) -> bool:
    """Whether one pass does it: few contiguous fp16 inputs, a 16-bit or fp32 output, and weights that are light."""
    halves = all(x.dtype == torch.float16 for x in inputs) and out.dtype in OUTPUTS
    together = all(x.is_contiguous() for x in (*inputs, out))
    return halves and together and weights.light and len(inputs) <= MOST_MODELS


def part(weights: Weights, inputs: Sequence[Tensor], out: Tensor, base: int | None = None) -> Part:
    """The weighted sum of tensors of one size into `out`; where it is zero it is -0.0 if input number `base` is.

    Raises BadSetting for what one pass cannot do: see `fits`.
    """
    if not fits(weights, inputs, out):
        dtypes = ", ".join(sorted({str(x.dtype) for x in (*inputs, out)}))
        raise BadSetting(
            f"One fused pass takes up to {MOST_MODELS} contiguous fp16 inputs and weights of up to six digits; "
            f"found {len(inputs)} of {dtypes} and divisor {weights.q}.\nMerge on the CPU, which has the same bits."
        )
    order = sorted(range(len(inputs)), key=lambda number: number != base)
    flat, factors = tuple(inputs[number].view(-1) for number in order), tuple(weights.p[number] for number in order)
    return Part(flat, factors, weights.q, out.view(-1), base is not None)


def one_pass(parts: Sequence[Part]) -> Tensor:
    """Make all parts in one launch; inputs and outputs are on one device.

    Returns, for each part, 0, NOT_FINITE or FAR as int32 on the device: look at it when the pass is done.
    """
    device = parts[0].out.device
    sizes = np.array([len(part.out) for part in parts], np.int64)
    blocks = -(-sizes // BLOCK)
    table = np.zeros((len(parts), MOST_MODELS + 3), np.int64)
    numbers = np.zeros((len(parts), MOST_MODELS + 2), np.float64)
    for row, part in enumerate(parts):
        inputs = [x.data_ptr() for x in part.inputs]
        table[row, : MOST_MODELS + 1] = *inputs, *[inputs[0]] * (MOST_MODELS - len(inputs)), part.out.data_ptr()
        numbers[row, : len(inputs)] = part.factors
        numbers[row, MOST_MODELS:] = part.divisor, sum(map(abs, part.factors))
    table[:, -2], table[:, -1] = sizes, [part.signed for part in parts]
    whole = ~(table[:, : MOST_MODELS + 1] % 16).any(axis=1) & (sizes % 8 == 0)
    kinds = np.array([OUTPUTS.index(part.out.dtype) for part in parts])
    said = torch.zeros(len(parts), dtype=torch.int32, device=device)
    count = max(len(part.inputs) for part in parts)
    on_device = _uploaded(table.tobytes(), len(parts), device), torch.tensor(numbers, device=device)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        # Nearly all are aligned; the others cannot be moved 16 bytes at a time.
        for aligned, kind in itertools.product((True, False), range(len(OUTPUTS))):
            chosen = np.where((whole == aligned) & (kinds == kind), blocks, 0)
            if chosen.any():
                where = _programs(tuple(chosen.tolist()), device)
                _kernel[(len(where),)](where, *on_device, said, count, aligned, kind, BLOCK, num_warps=8)
    return said


@functools.lru_cache(maxsize=4)
def _uploaded(table: bytes, rows: int, device: torch.device) -> Tensor:
    """The table of addresses and sizes on the device: points differ in their numbers alone."""
    return torch.from_numpy(np.frombuffer(table, np.int64).reshape(rows, -1).copy()).to(device)


@functools.lru_cache(maxsize=4)
def _programs(blocks: tuple[int, ...], device: torch.device) -> Tensor:
    """Which part each program works on, and which block of it, (programs, 2); the same for every point."""
    rows = np.repeat(np.arange(len(blocks)), blocks)
    inner = np.arange(len(rows)) - np.repeat(np.cumsum(blocks) - blocks, blocks)
    return torch.from_numpy(np.stack([rows, inner], axis=1).astype(np.int32)).to(device)


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    where, table, numbers, said, count: tl.constexpr, aligned: tl.constexpr, kind: tl.constexpr, block: tl.constexpr
):
    row = tl.load(where + 2 * tl.program_id(0)).to(tl.int64)
    entry, number = table + row * 7, numbers + row * 6  # MOST_MODELS inputs, and what `one_pass` puts after them
    inner = tl.load(where + 2 * tl.program_id(0) + 1).to(tl.int64) * block + tl.arange(0, block)
    size = tl.load(entry + 5)
    if aligned:
        size = tl.multiple_of(size, 8)
    inside = inner < size
    x0 = tl.load(entry).to(tl.pointer_type(tl.float16)) + inner
    # bf16 is written as its bits; `kind` is the place in OUTPUTS.
    word = tl.float32 if kind == 1 else tl.float16 if kind == 0 else tl.int16
    out = tl.load(entry + 4).to(tl.pointer_type(word)) + inner
    if aligned:
        x0, out = tl.multiple_of(x0, 16), tl.multiple_of(out, 16)
    first = tl.load(x0, mask=inside, other=0.0)
    total = first.to(tl.float64) * tl.load(number)
    top = tl.abs(first.to(tl.float32))
    for place in tl.static_range(1, count):
        x = tl.load(entry + place).to(tl.pointer_type(tl.float16)) + inner
        if aligned:
            x = tl.multiple_of(x, 16)
        more = tl.load(x, mask=inside, other=0.0)
        total += more.to(tl.float64) * tl.load(number + place)
        top = tl.maximum(top, tl.abs(more.to(tl.float32)))
    exact = (total + 0.0) / tl.load(number + 4)  # a sum of nothing but zeros is +0.0
    near = exact.to(tl.float32)
    wide = near.to(tl.float64)
    bits = near.to(tl.int32, bitcast=True)
    # Round to odd: an inexact fp32 with an even last bit goes one step towards the exact value.
    away = tl.where((exact > wide) == (near > 0), 1, -1)
    odd = tl.where((exact != wide) & ((bits & 1) == 0) & (wide != 0), bits + away, bits)
    made = odd.to(tl.float32, bitcast=True).to(tl.float16).to(tl.int16, bitcast=True)
    sign = first.to(tl.int16, bitcast=True) & -32768
    both_zero = ((made & 0x7FFF) == 0) & (first == 0) & (tl.load(entry + 6) > 0)
    made = tl.where(both_zero, made | sign, made)  # -0.0 of the base stays
    half = made.to(tl.float16, bitcast=True)
    if kind == 0:
        tl.store(out, half, mask=inside)
    elif kind == 1:
        tl.store(out, half.to(tl.float32), mask=inside)
    else:
        full = half.to(tl.float32).to(tl.int32, bitcast=True)
        tl.store(out, ((full + 0x7FFF + ((full >> 16) & 1)) >> 16).to(tl.int16), mask=inside)  # to even
    infinite = tl.max(tl.where(inside & ((made & 0x7FFF) >= 0x7C00), 1, 0), axis=0)
    # Below 2**28 float64 holds the sum, and no quotient but a midpoint is rounded to one: see `sums`.
    far = tl.where(tl.max(top, axis=0).to(tl.float64) * tl.load(number + 5) >= 268435456.0, 2, 0)
    told = tl.maximum(infinite, far)
    tl.atomic_max(said + row, told, mask=told > 0)


def streamed(parts: Sequence[Part], device: torch.device) -> Tensor:
    """The same for inputs in the host's memory: one stretch crosses the bus while the one before it is merged.

    Pinned inputs cross at full speed. Takes `2 * MOST_MODELS * STRETCH` halves of the device's memory.
    """
    said = torch.zeros(len(parts), dtype=torch.int32, device=device)
    slots = _slots(device, STRETCH)
    cuda = device.type == "cuda"
    here = torch.cuda.current_stream(device) if cuda else None
    crossing = torch.cuda.Stream(device) if cuda else None  # type: ignore[no-untyped-call]
    if here and crossing:
        crossing.wait_stream(here)
    free: list[torch.cuda.Event | None] = [None, None]
    for number, group in enumerate(_stretches(parts)):
        slot = slots[number % 2]
        if crossing and (before := free[number % 2]):
            crossing.wait_event(before)
        with torch.cuda.stream(crossing) if cuda else contextlib.nullcontext():
            pieces, at = [], 0
            for place, start, size in group:
                part = parts[place]
                there = tuple(slot[model, at : at + size] for model in range(len(part.inputs)))
                for target, source in zip(there, part.inputs, strict=True):
                    target.copy_(source[start : start + size], non_blocking=True)
                pieces.append(part.piece(start, there))
                at += -(-size // 8) * 8  # 16 bytes, what whole loads need
        if here and crossing:
            here.wait_stream(crossing)
        found = one_pass(pieces)
        index = torch.tensor([place for place, _, _ in group], device=device)
        said.scatter_reduce_(0, index, found, "amax")
        if here:
            free[number % 2] = here.record_event()
    return said


@functools.lru_cache(maxsize=2)
def _slots(device: torch.device, stretch: int) -> Tensor:
    """Where stretches of the inputs arrive, made once: (2, MOST_MODELS, stretch) halves. A device has one caller."""
    return torch.empty(2, MOST_MODELS, stretch, dtype=torch.float16, device=device)


def _stretches(parts: Sequence[Part]) -> Iterator[list[tuple[int, int, int]]]:
    """What crosses together: number of a part, first element, elements."""
    group: list[tuple[int, int, int]] = []
    filled = 0
    for place, part in enumerate(parts):
        start = 0
        while start < len(part.out):
            size = min(len(part.out) - start, STRETCH - filled)
            group.append((place, start, size))
            start, filled = start + size, filled + -(-size // 8) * 8
            if filled >= STRETCH:
                yield group
                group, filled = [], 0
    if group:
        yield group
