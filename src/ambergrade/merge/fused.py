"""Linear merges on a GPU in one pass over memory: every input read once, the result written straight where it lives.

Whole weights over one divisor in float64, exact for fp16 with weights of few digits, one division, one rounding to odd
on the way to fp16: the exact value rounded once, as on the CPU (`halves`). So its bits are the CPU's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ambergrade.errors import BadSetting
from ambergrade.merge.weights import Weights

MOST_MODELS = 4
BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(x0, x1, x2, x3, out, bad, n, p0, p1, p2, p3, q, count: tl.constexpr, block: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < n
    first = tl.load(x0 + place, mask=inside, other=0.0)
    total = first.to(tl.float64) * p0
    if count > 1:
        total += tl.load(x1 + place, mask=inside, other=0.0).to(tl.float64) * p1
    if count > 2:
        total += tl.load(x2 + place, mask=inside, other=0.0).to(tl.float64) * p2
    if count > 3:
        total += tl.load(x3 + place, mask=inside, other=0.0).to(tl.float64) * p3
    exact = (total + 0.0) / q  # a sum of nothing but zeros is +0.0
    single = exact.to(tl.float32)
    wide = single.to(tl.float64)
    bits = single.to(tl.int32, bitcast=True)
    # Round to odd: an inexact fp32 with an even last bit goes one step towards the exact value.
    away = tl.where((exact > wide) == (single > 0), 1, -1)
    odd = tl.where((exact != wide) & ((bits & 1) == 0) & (wide != 0), bits + away, bits)
    half = odd.to(tl.float32, bitcast=True).to(tl.float16)
    sign = first.to(tl.int16, bitcast=True) & -32768
    kept = half.to(tl.int16, bitcast=True)
    both_zero = ((kept & 0x7FFF) == 0) & (first == 0)
    kept = tl.where(both_zero, kept | sign, kept)  # -0.0 of the base stays
    tl.atomic_max(bad, tl.max(tl.where(inside & ((kept & 0x7FFF) >= 0x7C00), 1, 0), axis=0))
    tl.store(out + place, kept.to(tl.float16, bitcast=True), mask=inside)


def combine(weights: Weights, inputs: Sequence[Tensor], out: Tensor, bad: Tensor) -> None:
    """`out` becomes the weighted sum of flat fp16 tensors on one device; `inputs[0]` is the base.

    `bad`, one int32, becomes 1 where the result is not finite; read it when the pass is done. Raises BadSetting for
    weights of too many digits, other dtypes, or more than MOST_MODELS inputs: those go the general way.
    """
    fits = weights.short and 1 <= len(inputs) <= MOST_MODELS and len(weights.p) == len(inputs)
    if not fits or any(x.dtype != torch.float16 for x in (*inputs, out)):
        raise BadSetting(
            f"One fused pass takes up to {MOST_MODELS} fp16 inputs and weights of few digits; "
            f"found {len(inputs)} of {', '.join(sorted({str(x.dtype) for x in inputs}))} and divisor {weights.q}.\n"
            "Merge on the CPU, which has the same bits."
        )
    filled = [*inputs, *[inputs[0]] * (MOST_MODELS - len(inputs))]
    factors = [float(p) for p in weights.p] + [0.0] * (MOST_MODELS - len(inputs))
    grid = (-(-out.numel() // BLOCK),)
    _kernel[grid](*filled, out, bad, out.numel(), *factors, float(weights.q), len(inputs), BLOCK)
