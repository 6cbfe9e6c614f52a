"""DARE: drop elements of a difference at random and rescale the rest, so that its expectation stays."""

from __future__ import annotations

from torch import Tensor

from ambergrade.merge.method import Context
from ambergrade.merge.selection import require_fraction


def dare(difference: Tensor, *, density: float, seed: int, context: Context) -> Tensor:
    """Equation 3 of the paper; its drop rate p is 1 - `density`."""
    require_fraction("dare", "density", density, above_zero=True)
    kept = context.uniform(difference.shape, seed, device=difference.device) < density
    return (difference / density).where(kept, 0.0)
