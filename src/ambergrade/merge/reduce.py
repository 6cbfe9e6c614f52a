"""Sums whose bits do not depend on threads, SIMD width or device: halves are added elementwise, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def total(x: Tensor) -> float:
    """The sum of all elements, in float64, always in the same order.

    >>> total(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    10.0
    """
    flat = x.reshape(-1).double()
    while len(flat) > 1:
        half = (len(flat) + 1) // 2
        upper = flat[half:]
        flat = torch.cat([flat[: len(upper)] + upper, flat[len(upper) : half]])
    return float(flat[0]) if len(flat) else 0.0


def dot(x: Tensor, y: Tensor) -> float:
    """The inner product of all elements; the products are exact in float64 for fp32 tensors."""
    return total(x.double() * y.double())
