"""Train difference: add what `tuned` learnt from `origin`, less where `base` is already close to `tuned`."""

from __future__ import annotations

from torch import Tensor

from ambergrade.merge.method import Context


def train_difference(base: Tensor, tuned: Tensor, origin: Tensor, *, weight: float, context: Context) -> Tensor:
    """base + 1.8 * weight * (tuned - origin) * |tuned - base| / (|tuned - origin| + |tuned - base|)."""
    learnt, apart = tuned - origin, (tuned - base).abs()
    total = learnt.abs() + apart
    share = (apart / total).where(total > 0, 0.0)
    return base + 1.8 * weight * (share * learnt)
