"""Weighted sums of fp16, bf16 and fp32 weights on the CPU: the exact value rounded once, without torch.

`kernel` sums in float64. All fp16 are multiples of 2**-24, so with whole weights of up to six digits over one divisor
float64 holds their sum, and no quotient but a midpoint is rounded to one: a plain pass is exact. For other weights and
dtypes a careful pass bounds each element's error; the few whose rounding it leaves open are worked out in doubled
precision, at last by fractions. A correctly rounded result is unique, so threads, cuts and processors change no bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from ambergrade.merge.checks import Array, finite, numbers
from ambergrade.merge.kernel import FORMATS, Format, kernel
from ambergrade.merge.weights import Weights

STRETCH = 1 << 16
"""Elements of a careful pass: as many flags."""


def combine(
    weights: Weights, dtypes: Sequence[str], xs: Sequence[Array], dtype: str, out: Array, *, base: int | None = None
) -> bool:
    """`out` becomes the weighted sum of flat arrays, correctly rounded; returns whether all of it is finite.

    The arrays hold the bits of their dtypes ("F16", "BF16" or "F32"). Where the result is zero it is -0.0 if operand
    number `base` is, so that merging a model with itself changes no bit; else it has the sign of the sum.
    """
    order = sorted(range(len(xs)), key=lambda number: number != base)  # the kernel looks at the first one's zeros
    ordered = Weights(tuple(weights.exact[number] for number in order)) if base else weights
    kinds, operands = tuple(dtypes[number] for number in order), [xs[number] for number in order]
    if {*kinds, dtype} == {"F16"} and weights.light:
        plain = kernel(kinds, dtype, careful=False)
        said = plain.combine(ordered.p, ordered.q, operands, out, signed=base is not None)
        reach = weights.size * float(np.uint16(said.largest).view(np.float16))
        if not said.finite or weights.short or reach < 2.0**28:
            return said.finite
    return _careful(ordered, kinds, operands, dtype, out, signed=base is not None)


def _careful(
    weights: Weights, kinds: tuple[str, ...], xs: Sequence[Array], dtype: str, out: Array, *, signed: bool
) -> bool:
    """Any weights and dtypes: with a bound on each element's error."""
    whole = weights.q < 2**24 and weights.size < 2**53
    factors = weights.p if whole else tuple(map(float, weights.exact))
    divisor = weights.q if whole else 1
    # Roundings of the weights, the products, the sums and the quotient, each 2**-53; four times as much, so that what
    # the kernel takes for the power of two beyond the largest number is looked at as well.
    error = (len(xs) + 4) * 2.0**-51 / divisor
    # The sum is a multiple of the least operand's ulp. Below 2**51 of them it is exact, and a quotient that is no
    # midpoint is farther from one than the division rounds.
    exact = 2.0 ** (51 - max(FORMATS[kind].digits for kind in kinds) - 1) if whole else 0.0
    flags, careful, sound = np.empty(min(STRETCH, len(out)), np.bool_), kernel(kinds, dtype, careful=True), True
    for start in range(0, len(out), STRETCH):
        part = slice(start, start + STRETCH)
        pieces, target = [x[part] for x in xs], out[part]
        raised = flags[: len(target)]
        said = careful.combine(factors, divisor, pieces, target, signed=signed, flags=raised, error=error, exact=exact)
        if said.doubts:
            _settle(weights, kinds, pieces, dtype, target, np.flatnonzero(raised), signed=signed)
        sound &= said.finite or (said.doubts and finite(dtype, target.view(np.uint8)))
    return sound


def _settle(
    weights: Weights, kinds: Sequence[str], xs: Sequence[Array], dtype: str, out: Array, where: Array, *, signed: bool
) -> None:
    """Some elements, each near a midpoint: by its distance in doubled precision, and where that is open by fractions.

    0.1 + 0.2 prints 0.30000000000000004: so weights of many digits lie near to tenths, and sums near to many midpoints.
    """
    form = FORMATS[dtype]
    values = np.array([numbers(kind, x[where].view(np.uint8)) for kind, x in zip(kinds, xs, strict=True)])
    sound = np.isfinite(values).all(axis=0)  # what is not finite stays so, and is refused later
    where, values = where[sound], values[:, sound]
    words = out.view(f"u{form.bits // 8}")
    bits, sure = _beside_midpoints(weights, values, form)
    for place in np.flatnonzero(~sure):
        row = values[:, place]
        truth = sum((w * Fraction(float(x)) for w, x in zip(weights.exact, row, strict=True)), Fraction(0))
        bits[place] = nearest(truth, form)
    if signed:
        bits[(bits == 0) & (values[0] == 0) & np.signbit(values[0])] = form.sign
    words[where] = bits


def _beside_midpoints(weights: Weights, values: Array, form: Format) -> tuple[Array, Array]:
    """The bits of sums of `values` (operand by element, finite), and where they are sure.

    The sum less the midpoint that float64's guess is nearest to, as two float64: the products with the weights' first
    26 digits are exact, the errors of their additions are kept (Knuth's TwoSum), the rest is small.
    """
    parts = [_split(weight) for weight in weights.exact]
    guess = np.add.reduce([sum(part) * x for part, x in zip(parts, values, strict=True)])
    exponent = np.where(guess == 0, form.least, np.maximum(np.frexp(guess)[1] - 1, form.least))
    ulp = np.ldexp(1.0, exponent - form.digits)
    below = np.floor(np.abs(guess) / ulp)
    middle = np.copysign((below + 0.5) * ulp, guess)
    total, rest, size = -middle, np.zeros_like(guess), np.zeros_like(guess)
    for (first, second, third), x in zip(parts, values, strict=True):
        product = first * x
        before, total = total, total + product
        shadow = total - before
        lost = (before - (total - shadow)) + (product - shadow)
        for term in (lost, second * x, third * x):
            rest, size = rest + term, size + np.abs(term)
    distance = total + rest
    error = size * (4 * len(values) + 4) * 2.0**-53 + np.abs(distance) * 2.0**-50
    sure = (np.abs(distance) > error) & (np.abs(distance) < ulp / 2)
    farther = (distance > 0) == (guess > 0)
    # A word that is too large for the dtype is infinity's.
    word = (exponent.astype(np.int64) - form.least << form.digits) + below.astype(np.int64) + farther
    return np.minimum(word, form.infinity) | np.where(guess < 0, form.sign, 0), sure


def _split(weight: Fraction) -> tuple[float, float, float]:
    """Three floats that add up to it: of 26 digits, of 26, and what a float holds of the rest."""
    found: list[float] = []
    for _ in range(2):
        digits, exponent = math.frexp(float(weight))
        found.append(math.ldexp(round(math.ldexp(digits, 26)), exponent - 26))
        weight -= Fraction(found[-1])
    return found[0], found[1], float(weight)


def nearest(exact: Fraction, form: Format) -> int:
    """The bits of the nearest number, of two the even one; infinity's beyond the largest."""
    size, sign = abs(exact), form.sign if exact < 0 else 0
    if not size:
        return 0
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > size
    exponent = max(exponent, form.least)
    digits = round(size / Fraction(2) ** (exponent - form.digits))  # of two the even one
    return sign | min(((exponent - form.least) << form.digits) + digits, form.infinity)
