"""Lion (Chen et al. 2023, algorithm 2): the sign of a mixed momentum.

With fp32 weights it steps as timm's Lion does. With bf16 weights the momentum is still fp32, where timm and others keep
it in bf16, and the weights are rounded stochastically: signs of small momenta, and with them steps, may differ.
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
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.1,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """Make an optimizer of the groups (`params`, `lr`, `decayed`); decay spares groups that are not `decayed`."""
    return Lion(groups, {"betas": tuple(betas), "weight_decay": weight_decay, "seed": seed})


class Lion(Rounded):
    def moved(self, value: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        beta_1, beta_2 = group["betas"]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(value)
        direction = state["exp_avg"].lerp(gradient, 1 - beta_1).sign_()
        state["exp_avg"].lerp_(gradient, 1 - beta_2)
        return value.sub_(group["lr"] * direction)
