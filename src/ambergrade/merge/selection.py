"""Which elements of a tensor are large: shared by the methods that drop some of a difference."""

from __future__ import annotations

from torch import Tensor

from ambergrade.errors import BadSetting


def require_fraction(method: str, name: str, value: float, *, above_zero: bool = False) -> None:
    """Raise BadSetting unless `value` is between 0 and 1, both allowed (0 not, where `above_zero`)."""
    if not (0 < value <= 1 if above_zero else 0 <= value <= 1):
        raise BadSetting(
            f"{method}({name}={value}): {name} is a fraction {'above 0 and up to' if above_zero else '0 to'} 1."
        )


def magnitude_at(x: Tensor, rank: int) -> Tensor:
    """The `rank`-th smallest magnitude of all elements, counted from 1. A selection: no sums, so the same anywhere."""
    return x.reshape(-1).abs().kthvalue(rank).values


def largest(x: Tensor, density: float) -> Tensor:
    """`x` where its magnitude is among the largest `density` of all (at least one), 0 elsewhere; ties are all kept.

    >>> import torch
    >>> largest(torch.tensor([0.1, -3.0, 2.0, -0.2]), 0.5)
    tensor([ 0., -3.,  2.,  0.])
    """
    count = max(1, round(density * x.numel()))
    return x.where(x.abs() >= magnitude_at(x, x.numel() - count + 1), x.new_zeros(()))
