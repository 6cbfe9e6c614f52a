"""Weighted sums of weights of any dtypes, equal to exact arithmetic rounded once.

A linear formula comes to one rational weight per model, `sum(P[i] * x[i]) / Q` with whole P and Q. Weights of a few
digits over fp16 go to `halves`. Where exactness is not certain beforehand (many digits, bf16, fp32) the elements whose
rounding an error bound leaves open are decided by exact comparison with the midpoint, at last by fractions. A correctly
rounded result is unique, so threads, chunks, SIMD width and device cannot change a bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ambergrade.merge.halves import CHUNK, Halves
from ambergrade.merge.weights import Weights

_DIGITS = {
    torch.float64: 52,
    torch.float32: 23,
    torch.float16: 10,
    torch.bfloat16: 7,
    torch.float8_e4m3fn: 3,
    torch.float8_e5m2: 2,
}
"""Stored bits of the significand."""
_SMALL = {torch.float16, torch.float8_e4m3fn, torch.float8_e5m2}
"""Whole multiples of 2**-24 below 2**17."""


class Combiner:
    """Weighted sums chunk by chunk in buffers of its own: one for each thread."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._sum = torch.empty(CHUNK, dtype=torch.float64, device=self.device)
        self._wide = torch.empty(CHUNK, dtype=torch.float64, device=self.device)
        self._single = torch.empty(CHUNK, dtype=torch.float32, device=self.device)
        self._magnitude, self._flag = np.empty(CHUNK, np.int16), np.empty(CHUNK, np.bool_)
        self._spare = np.empty(CHUNK, np.int32)
        self._halves = Halves()

    def combine(self, weights: Weights, tensors: Sequence[Tensor], out: Tensor, base: Tensor | None = None) -> bool:
        """`out` becomes the weighted sum of flat tensors of any float dtypes, correctly rounded to its dtype.

        Where the result is zero and `base` is -0.0, it is -0.0, so that merging a model with itself changes no bit.
        Returns whether all of `out` is finite. float64 results may be an ulp off; all others are exact.
        """
        halves = self.device.type == "cpu" and all(x.dtype == torch.float16 for x in (*tensors, out))
        if halves and (weights.light or weights.affine):
            old = None if base is None else _zeros_of(base)
            settle = None if weights.light else functools.partial(self._settled, weights)
            return self._halves.combine(weights, [_bits(x) for x in tensors], _bits(out), old, settle)
        finite = True
        pieces = [x.split(CHUNK) for x in (*tensors, out, *(() if base is None else (base,)))] if len(out) else []
        for piece in zip(*pieces, strict=True):
            xs, rest = list(piece[: len(tensors)]), piece[len(tensors) :]
            finite &= self._chunk(weights, xs, rest[0], rest[1] if base is not None else None)
        return finite

    def _settled(self, weights: Weights, xs: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """The elements that `halves` leaves open, weights of any digits."""
        tensors = [torch.from_numpy(x).view(torch.float16) for x in xs]
        out = torch.empty_like(tensors[0])
        self._chunk(weights, tensors, out, None)
        return _bits(out)

    def finite(self, x: Tensor) -> bool:
        """Whether all of a flat float tensor is finite."""
        if self.device.type != "cpu":
            return bool(x.isfinite().all())
        for start in range(0, x.numel(), CHUNK):
            part = x[start : start + CHUNK]
            if self.device.type == "cpu" and x.dtype == torch.float16:
                if int(self._sizes(part).max()) >= 0x7C00:
                    return False
            elif not math.isfinite(float(part.float().abs().amax() if x.dtype != torch.float64 else part.abs().amax())):
                return False
        return True

    def _chunk(self, weights: Weights, xs: list[Tensor], out: Tensor, base: Tensor | None) -> bool:
        halves = self.device.type == "cpu" and all(x.dtype == torch.float16 for x in (*xs, out))
        if halves:
            error = self._error(weights, xs)
            if error <= 2.0**-46 * weights.scaled[1]:
                return self._half(weights, xs, out, base, error)
        total = self._weighted(weights.scaled[0], xs)
        quotient = (total / weights.scaled[1]).add_(0.0)  # a sum of nothing but zeros is +0.0
        if out.dtype == torch.float64 or self._exact(weights, xs):
            out.copy_(_rounded(quotient, out.dtype))
        else:
            self._careful(weights, xs, total, quotient, out)
        if base is not None:
            zeros = ~(out != 0)  # torch's == is ten times slower than its !=
            if bool(zeros.any()):
                wide = base.double()
                out[zeros & (wide == 0) & torch.signbit(wide)] = -0.0
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

    # --- fp16 to fp16 on the CPU

    def _error(self, weights: Weights, xs: list[Tensor]) -> float:
        """A bound on the error of the sum in float64, 0 where it is exact.

        Up to 2**-46 of the divisor it is below 4 fp32 ulps at every fp16 midpoint, the smallest of which is 2**-25.
        """
        most = max(int(self._sizes(x).max()) for x in xs)
        top = float(np.array(most, np.int16).view(np.float16))
        factors, divisor, whole = weights.scaled
        size = sum(map(abs, factors)) * top
        if whole and max(size, divisor) < 2.0**28:
            return 0.0  # all terms are multiples of 2**-24, and no partial sum has more than 53 bits
        return (len(xs) + 2) * 2.0**-51 * size

    def _sizes(self, x: Tensor) -> np.ndarray[Any, Any]:
        """Magnitudes as whole numbers, in the order of the values."""
        sizes = self._magnitude[: len(x)]
        np.bitwise_and(x.view(torch.int16).numpy(), np.int16(0x7FFF), out=sizes)
        return sizes

    def _half(self, weights: Weights, xs: list[Tensor], out: Tensor, base: Tensor | None, error: float) -> bool:
        """`error` bounds that of the sum; 0 where it is exact."""
        factors, divisor, _ = weights.scaled
        total = self._weighted(factors, xs)
        single = self._single[: len(out)]
        # The reciprocal's error is far below fp32's half ulp, so what is a midpoint arrives on it.
        single.copy_(torch.mul(total, 1 / divisor, out=self._wide[: len(out)]))
        out.copy_(single)
        sizes = self._sizes(out)
        if len(out) == 0:
            return True
        smallest, largest = int(sizes.min()), int(sizes.max())
        open_ones = self._decided(single.view(torch.int32).numpy(), total, divisor, out, error)
        self._settle(weights, xs, total, out, open_ones)
        if smallest == 0:
            zeros = np.flatnonzero(np.equal(sizes, 0, out=self._flag[: len(out)]))
            _bits(out)[zeros[total.numpy()[zeros] == 0]] = 0  # a sum of nothing but zeros is +0.0
            if base is not None:
                _bits(out)[zeros[_zeros_of(base)[zeros] == -0x8000]] = -0x8000
        return largest < 0x7C00

    def _decided(
        self, bits: np.ndarray[Any, Any], total: Tensor, divisor: float, out: Tensor, error: float
    ) -> np.ndarray[Any, Any]:
        """Round what lies near a midpoint to the side that float64 is sure of; returns where it is not sure."""
        spare = self._spare[: len(bits)]
        np.bitwise_and(np.add(bits, np.int32(4), out=spare), np.int32(0xFFF), out=spare)
        where = np.flatnonzero(np.less_equal(spare, 8, out=self._flag[: len(bits)]))
        where = where[_near_midpoint(bits[where], window=4)]
        middle = ((bits[where] + np.int32(4)) & np.int32(~0xFFF)).view(np.float32)
        sums, scaled = total.numpy()[where], middle.astype(np.float64) * divisor
        # Below 2**-14 all midpoints are the odd multiples of 2**-25.
        tiny = np.abs(middle) < 2.0**-14
        steps = np.floor(np.abs(sums[tiny]) / divisor * 2.0**24)
        scaled[tiny] = np.copysign((steps + 0.5) * 2.0**-24 * divisor, sums[tiny])
        beside = sums - scaled
        side = np.where(beside > 0, np.inf, -np.inf).astype(np.float32)
        rounded = np.where(beside == 0, middle, np.nextafter(middle, side))  # a tie goes to the even one below
        farther = np.abs(sums) > np.abs(scaled)
        ahead = np.where(beside == 0, 0.5, farther)
        rounded[tiny] = np.copysign((steps + ahead[tiny]) * 2.0**-24, sums[tiny])
        sure = np.full(len(where), True) if error == 0 else np.abs(beside) > error + np.abs(scaled) * 2.0**-51
        out.view(torch.int16).numpy()[where[sure]] = torch.from_numpy(rounded[sure]).half().view(torch.int16).numpy()
        left: np.ndarray[Any, Any] = where[~sure]
        return left

    # --- anything else

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


def _magnitudes(x: Tensor) -> tuple[float, float]:
    """The largest one, and the smallest that is not zero; the former is infinity or NaN where any is."""
    if x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16, torch.float32):
        kind = torch.int16 if x.element_size() == 2 else torch.int32
        bits = x.contiguous().view(kind).numpy()  # among numbers of one sign, larger bits are larger
        sizes = bits & np.iinfo(bits.dtype).max
        largest = int(sizes.max())
        sizes -= 1
        least = int(sizes.view(f"u{x.element_size()}").min()) + 1  # zero has become the largest of all
        found = torch.tensor([largest, min(least, np.iinfo(bits.dtype).max)], dtype=kind).view(x.dtype).tolist()
        return found[0], found[1] if least <= largest else math.inf
    size = x.double().abs()
    return float(size.max()), float(torch.where(size > 0, size, math.inf).min())


def _bits(x: Tensor) -> np.ndarray[Any, Any]:
    """A flat fp16 tensor's own memory, as int16."""
    bits: np.ndarray[Any, Any] = x.detach().view(torch.int16).numpy()
    return bits


def _zeros_of(base: Tensor) -> np.ndarray[Any, Any]:
    """fp16 bits in which -0.0 stands where it stands in `base`."""
    if base.dtype == torch.float16:
        return _bits(base)
    return ((base == 0) & torch.signbit(base.float())).numpy() * np.int16(-0x8000)


def _near_midpoint(bits: np.ndarray[Any, Any], *, window: int) -> np.ndarray[Any, Any]:
    """Whether fp32 values, as bits, lie within `window` ulps of where fp16 changes; subnormal ones may be in doubt."""
    shifted = bits + np.int32(window)
    near = (shifted & 0xFFF) <= 2 * window
    found = np.flatnonzero(near)
    representable = ((shifted[found] & 0x1000) == 0) & ((shifted[found] & 0x7FFFFFFF) >= 0x38800000)  # 2**-14
    near[found[representable]] = False
    return near


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
