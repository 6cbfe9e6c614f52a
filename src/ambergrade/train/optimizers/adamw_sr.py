"""AdamW (Loshchilov & Hutter 2019) whose bf16 weights are rounded stochastically; its moments are fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ambergrade.train.rounding import numbered, write_back

ROUNDS_STOCHASTICALLY = True


def optimizer(
    groups: list[dict[str, Any]],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    seed: int = 0,
) -> torch.optim.Optimizer:
    """Make an optimizer of the groups (`params`, `lr`, `decayed`); decay spares groups that are not `decayed`.

    `seed` keys the rounding. With fp32 weights it is plain AdamW.
    """
    return AdamWSR(groups, {"betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "seed": seed})


class AdamWSR(torch.optim.Optimizer):
    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group, number, parameter, gradient, state in numbered(self):
            beta_1, beta_2 = group["betas"]
            decay = group["lr"] * group["weight_decay"] if group["decayed"] else 0.0
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            step = int(state["step"])
            state["exp_avg"].lerp_(gradient, 1 - beta_1)
            state["exp_avg_sq"].mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
            root = (state["exp_avg_sq"] / (1 - beta_2**step)).sqrt_().add_(group["eps"])
            value = parameter.float() * (1 - decay)
            value.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta_1**step))
            write_back(parameter, value, group["seed"], number, step)
