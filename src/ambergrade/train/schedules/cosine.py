"""Linear warmup, then half a cosine down (Loshchilov & Hutter 2017, equation 5, one cycle)."""

from __future__ import annotations

import math


def factor(seen: int, total: int, *, warmup: int = 0, floor: float = 0.0) -> float:
    """Compute what multiplies the rate of the optimizer step that brings the images seen to `seen` of `total`.

    `warmup` counts images; `floor` is the fraction of the peak that is left at the end.

    >>> [round(factor(seen, 100, warmup=20, floor=0.1), 3) for seen in (10, 20, 60, 100)]
    [0.5, 1.0, 0.55, 0.1]
    """
    if seen < warmup:
        return seen / warmup
    progress = (seen - warmup) / max(1, total - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2
