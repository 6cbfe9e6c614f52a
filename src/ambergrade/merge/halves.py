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
"""Where sign, exponent and significand lie after moving by three bits: 0x8FFFE000."""
_SIGN = np.int32(-(1 << 31))
_INFINITE = 0x7C00


class Halves:
    """Sums chunk by chunk in buffers of its own: one for each thread."""

    def __init__(self) -> None:
        self._torch = sys.modules.get("torch")
        self._sums, self._wide, self._first = (np.empty(CHUNK, np.float32) for _ in range(3))
        self._bits, self._other = np.empty(CHUNK, np.int32), np.empty(CHUNK, np.int16)
        self._sizes, self._most, self._least = (np.empty(CHUNK, np.uint16) for _ in range(3))
        self._flags, self._spare = np.empty(CHUNK, np.bool_), np.empty(CHUNK // 2, np.int32)
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
        finite = True
        for start in range(0, len(out), CHUNK):
            part = slice(start, start + CHUNK)
            zeros = None if base is None else base[part]
            finite &= self._chunk(weights, [x[part] for x in xs], out[part], zeros, settle or _exactly(weights))
        return finite

    def _chunk(self, weights: Weights, xs: list[Array], out: Array, base: Array | None, settle: Settle) -> bool:
        n = len(out)
        if weights.short:
            self._magnitudes(xs, self._most[:n], self._least[:n])
            top = int(self._most[:n].max()) >> 1
        else:
            top = max(_largest(x) for x in xs)
        bound = float(np.uint16(top).view(np.float16)) * weights.size / weights.q
        doubtful: Array | None = None
        if bound < 65504 and (self._gradual or self._torch):  # else infinity, NaN, or near it
            doubtful = self._short(weights, xs, out) if weights.short else self._long(weights, xs, out, base)
        if doubtful is None or len(doubtful) > n >> 3:
            doubtful = np.arange(n)
        if len(doubtful):
            out[doubtful] = settle([x[doubtful] for x in xs])
            self._sign_zeros(doubtful, xs, out, base)
        return bound < 65504 or _largest(out) < _INFINITE

    def _short(self, weights: Weights, xs: list[Array], out: Array) -> Array | None:
        """Weights of few digits; returns where the sum may not be exact, and every place with a zero operand."""
        n = len(out)
        most, least, flags = self._most[:n], self._least[:n], self._flags[:n]
        spread = np.subtract(most, least, out=self._sizes[:n])
        # The sum is a multiple of the least one's ulp, and below 2**24 of them.
        binades = 13 - math.ceil(math.log2(weights.size))
        np.greater_equal(spread, max(binades, 0) << 11, out=flags)
        if int(least.min()) == 0:  # a zero's sign is seen to with the others
            np.logical_or(flags, least == 0, out=flags)
        doubtful = np.flatnonzero(flags) if flags.any() else np.empty(0, np.intp)
        if len(doubtful) > n >> 3:
            return None
        total = self._sums[:n]
        for number, (p, x) in enumerate(zip(weights.p, xs, strict=True)):
            self._added(x, p, total, first=number == 0)
        self._divided(total, weights.q, out)
        return doubtful

    def _long(self, weights: Weights, xs: list[Array], out: Array, base: Array | None) -> Array:
        """x[0] + sum(w[i] * (x[i] - x[0])) and a bound on its error; returns where that leaves the rounding open."""
        assert weights.affine, weights
        n = len(out)
        first, wide, total = self._first[:n], self._wide[:n], self._sums[:n]
        self._widened(xs[0], first)
        size = 0.0
        for number, (weight, x) in enumerate(zip(weights.exact[1:], xs[1:], strict=True)):
            self._widened(x, wide)
            np.subtract(wide, first, out=wide)
            size += abs(float(weight)) * self._farthest(wide)
            self._weighted(wide, float(weight), total, first=number == 0)
        largest = float(np.uint16(_largest(xs[0])).view(np.float16)) + size
        # Roundings of a difference, a weight, a product and the partial sums; then of the last sum and of the bounds.
        error = np.float32(2.0**-24 * 1.01 * ((len(xs) + 2) * size + 2 * largest) + 2.0**-60)
        np.add(total, first, out=total)
        np.subtract(total, error, out=wide)
        np.add(total, error, out=total)
        lower = self._other[:n]
        self._divided(wide, 1, lower)
        self._divided(total, 1, out)
        flags = np.not_equal(lower, out, out=self._flags[:n])
        if base is not None:
            np.logical_or(flags, base == -0x8000, out=flags)
        return np.flatnonzero(flags)

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

    def _added(self, x: Array, p: int, total: Array, *, first: bool) -> None:
        """total += p * x, or = for the first; without torch in its scale and order, see `_paired`."""
        wide = self._wide[: len(x)]
        if self._torch:
            target = self._torch.from_numpy(total)
            half = self._torch.from_numpy(x).view(self._torch.float16)
            if first:
                target.copy_(half).mul_(p)
            else:
                target.add_(self._torch.from_numpy(wide).copy_(half), alpha=p)
            return
        self._paired(x, wide)
        factor = np.float32(p) / _TINY
        if first:
            np.multiply(wide, factor, out=total)
        else:
            np.add(total, np.multiply(wide, factor, out=wide), out=total)

    def _farthest(self, wide: Array) -> float:
        """The largest magnitude."""
        if self._torch:
            low, high = self._torch.from_numpy(wide).aminmax()
            return max(float(high), -float(low))
        return max(float(wide.max()), -float(wide.min()))

    def _weighted(self, wide: Array, weight: float, total: Array, *, first: bool) -> None:
        """total += weight * wide, or = for the first."""
        if self._torch and not first:
            self._torch.from_numpy(total).add_(self._torch.from_numpy(wide), alpha=weight)
        elif first:
            np.multiply(wide, np.float32(weight), out=total)
        else:
            np.add(total, np.multiply(wide, np.float32(weight), out=wide), out=total)

    def _widened(self, x: Array, wide: Array) -> None:
        """fp32 values, in the order of `_paired`."""
        if self._torch:
            self._torch.from_numpy(wide).copy_(self._torch.from_numpy(x).view(self._torch.float16))
        else:
            self._paired(x, wide)
            np.multiply(wide, 1 / _TINY, out=wide)

    def _divided(self, total: Array, q: int, out: Array) -> None:
        """`out` becomes total / q, rounded to fp16."""
        if self._torch:
            quotient = self._torch.from_numpy(total)
            self._torch.from_numpy(out).view(self._torch.float16).copy_(quotient.div_(q) if q != 1 else quotient)
            return
        np.divide(total, np.float32(q) / _TINY, out=total)
        bits = total.view(np.int32)
        if len(out) % 2 == 0:
            self._narrow(bits, out.view(np.int32))
        else:  # the last one is by itself, between the lower halves and the upper ones
            half = len(out) // 2
            self._narrow(np.delete(bits, half), out[:-1].view(np.int32))
            last = np.empty(1, np.int32)
            self._narrow(bits[[half, half]], last)
            out[-1:] = last.view(np.int16)[:1]

    @staticmethod
    def _paired(x: Array, wide: Array) -> None:
        """The values of x times 2**-112, two halves at a time as one int32: first all lower ones, then the upper."""
        bits, half = wide.view(np.int32), len(x) // 2
        lower, upper = bits[: len(x) - half], bits[len(x) - half :]
        if len(x) % 2:
            lower[half] = np.int32(x[-1]) << 16
            x = x[:-1]
        pairs = x.view(np.int32)
        np.left_shift(pairs, 16, out=lower[:half])
        np.right_shift(lower, 3, out=lower)
        np.right_shift(pairs, 3, out=upper)
        np.bitwise_and(bits, _PLACES, out=bits)

    def _narrow(self, bits: Array, pairs: Array) -> None:
        """fp32 bits of values times 2**-112, lower halves first, to pairs of fp16: to nearest, ties to even."""
        half = len(pairs)
        kept, spare = self._bits[: 2 * half], self._spare[:half]
        np.right_shift(bits, 13, out=kept)
        np.bitwise_and(kept, 1, out=kept)
        np.add(kept, 0xFFF, out=kept)
        np.add(kept, bits, out=kept)
        np.right_shift(kept, 13, out=kept)
        np.left_shift(kept[half:], 16, out=pairs)
        np.bitwise_or(pairs, np.bitwise_and(kept[:half], 0x7FFF, out=spare), out=pairs)
        np.right_shift(bits[:half], 16, out=spare)
        np.bitwise_or(pairs, np.bitwise_and(spare, 0x8000, out=spare), out=pairs)
        np.bitwise_or(pairs, np.bitwise_and(bits[half:], _SIGN, out=spare), out=pairs)

    @staticmethod
    def _sign_zeros(where: Array, xs: list[Array], out: Array, base: Array | None) -> None:
        """A zero made of zeros alone is +0.0; any zero is -0.0 where the base is."""
        zero = where[(out[where] & 0x7FFF) == 0]
        if len(zero):
            out[zero[np.logical_and.reduce([(x[zero] & 0x7FFF) == 0 for x in xs])]] = 0
            if base is not None:
                out[zero[base[zero] == -0x8000]] = -0x8000


def _largest(x: Array) -> int:
    """The bits of the largest magnitude: among numbers of one sign, larger bits are larger."""
    return max(int(x.max()), int(x.view(np.uint16).max()) - 0x8000, 0)


def _exactly(weights: Weights) -> Settle:
    """Sums of light weights in float64, which holds them; for numbers beyond hundreds perhaps in fractions.

    The terms are whole multiples of 2**-24, and midpoints of 2**-25. So a quotient that is no midpoint is 2**-25 / Q
    from one, and below 2**28 / Q the rounding of the division, 2**-53 of it, does not reach that far.
    """
    assert weights.light, weights

    def settle(xs: list[Array]) -> Array:
        values = [x.view(np.float16).astype(np.float64) for x in xs]
        with np.errstate(over="ignore", invalid="ignore"):
            total = sum((p * x for p, x in zip(weights.p, values, strict=True)), np.zeros(len(xs[0])))
            rounded: Array = (total / weights.q).astype(np.float16)
            far = weights.size * np.maximum.reduce([np.abs(x) for x in values]) >= 2.0**28
        for place in np.flatnonzero(far & np.isfinite(total)) if not weights.short else ():
            rounded[place] = _nearest(
                sum((w * Fraction(float(x[place])) for w, x in zip(weights.exact, values, strict=True)), Fraction(0))
            )
        return rounded.view(np.int16)

    return settle


def _nearest(exact: Fraction) -> np.float16:
    """Of the fp16 around a float64 guess the one nearest to the fraction, and of two the even one."""
    guess = np.float16(min(max(float(exact), -65504.0), 65504.0)) if abs(exact) < 65520 else np.float16(float(exact))
    near = [guess, np.nextafter(guess, np.float16(np.inf)), np.nextafter(guess, np.float16(-np.inf))]
    finite = [value for value in near if np.isfinite(value)]
    return min(finite, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.uint16)) & 1), default=guess)
