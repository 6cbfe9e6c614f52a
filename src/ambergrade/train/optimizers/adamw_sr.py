"""AdamW (Loshchilov & Hutter 2019) whose bf16 weights are rounded stochastically; its moments are fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ambergrade.train.rounding import Rounded

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


class AdamWSR(Rounded):
    def moved(self, value: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> Tensor:
        beta_1, beta_2 = group["betas"]
        if "exp_avg" not in state:
            state["exp_avg"] = torch.zeros_like(value)
            state["exp_avg_sq"] = torch.zeros_like(value)
        step = int(state["step"])
        state["exp_avg"].lerp_(gradient, 1 - beta_1)
        state["exp_avg_sq"].mul_(beta_2).addcmul_(gradient, gradient, value=1 - beta_2)
        root = (state["exp_avg_sq"] / (1 - beta_2**step)).sqrt_().add_(group["eps"])
        return value.addcdiv_(state["exp_avg"], root, value=-group["lr"] / (1 - beta_1**step))
