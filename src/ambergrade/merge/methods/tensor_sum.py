"""Tensor sum: a band of rows of one model in the place of the other's."""

from __future__ import annotations

from torch import Tensor

from ambergrade.errors import BadSetting
from ambergrade.merge.method import Context
from ambergrade.merge.selection import part_of, require_fraction


def tensor_sum(x: Tensor, y: Tensor, *, width: float, offset: float, context: Context) -> Tensor:
    """`x`, but `y` in the rows from `offset` on, as many as `width` says: both are fractions of the first axis. The
    band goes on at the first row where it runs over the last."""
    require_fraction("tensor_sum", "width", width)
    if not 0 <= offset < 1:
        raise BadSetting(f"tensor_sum(offset={offset}): offset is a fraction of the rows, from 0 to below 1.")
    if x.ndim == 0:
        return y.clone() if width == 1 else x.clone()
    rows = len(x)
    start, end = int(part_of(rows, offset)), int(part_of(rows, offset, width))
    merged = x.clone()
    merged[start : min(end, rows)] = y[start : min(end, rows)]
    merged[: max(0, end - rows)] = y[: max(0, end - rows)]
    return merged
