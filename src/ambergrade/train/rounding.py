"""Lets bf16 weights learn by stochastic rounding, and tells how much plain rounding would lose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ambergrade.identity import random_seed

Group = dict[str, Any]
State = dict[str, Any]


class Rounded(torch.optim.Optimizer):
    """An optimizer that gives each parameter its new fp32 value by itself, and stores it by `write_back`.

    Its groups' defaults hold `weight_decay`, for groups that are `decayed`, and `seed`, which keys the rounding.
    """

    def __init__(self, groups: list[Group], defaults: Mapping[str, Any]) -> None:
        super().__init__(groups, dict(defaults))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group, number, parameter, gradient, state in numbered(self):
            shrink = group["lr"] * group["weight_decay"] if group["decayed"] else 0.0
            value = self.moved(parameter.float() * (1 - shrink), gradient, group, state)
            write_back(parameter, value, group["seed"], number, int(state["step"]))

    def moved(self, value: Tensor, gradient: Tensor, group: Group, state: State) -> Tensor:
        """The value, already decayed, after this step; `state["step"]` counts from 1."""
        raise NotImplementedError


def numbered(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Group, int, Tensor, Tensor, State]]:
    """Yield (group, number, parameter, fp32 gradient, state) of all that have a gradient; the state counts a step more.

    Numbers count all parameters from 1 and key their rounding; a group's `before` says how many came before it.
    """
    number = 0
    for group in optimizer.param_groups:
        number = group.get("before", number)
        for parameter in group["params"]:
            number += 1
            if parameter.grad is not None:
                state = optimizer.state[parameter]
                state["step"] = state.get("step", torch.zeros((), dtype=torch.int64)) + 1
                yield group, number, parameter, parameter.grad.float(), state


@torch.no_grad()
def write_back(parameter: Tensor, value: Tensor, seed: int, *item: int) -> None:
    """Store fp32 `value` in `parameter`; into bf16 it is rounded up or down with the chance of its distance.

    The expectation is then `value` itself (Gupta et al. 2015, section 3). The draw is keyed by (seed, item), so a
    resumed run rounds alike.
    """
    if parameter.dtype != torch.bfloat16:
        parameter.copy_(value)
        return
    draw = torch.Generator(parameter.device).manual_seed(random_seed(seed, "rounding", *item))
    bits = value.float().contiguous().view(torch.int32)
    # bf16 is the upper half of fp32: a random lower half carries into the upper with the right chance
    low = torch.randint(0, 1 << 16, bits.shape, generator=draw, device=bits.device, dtype=torch.int32)
    parameter.copy_(((bits + low) & -65536).view(torch.float32))


@torch.no_grad()
def lost_share(parameters: Iterable[Tensor], rate: float) -> float:
    """Measure the share of the weights for which a step of size `rate`, as Adam makes it, is rounded away in bf16.

    A step is lost below half the spacing of bf16 numbers there: 2^(exponent of w - 8).
    """
    lost = total = 0
    for parameter in parameters:
        _, exponent = torch.frexp(parameter.detach().float())  # |w| = m · 2^exponent, m in 0.5 … 1
        half_spacing = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - 9)
        lost += int(((rate < half_spacing) & (parameter != 0)).sum())
        total += parameter.numel()
    return lost / max(1, total)
