"""TIES: trim each model's difference from the base, elect a sign for each element, average those that have it."""

from __future__ import annotations

import torch
from torch import Tensor

from ambergrade.merge.method import Context
from ambergrade.merge.selection import largest, require_fraction


def ties(base: Tensor, *models: Tensor, density: float, weight: float, context: Context) -> Tensor:
    """Algorithm 1 of the paper: k is `density`, lambda is `weight`."""
    require_fraction("ties", "density", density, above_zero=True)
    trimmed = [largest(model - base, density) for model in models]
    total = torch.zeros_like(base)
    for difference in trimmed:
        total = total + difference
    elected, total, count = total.sign(), torch.zeros_like(base), torch.zeros_like(base)
    for difference in trimmed:
        agrees = (difference.sign() == elected) & (difference != 0)
        total = total + difference.where(agrees, 0.0)
        count = count + agrees
    return base + weight * (total / count.clamp(min=1))
