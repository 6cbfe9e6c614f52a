"""Adafactor (Shazeer & Stern 2018) with the learning rate given: two vectors of state for a matrix, not two copies.

A matrix and a vector are stepped as by transformers' Adafactor with `scale_parameter=False, relative_step=False`. A
convolution differs: here it is the matrix of its filters, (out, in · kernel), where transformers, timm and torch factor
the kernel's two axes and keep 6 numbers for the 9 weights of a 3 x 3 kernel: 0.96 GB for the convolutions of SDXL's
UNet instead of 1.5 MB. The state is fp32 whatever the weights are, and bf16 weights are rounded stochastically.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ambergrade.train.rounding import Rounded

ROUNDS_STOCHASTICALLY = True


def optimizer(
    groups: list[dict[str, Any]],
    *,
    decay: float = 0.8,
    clip_threshold: float = 1.0,
    eps: float = 1e-30,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """Make an optimizer of the groups (`params`, `lr`, `decayed`), without momentum and without relative step sizes.

    `decay`: β₂ of step t is 1 - t^-decay (section 7.2); `clip_threshold`: largest root mean square of an update
    (algorithm 4); `seed` keys the rounding.
    """
    defaults = {"decay": decay, "clip": clip_threshold, "eps": eps, "weight_decay": weight_decay, "seed": seed}
    return Adafactor(groups, defaults)


class Adafactor(Rounded):
    def moved(self, value: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        return value.sub_(group["lr"] * _update(gradient, state, group))


def _update(gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    matrix = gradient.flatten(1) if gradient.ndim > 1 else gradient  # a convolution is a matrix of its filters
    squared = matrix.square() + group["eps"]
    if matrix.ndim > 1 and "rows" not in state:
        state["rows"], state["columns"] = torch.zeros_like(squared[:, 0]), torch.zeros_like(squared[0])
    elif matrix.ndim == 1 and "square" not in state:
        state["square"] = torch.zeros_like(squared)
    weight = float(state["step"]) ** -group["decay"]  # 1 - β₂
    if matrix.ndim > 1:
        rows = state["rows"].lerp_(squared.mean(dim=1), weight)
        columns = state["columns"].lerp_(squared.mean(dim=0), weight)
        update = matrix * (rows / rows.mean()).rsqrt()[:, None] * columns.rsqrt()[None]
    else:
        update = matrix * state["square"].lerp_(squared, weight).rsqrt()
    clipped: Tensor = update / (update.square().mean().sqrt() / group["clip"]).clamp(min=1)
    return clipped.view_as(gradient)
