"""DELLA's MagPrune: drop elements of a difference at random, small ones sooner, and rescale each by its own chance."""

from __future__ import annotations

import torch
from torch import Tensor

from ambergrade.errors import BadSetting
from ambergrade.merge.method import Context


def della(difference: Tensor, *, density: float, window: float, seed: int, context: Context) -> Tensor:
    """Section 2.1 of the paper: within each row of n elements, that of rank r (0 for the largest) is dropped with the
    chance p_min + window * r / n, where p_min is 1 - `density` - `window` / 2, and divided by the chance to be kept.
    """
    smallest, most = 1 - density - window / 2, 1 - density + window / 2
    if window < 0 or smallest < 0 or most >= 1:
        raise BadSetting(
            f"della(density={density}, window={window}): the chances to be dropped, {smallest:.3g} to {most:.3g}, "
            "must be within 0 and 1."
        )
    rows = difference.reshape(len(difference), -1) if difference.ndim > 1 else difference.reshape(1, -1)
    order = rows.abs().argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(rows.shape[1], device=order.device).expand_as(order))
    kept_chance = 1 - (smallest + window * rank.to(torch.float32) / rows.shape[1])
    kept = context.uniform(rows.shape, seed, device=rows.device) < kept_chance
    return (rows / kept_chance).where(kept, 0.0).reshape(difference.shape)
