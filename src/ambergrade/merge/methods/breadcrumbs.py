"""Model breadcrumbs: of a difference, mask the outliers as well as the small elements."""

from __future__ import annotations

import torch
from torch import Tensor

from ambergrade.errors import BadSetting
from ambergrade.merge.method import Context
from ambergrade.merge.selection import magnitude_at, require_fraction


def breadcrumbs(difference: Tensor, *, smallest: float, largest: float, context: Context) -> Tensor:
    """Section 3 of the paper, for one layer: the mask that drops the `smallest` fraction, its beta, and the `largest`,
    1 - gamma. Elements of one magnitude share one fate: kept, where the threshold falls on them."""
    require_fraction("breadcrumbs", "smallest", smallest)
    require_fraction("breadcrumbs", "largest", largest)
    if smallest + largest >= 1:
        raise BadSetting(f"breadcrumbs(smallest={smallest}, largest={largest}) keeps nothing: together below 1.")
    count = difference.numel()
    low = min(int(smallest * count), count - 1)
    high = max(count - int(largest * count), low + 1)
    size = difference.abs()
    kept = (size >= magnitude_at(difference, low + 1)) & (size <= magnitude_at(difference, high))
    return torch.where(kept, difference, 0.0)
