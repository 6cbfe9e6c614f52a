"""Model breadcrumbs: of a difference, mask the outliers as well as the small elements."""

from __future__ import annotations

from torch import Tensor

from ambergrade.errors import BadSetting
from ambergrade.merge.method import Context
from ambergrade.merge.selection import are_largest, part_of, require_fraction


def breadcrumbs(difference: Tensor, *, smallest: float, largest: float, context: Context) -> Tensor:
    """Section 3 of the paper, for one layer: the mask that drops the `smallest` fraction, its beta, and the `largest`,
    1 - gamma; at least one element stays."""
    require_fraction("breadcrumbs", "smallest", smallest)
    require_fraction("breadcrumbs", "largest", largest)
    if part_of(1, smallest, largest) >= 1:
        raise BadSetting(f"breadcrumbs(smallest={smallest}, largest={largest}) keeps nothing: together below 1.")
    count = difference.numel()
    above = int(part_of(count, largest))
    below = min(int(part_of(count, smallest)), count - above - 1)
    kept = are_largest(difference, count - below) & ~are_largest(difference, above)
    return difference.where(kept, 0.0)
