"""Weighted sums of tensors of any dtypes on any device, equal to exact arithmetic rounded once.

A linear formula comes to one rational weight per model, `sum(P[i] * x[i]) / Q` with whole P and Q. On the CPU fp16,
bf16 and fp32 go to `sums`. Elsewhere the elements whose rounding an error bound leaves open are decided by exact
comparison with the midpoint, at last by fractions. A correctly rounded result is unique, so threads, chunks, SIMD width
and device cannot change a bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ambergrade.family.dtypes import DTYPES, torch_dtypes, words
from ambergrade.merge.checks import finite
from ambergrade.merge.kernel import FORMATS
from ambergrade.merge.sums import combine
from ambergrade.merge.weights import Weights

_DIGITS = {torch_dtypes()[word]: dtype.digits for word, dtype in DTYPES.items()}
"""Stored bits of the significand."""
WORDS = words()
CHUNK = 1 << 16
_EIGHTHS = {torch.float8_e4m3fn, torch.float8_e5m2}
_SMALL = {torch.float16, *_EIGHTHS}
"""Whole multiples of 2**-24 below 2**17."""


class Combiner:
    """Weighted sums chunk by chunk in buffers of its own: one for each thread."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._sum = torch.empty(CHUNK, dtype=torch.float64, device=self.device)
        self._wide = torch.empty(CHUNK, dtype=torch.float64, device=self.device)
        self._single = torch.empty(CHUNK, dtype=torch.float32, device=self.device)

    def combine(self, weights: Weights, tensors: Sequence[Tensor], out: Tensor, base: Tensor | None = None) -> bool:
        """`out` becomes the weighted sum of flat tensors of any float dtypes, correctly rounded to its dtype.

        Where the result is zero and `base` is -0.0, it is -0.0, so that merging a model with itself changes no bit.
        Returns whether all of `out` is finite. float64 results may be an ulp off; all others are exact.
        """
        if self.device.type == "cpu":
            tensors = [x.half() if x.dtype in _EIGHTHS else x for x in tensors]  # fp16 holds all of theirs
            if all(WORDS[x.dtype] in FORMATS for x in (*tensors, out)):
                return _summed(weights, tensors, out, base)
        return self._general(weights, tensors, out, base)

    def _general(self, weights: Weights, tensors: Sequence[Tensor], out: Tensor, base: Tensor | None) -> bool:
        sound = True
        pieces = [x.split(CHUNK) for x in (*tensors, out, *(() if base is None else (base,)))] if len(out) else []
        for piece in zip(*pieces, strict=True):
            xs, rest = list(piece[: len(tensors)]), piece[len(tensors) :]
            sound &= self._chunk(weights, xs, rest[0], rest[1] if base is not None else None)
        return sound

    def finite(self, x: Tensor) -> bool:
        """Whether all of a flat float tensor is finite."""
        if self.device.type != "cpu":
            return bool(x.isfinite().all())
        return finite(WORDS[x.dtype], x.detach().view(torch.uint8).numpy())

    def _chunk(self, weights: Weights, xs: list[Tensor], out: Tensor, base: Tensor | None) -> bool:
        total = self._weighted(weights.scaled[0], xs)
        quotient = (total / weights.scaled[1]).add_(0.0)  # a sum of nothing but zeros is +0.0
        if out.dtype == torch.float64 or self._exact(weights, xs):
            out.copy_(_rounded(quotient, out.dtype))
        else:
            self._careful(weights, xs, total, quotient, out)
        if base is not None:
            _sign_zeros(out, base)
        return math.isfinite(float(out.float().abs().amax())) if len(out) else True

    def _exact(self, weights: Weights, xs: list[Tensor]) -> bool:
        """Whether float64 holds the sum, and no quotient but a midpoint is rounded to a midpoint.

        The terms are whole multiples of the smallest ulp, and midpoints of half the result's own: one that is missed is
        missed by that over Q at least, which is more than the rounding of the division while Q is no huge number.
        """
        if weights.short and all(x.dtype in _SMALL for x in xs):
            return True
        if weights.q >= 2**24:
            return False
        top, ulp = 0.0, math.inf
        for x in xs:
            largest, least = _magnitudes(x)
            top, ulp = max(top, largest), min(ulp, least * 2.0 ** -(_DIGITS[x.dtype] + 1))
        return weights.size * top < ulp * 2.0**52

    def _weighted(self, factors: Sequence[float], xs: list[Tensor], *, magnitudes: bool = False) -> Tensor:
        """The sum in float64 of factor * x, or of their magnitudes."""
        n = len(xs[0])
        total, wide, single = self._sum[:n], self._wide[:n], self._single[:n]
        if magnitudes:
            total = torch.empty_like(total)
        for number, (factor, x) in enumerate(zip(factors, xs, strict=True)):
            target = wide if number else total
            # float16 to float64 in one step is three times slower than in two
            target.copy_(x if x.dtype in (torch.float32, torch.float64) else single.copy_(x))
            if magnitudes:
                target.abs_()
                factor = abs(factor)
            if number:
                total.add_(wide, alpha=factor)
            elif factor != 1:
                total.mul_(factor)
        return total

    def _careful(self, weights: Weights, xs: list[Tensor], total: Tensor, quotient: Tensor, out: Tensor) -> None:
        """Round, and settle what the error bound leaves open."""
        total = total.clone()  # the buffer is used again below
        error = self._weighted(weights.scaled[0], xs, magnitudes=True)
        error.mul_((len(xs) + 2) * 2.0**-52 / weights.scaled[1])
        low, high = _rounded(quotient - error, out.dtype), _rounded(quotient + error, out.dtype)
        out.copy_(low)
        # What is not finite stays so, and is refused by name later.
        unsure = torch.nonzero((low != high) & torch.isfinite(total)).reshape(-1).cpu().numpy()
        self._settle(weights, xs, total, out, unsure)

    def _settle(
        self, weights: Weights, xs: list[Tensor], total: Tensor, out: Tensor, where: np.ndarray[Any, Any]
    ) -> None:
        """Decide the elements at `where` by exact comparison with the midpoint between the two nearest numbers."""
        if not len(where):
            return
        index = torch.from_numpy(where).to(out.device)
        values = [x[index].double().cpu().numpy() for x in xs]
        n = total[index].cpu().numpy()
        factors, divisor, whole = weights.scaled
        with np.errstate(over="ignore", invalid="ignore"):
            size = np.sum([np.abs(f * v) for f, v in zip(factors, values, strict=True)], axis=0)
            error = (size * (len(xs) + 2) * 2.0**-52 + np.abs(n) * 2.0**-52) / divisor
            low = _rounded(torch.from_numpy(n / divisor - error), out.dtype)
            high = _rounded(torch.from_numpy(n / divisor + error), out.dtype)
        lows, highs = _as_finite(low), _as_finite(high)
        # All partial sums are multiples of the smallest ulp: below 2**52 of them the sum is exact.
        ulps = [
            np.where(v == 0, np.inf, np.abs(v)) * 2.0 ** -(_DIGITS[x.dtype] + 1)
            for v, x in zip(values, xs, strict=True)
        ]
        sure = (size < np.min(ulps, axis=0) * 2.0**52) & whole & (divisor < 2**28)
        gap = highs - lows
        next_up = _as_finite(torch.nextafter(low, torch.full_like(low, math.inf)) if _DIGITS[out.dtype] > 3 else high)
        adjacent = (gap == 0) | (next_up == highs)
        middle = lows / 2 + highs / 2
        side = np.sign(n - middle * divisor)
        for place in np.flatnonzero(~(sure & adjacent)):
            if gap[place] == 0:
                continue
            truth = sum(
                (w * Fraction(float(v[place])) for w, v in zip(weights.exact, values, strict=True)), Fraction(0)
            )
            if not adjacent[place]:
                lows[place], highs[place] = _neighbours(truth, out.dtype)
                middle[place] = lows[place] / 2 + highs[place] / 2
            side[place] = (truth > Fraction(middle[place])) - (truth < Fraction(middle[place]))
        even = _even(torch.from_numpy(lows), out.dtype)
        chosen = np.where((side < 0) | ((side == 0) & even), lows, highs)
        chosen = np.where(lows == highs, lows, chosen)
        settled = torch.from_numpy(chosen).to(out.dtype)
        signs = torch.from_numpy(np.where(chosen == 0, n, chosen))  # a tiny negative sum rounds to -0.0
        out[index] = torch.copysign(settled.double(), signs).to(out.dtype).to(out.device)


def _summed(weights: Weights, tensors: Sequence[Tensor], out: Tensor, base: Tensor | None) -> bool:
    """On the CPU, by `sums`."""
    assert out.is_contiguous(), out.stride()
    mine = None if base is None else (base.data_ptr(), base.dtype)
    place = next((i for i, x in enumerate(tensors) if (x.data_ptr(), x.dtype) == mine), None)
    dtypes, xs = [WORDS[x.dtype] for x in tensors], [_bits(x) for x in tensors]
    sound = combine(weights, dtypes, xs, WORDS[out.dtype], _bits(out), base=place)
    if base is not None and place is None:
        _sign_zeros(out, base)
    return sound


def _bits(x: Tensor) -> np.ndarray[Any, Any]:
    """A flat tensor's memory, or where it has gaps a copy, as whole numbers."""
    kind = torch.int16 if x.element_size() == 2 else torch.int32
    bits: np.ndarray[Any, Any] = x.detach().contiguous().view(kind).numpy()
    return bits


def _sign_zeros(out: Tensor, base: Tensor) -> None:
    """A zero is -0.0 where the base is."""
    zeros = ~(out != 0)  # torch's == is ten times slower than its !=
    if bool(zeros.any()):
        wide = base.double()
        negative = zeros & (wide == 0) & torch.signbit(wide)
        if out.dtype in _EIGHTHS:  # torch fills these with nothing
            out.view(torch.uint8)[negative] = 0x80
        else:
            out[negative] = -0.0


def _magnitudes(x: Tensor) -> tuple[float, float]:
    """The largest one, and the smallest that is not zero; the former is infinity or NaN where any is."""
    size = x.double().abs()
    return float(size.max()), float(torch.where(size > 0, size, math.inf).min())


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 to `dtype` in one correct rounding (torch's own goes through float32 and rounds twice)."""
    if dtype == torch.float64:
        return x
    single = x.float()
    if dtype == torch.float32:
        return single
    # Round to odd in float32, which keeps more than two bits beyond `dtype`: Boldo and Melquiond 2008, theorem 3.
    wide, bits = single.double(), single.view(torch.int32)
    odd = torch.from_numpy(bits.numpy() & 1) if bits.device.type == "cpu" else bits & 1  # numpy's is ten times faster
    open_ones = (wide != x) & (odd != 1) & (wide.abs() < math.inf)
    away = (x.abs() > wide.abs()).int().mul_(2).sub_(1)  # sign and magnitude: one more is one further from zero
    return (bits + away.mul_(open_ones)).view(torch.float32).to(dtype)


def _as_finite(x: Tensor) -> np.ndarray[Any, Any]:
    """float64 values; infinity becomes the number that would follow the largest."""
    info = torch.finfo(x.dtype)
    wide = x.double()
    beyond = info.max * (1 + 2.0 ** -(_DIGITS[x.dtype] + 1)) if x.dtype != torch.float64 else math.inf
    following = 2.0 ** math.ceil(math.log2(beyond)) if math.isfinite(beyond) else math.inf
    return torch.where(wide.abs() > info.max, torch.copysign(torch.full_like(wide, following), wide), wide).numpy()


def _neighbours(truth: Fraction, dtype: torch.dtype) -> tuple[float, float]:
    """The two numbers of `dtype` around a fraction."""
    info = torch.finfo(dtype)
    size, sign = abs(truth), -1 if truth < 0 else 1
    smallest = Fraction(info.smallest_normal)
    exponent = 0
    unit = smallest
    while unit * 2 <= size:
        unit *= 2
        exponent += 1
    ulp = unit / 2 ** _DIGITS[dtype]
    lower = size // ulp * ulp
    near, far = float(lower) * sign, float(lower + ulp) * sign
    return min(near, far), max(near, far)


def _even(x: Tensor, dtype: torch.dtype) -> np.ndarray[Any, Any]:
    """Whether the last stored bit of each value in `dtype` is 0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    stored = x.to(dtype)
    return ((stored.view(kinds[stored.element_size()]) & 1) == 0).numpy()
