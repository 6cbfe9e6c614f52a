"""Which elements of a tensor are large: shared by the methods that drop some of a difference.

Fractions are counts of elements: weights in 16 bits have many equal magnitudes, so a threshold would keep too many. Of
equal ones the earlier counts as the larger.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from ambergrade.errors import BadSetting


def require_fraction(method: str, name: str, value: float, *, above_zero: bool = False) -> None:
    """Raise BadSetting unless `value` is between 0 and 1, both allowed (0 not, where `above_zero`)."""
    if not (0 < value <= 1 if above_zero else 0 <= value <= 1):
        raise BadSetting(
            f"{method}({name}={value}): {name} is a fraction {'above 0 and up to' if above_zero else '0 to'} 1."
        )


def part_of(count: int, *fractions: float) -> Fraction:
    """The sum of decimal fractions of a count, exactly: 0.1 is one tenth.

    >>> int(part_of(10, 0.7, 0.1)), int(10 * (0.7 + 0.1))
    (8, 7)
    """
    return count * sum((Fraction(repr(float(fraction))) for fraction in fractions), Fraction(0))


def are_largest(x: Tensor, count: int) -> Tensor:
    """Where the `count` elements of largest magnitude are, as booleans in the shape of `x`.

    A selection: no sums, so the same on any processor.

    >>> are_largest(torch.tensor([1.0, -3.0, 3.0, 3.0]), 2)
    tensor([False,  True,  True, False])
    """
    if count <= 0 or count >= x.numel():
        return torch.full_like(x, count > 0, dtype=torch.bool)
    size = x.reshape(-1).abs()
    least = size.kthvalue(len(size) - count + 1).values
    found = size > least
    ties = torch.nonzero(size == least).reshape(-1)
    found[ties[: count - int(found.sum())]] = True
    return found.reshape(x.shape)


def largest(x: Tensor, density: float) -> Tensor:
    """`x` where its magnitude is among the largest `density` of all (at least one element), 0 elsewhere.

    >>> largest(torch.tensor([0.1, -3.0, 2.0, -0.2]), 0.5)
    tensor([ 0., -3.,  2.,  0.])
    """
    return x.where(are_largest(x, max(1, round(part_of(x.numel(), density)))), x.new_zeros(()))
