"""Weighted sums of fp16, bf16 and fp32 weights on the CPU: the exact value rounded once, without torch.

`kernel` sums in float64. All fp16 are multiples of 2**-24, so with whole weights of up to six digits over one divisor
float64 holds their sum, and no quotient but a midpoint is rounded to one: a plain pass is exact. For other weights and
dtypes a careful pass bounds each element's error; the few whose rounding it leaves open are worked out by fractions.
A correctly rounded result is unique, so threads, cuts and processors change no bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import numpy as np

from ambergrade.merge.kernel import FORMATS, Format, kernel
from ambergrade.merge.weights import Weights

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
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
    # Roundings of the weights, the products, the sums and the quotient, each half of 2**-52.
    error = (len(xs) + 4) * 2.0**-52 / divisor
    # The sum is a multiple of the least operand's ulp. Below 2**51 of them it is exact, and a quotient that is no
    # midpoint is farther from one than the division rounds.
    exact = 2.0 ** (51 - max(FORMATS[kind].digits for kind in kinds) - 1) if whole else 0.0
    flags, careful, finite = np.empty(min(STRETCH, len(out)), np.bool_), kernel(kinds, dtype, careful=True), True
    for start in range(0, len(out), STRETCH):
        part = slice(start, start + STRETCH)
        pieces, target = [x[part] for x in xs], out[part]
        raised = flags[: len(target)]
        said = careful.combine(factors, divisor, pieces, target, signed=signed, flags=raised, error=error, exact=exact)
        finite &= said.finite
        if said.doubts:
            _settle(weights, kinds, pieces, dtype, target, np.flatnonzero(raised), signed=signed)
    return finite


def _settle(
    weights: Weights, kinds: Sequence[str], xs: Sequence[Array], dtype: str, out: Array, where: Array, *, signed: bool
) -> None:
    """Some elements by fractions."""
    form = FORMATS[dtype]
    values = np.array([_values(kind, x[where]) for kind, x in zip(kinds, xs, strict=True)])
    words = out.view(f"u{form.bits // 8}")
    for place, row in zip(where.tolist(), values.T, strict=True):
        if np.isfinite(row).all():
            truth = sum((w * Fraction(float(x)) for w, x in zip(weights.exact, row, strict=True)), Fraction(0))
            bits = nearest(truth, form)
            negative = signed and bits == 0 and row[0] == 0 and np.signbit(row[0])
            words[place] = bits | form.sign if negative else bits


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


def _values(dtype: str, bits: Array) -> Array:
    """As float64."""
    wide: Array
    if dtype == "F16":
        wide = bits.view(np.float16)
    elif dtype == "F32":
        wide = bits.view(np.float32)
    else:
        wide = (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return wide.astype(np.float64)
