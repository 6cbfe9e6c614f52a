"""Spherical interpolation: along the arc between two tensors' directions instead of the chord."""

from __future__ import annotations

import math

from torch import Tensor

from ambergrade.merge.method import Context
from ambergrade.merge.reduce import dot

PARALLEL = 1e-6
"""Radians from 0 or pi within which the arc is taken for the chord: there the arc's formula loses its digits."""


def slerp(x: Tensor, y: Tensor, *, t: float, context: Context) -> Tensor:
    """sin((1 - t) A) / sin A * x + sin(t A) / sin A * y, with the angle A between the flattened tensors."""
    lengths = math.sqrt(dot(x, x)) * math.sqrt(dot(y, y))
    cosine = max(-1.0, min(1.0, dot(x, y) / lengths)) if lengths else 1.0
    angle = math.acos(cosine)
    if min(angle, math.pi - angle) < PARALLEL:
        return x + t * (y - x)
    return math.sin((1 - t) * angle) / math.sin(angle) * x + math.sin(t * angle) / math.sin(angle) * y
