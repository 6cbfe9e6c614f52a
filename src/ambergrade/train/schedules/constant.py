"""A constant learning rate after a linear warmup."""

from __future__ import annotations


def factor(seen: int, total: int, *, warmup: int = 0) -> float:
    """Compute what multiplies the learning rate of the optimizer step that brings the images seen to `seen`.

    `warmup` counts images, so it does not depend on batch size or process count. The card's "100 steps of 128"
    are 12,800; its first step gets 1/100 of the rate (transformers' counter gives it 0, a lost step).

    >>> [factor(seen, 80, warmup=40) for seen in (10, 20, 40, 80)]
    [0.25, 0.5, 1.0, 1.0]
    """
    return min(1.0, seen / warmup) if warmup else 1.0
