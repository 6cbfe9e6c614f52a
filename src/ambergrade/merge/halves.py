"""Weighted sums of fp16 weights on the CPU, exact and rounded once, in single precision and without torch.

With whole weights P and Q of a few digits (`Weights.short`) the sum of P[i] * x[i] is exact in fp32, in any order and
fused or not, wherever the operands of an element lie within some binades of each other; so it is for nearly all
elements of related models. The quotient by Q is then rounded to fp32 and to fp16, which is one rounding: a quotient of
such numbers that is no midpoint of fp16 is farther from it than fp32's half step. With more digits, differences are
weighted and added to the first operand; a bound on the error tells the elements whose rounding is in doubt.

The elements that neither way decides are worked out in float64, or by the caller. A correctly rounded result is unique,
so no way of computing it changes a bit.

fp16 is converted by integer operations, or by torch where that is imported already (its import takes half a gigabyte).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np

from ambergrade.merge.weights import Weights

CHUNK = 1 << 16
"""Elements worked on at a time: all buffers stay in a core's cache."""
Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
Settle: TypeAlias = "Callable[[list[Array]], Array]"
"""From operands, as int16 bits, to their correctly rounded sum, as int16 bits."""
_TINY = np.float32(2.0**-112)
"""An fp16's bits, moved into those of an fp32, are the value times this."""
_PLACES = np.int32(-0x70002000)
"""Where the sign, exponent and significand of an int16 lie as int32 after moving by 13 bits: 0x8FFFE000."""
_INFINITE, _MOST = 0x7C00, 65504
"""Of fp16: the bits of infinity, and the largest number."""


class Halves:
    """Sums chunk by chunk in buffers of its own: one for each thread."""

    def __init__(self) -> None:
        self._torch = sys.modules.get("torch")
        self._sums, self._wide, self._first = (np.empty(CHUNK, np.float32) for _ in range(3))
        self._bits, self._other = np.empty(CHUNK, np.int32), np.empty(CHUNK, np.int16)
        self._flags = np.empty(CHUNK, np.bool_)
        # Memory that is used for other things later, so that all of it stays in a core's cache.
        self._most, self._least = self._wide.view(np.uint16).reshape(2, CHUNK)
        self._sizes, self._sign = self._bits.view(np.uint16)[:CHUNK], self._first.view(np.int32)
        # A library that has the processor flush subnormal fp32 numbers to zero takes fp16's with them.
        self._gradual = bool(np.full(1, 2.0**-136, np.float32) * np.float32(2.0**112))

    def combine(
        self,
        weights: Weights,
        xs: Sequence[Array],
        out: Array,
        base: Array | None = None,
        settle: Settle | None = None,
    ) -> bool:
        """`out` becomes the weighted sum of flat fp16 arrays (as int16 bits, as `out` is), correctly rounded.

        Where the result is zero it is -0.0 if `base` is, so that merging a model with itself changes no bit. `settle`
        works out the few elements in doubt; it must be given for weights that are not light, and those must sum to 1.
        Returns whether all of `out` is finite.
        """
        finite, settle = True, settle or _exactly(weights)
        for start in range(0, len(out), CHUNK):
            part = slice(start, start + CHUNK)
            zeros = None if base is None else base[part]
            finite &= self._chunk(weights, [x[part] for x in xs], out[part], zeros, settle)
        return finite

    def _chunk(self, weights: Weights, xs: list[Array], out: Array, base: Array | None, settle: Settle) -> bool:
        doubtful, bound = self._short(weights, xs, out) if weights.short else self._long(weights, xs, out, base)
        if doubtful is None or len(doubtful) > len(out) >> 3:
            doubtful = np.arange(len(out))
        if len(doubtful):
            out[doubtful] = settle([x[doubtful] for x in xs])
            self._sign_zeros(doubtful, xs, out, base)
        return bound < _MOST or _largest(out) < _INFINITE

    def _short(self, weights: Weights, xs: list[Array], out: Array) -> tuple[Array | None, float]:
        """Weights of few digits; returns where the sum may not be exact, and every place with a zero operand.

        None is everywhere; and a bound on the result.
        """
        n = len(out)
        most, least, flags = self._most[:n], self._least[:n], self._flags[:n]
        self._magnitudes(xs, most, least)
        bound = _value(int(most.max()) >> 1) * weights.size / weights.q
        if not (bound < _MOST and (self._gradual or self._torch)):  # infinity, NaN, or near it
            return None, math.inf
        spread = np.subtract(most, least, out=self._sizes[:n])
        # The sum is a multiple of the least one's ulp, and below 2**24 of them.
        binades = 13 - math.ceil(math.log2(weights.size))
        np.greater_equal(spread, max(binades, 0) << 11, out=flags)
        if int(least.min()) == 0:  # a zero's sign is seen to with the others
            np.logical_or(flags, least == 0, out=flags)
        doubtful = np.flatnonzero(flags) if flags.any() else np.empty(0, np.intp)
        if len(doubtful) > n >> 3:
            return None, bound
        total, wide, other = self._sums[:n], self._wide[:n], self._first[:n]
        unit = np.float32(1) if self._torch else _TINY
        for number, (factor, members) in enumerate(weights.groups):  # one multiplication serves for each group
            target = wide if number else total
            for place, member in enumerate(members):
                self._spread(xs[member], other if place else target)
                if place:
                    np.add(target, other, out=target)
            np.multiply(target, np.float32(factor) / unit, out=target)
            if number:
                np.add(total, wide, out=total)
        self._divided(total, weights.q, out)
        return doubtful, bound

    def _long(self, weights: Weights, xs: list[Array], out: Array, base: Array | None) -> tuple[Array | None, float]:
        """x[0] + sum(w * (x[i] - x[j])) and a bound on its error; returns where that leaves the rounding open.

        None is everywhere; and a bound on the result.
        """
        n = len(out)
        first, wide, total, other = self._first[:n], self._wide[:n], self._sums[:n], self._bits[:n].view(np.float32)
        reach = _value(_largest(xs[0]))
        if not (reach < _MOST and (self._gradual or self._torch)):
            return None, math.inf
        self._widened(xs[0], first)
        size = 0.0
        with np.errstate(invalid="ignore"):  # infinity less infinity is found below
            for number, (weight, i, j) in enumerate(weights.differences):
                self._widened(xs[i], wide)
                if j:
                    self._widened(xs[j], other)
                np.subtract(wide, other if j else first, out=wide)
                far = max(float(wide.max()), -float(wide.min()))
                if not far + (_value(_largest(xs[j])) if j else reach) < _MOST:
                    return None, math.inf
                size += abs(weight) * far
                self._weighted(wide, weight, total, first=number == 0)
        # Roundings of a difference, a weight, a product and the partial sums; then of the last sum and of the bounds.
        error = np.float32(2.0**-24 * 1.01 * ((len(xs) + 2) * size + 2 * (reach + size)) + 2.0**-60)
        np.add(total, first, out=total)
        np.subtract(total, error, out=wide)
        np.add(total, error, out=total)
        lower = self._other[:n]
        self._divided(wide, 1, lower)
        self._divided(total, 1, out)
        flags = np.not_equal(lower, out, out=self._flags[:n])
        if base is not None and int(base.min()) == -0x8000:
            np.logical_or(flags, base == -0x8000, out=flags)
        return np.flatnonzero(flags), reach + size + float(error)

    def _magnitudes(self, xs: list[Array], most: Array, least: Array) -> None:
        """Of each element the largest and the smallest operand, as bits without the sign, times two."""
        sizes = self._sizes[: len(most)]
        if len(xs) == 1:
            xs = [*xs, *xs]
        for number, x in enumerate(xs):
            bits = x.view(np.uint16)
            if number == 0:
                np.add(bits, bits, out=most)
            else:
                np.add(bits, bits, out=sizes)
                np.minimum(most if number == 1 else least, sizes, out=least)
                np.maximum(most, sizes, out=most)

    # --- between fp16 and fp32, either way of computing

    def _weighted(self, wide: Array, weight: float, total: Array, *, first: bool) -> None:
        """total += weight * wide, or = for the first."""
        if self._torch and not first:
            self._torch.from_numpy(total).add_(self._torch.from_numpy(wide), alpha=weight)
        elif first:
            np.multiply(wide, np.float32(weight), out=total)
        else:
            np.add(total, np.multiply(wide, np.float32(weight), out=wide), out=total)

    def _widened(self, x: Array, wide: Array) -> None:
        """fp32 values."""
        self._spread(x, wide)
        if not self._torch:
            np.multiply(wide, 1 / _TINY, out=wide)

    def _spread(self, x: Array, wide: Array) -> None:
        """fp32 values in a unit: 1 with torch, 2**-112 without."""
        if self._torch:
            self._torch.from_numpy(wide).copy_(self._torch.from_numpy(x).view(self._torch.float16))
            return
        bits = wide.view(np.int32)
        np.copyto(bits, x)
        np.left_shift(bits, 13, out=bits)
        np.bitwise_and(bits, _PLACES, out=bits)

    def _divided(self, total: Array, q: int, out: Array) -> None:
        """`out` becomes total / q, rounded to fp16."""
        if self._torch:
            quotient = self._torch.from_numpy(total)
            self._torch.from_numpy(out).view(self._torch.float16).copy_(quotient.div_(q) if q != 1 else quotient)
            return
        np.divide(total, np.float32(q) / _TINY, out=total)
        self._narrow(total.view(np.int32), out)

    def _narrow(self, bits: Array, out: Array) -> None:
        """fp32 bits of values times 2**-112 to fp16: to nearest, ties to even."""
        kept, sign = self._bits[: len(out)], self._sign[: len(out)]
        np.right_shift(bits, 13, out=kept)
        np.bitwise_and(kept, 1, out=kept)
        np.add(kept, 0xFFF, out=kept)
        np.add(kept, bits, out=kept)
        np.right_shift(kept, 13, out=kept)  # 15 bits, three zeros, and the sign
        np.right_shift(kept, 3, out=sign)
        np.bitwise_and(sign, 0x8000, out=sign)
        np.bitwise_or(kept, sign, out=kept)
        np.copyto(out, kept, casting="unsafe")

    @staticmethod
    def _sign_zeros(where: Array, xs: list[Array], out: Array, base: Array | None) -> None:
        """A zero made of zeros alone is +0.0; any zero is -0.0 where the base is."""
        zero = where[(out[where] & 0x7FFF) == 0]
        if len(zero):
            out[zero[np.logical_and.reduce([(x[zero] & 0x7FFF) == 0 for x in xs])]] = 0
            if base is not None:
                out[zero[base[zero] == -0x8000]] = -0x8000


def _value(bits: int) -> float:
    return float(np.uint16(bits).view(np.float16))


def _largest(x: Array) -> int:
    """The bits of the largest magnitude: among numbers of one sign, larger bits are larger."""
    return max(int(x.max()), int(x.view(np.uint16).max()) - 0x8000, 0)


def _exactly(weights: Weights) -> Settle:
    """Sums of light weights in float64, which holds them; for numbers beyond hundreds perhaps in fractions.

    The terms are whole multiples of 2**-24, and midpoints of 2**-25. So a quotient that is no midpoint is 2**-25 / Q
    from one, and below 2**28 / Q the rounding of the division, 2**-53 of it, does not reach that far.
    """
    assert weights.light, weights

    factors = np.array(weights.p, np.float64)

    def settle(xs: list[Array]) -> Array:
        values = _wide(np.stack(xs))
        with np.errstate(over="ignore", invalid="ignore"):
            total = np.add.reduce(factors[:, None] * values, axis=0) + 0.0  # nothing but zeros is +0.0
            rounded: Array = (total / weights.q).astype(np.float16)
            if not weights.size * max(float(values.max()), -float(values.min())) < 2.0**28:
                far = weights.size * np.maximum.reduce(np.abs(values)) >= 2.0**28
                for place in np.flatnonzero(far & np.isfinite(total)) if not weights.short else ():
                    terms = (w * Fraction(float(x)) for w, x in zip(weights.exact, values[:, place], strict=True))
                    rounded[place] = _nearest(sum(terms, Fraction(0)))
        return rounded.view(np.int16)

    return settle


def _wide(bits: Array) -> Array:
    """fp16 as float64."""
    if torch := sys.modules.get("torch"):
        values: Array = torch.from_numpy(bits).view(torch.float16).double().numpy()
        return values
    return bits.view(np.float16).astype(np.float64)


def _nearest(exact: Fraction) -> np.float16:
    """Of the fp16 around a float64 guess the one nearest to the fraction, and of two the even one."""
    guess = np.float16(min(max(float(exact), -65504.0), 65504.0)) if abs(exact) < 65520 else np.float16(float(exact))
    near = [guess, np.nextafter(guess, np.float16(np.inf)), np.nextafter(guess, np.float16(-np.inf))]
    finite = [value for value in near if np.isfinite(value)]
    return min(finite, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.uint16)) & 1), default=guess)
