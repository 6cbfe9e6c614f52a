"""Lion (Chen et al. 2023, algorithm 2): the sign of a mixed momentum.

With fp32 weights it steps as timm's Lion does. With bf16 weights the momentum is still fp32, where timm and others keep
it in bf16, and the weights are rounded stochastically: signs of small momenta, and with them steps, may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ambergrade.train.rounding import numbered, write_back

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


class Lion(torch.optim.Optimizer):
    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group, number, parameter, gradient, state in numbered(self):
            beta_1, beta_2 = group["betas"]
            shrink = group["lr"] * group["weight_decay"] if group["decayed"] else 0.0
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            direction = state["exp_avg"].lerp(gradient, 1 - beta_1).sign_()
            state["exp_avg"].lerp_(gradient, 1 - beta_2)
            value = parameter.float() * (1 - shrink) - group["lr"] * direction
            write_back(parameter, value, group["seed"], number, int(state["step"]))
