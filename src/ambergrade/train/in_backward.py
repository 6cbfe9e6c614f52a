"""Steps weights during the backward pass: each as soon as its gradient is whole, which is then freed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class StepsInBackward:
    """Hooks every trained weight, so that `optimizer` steps it alone (LOMO, Lv et al. 2023, section 3.1).

    The optimizer's state and the numbers are those of an ordinary step: no update of ours looks at another tensor. What
    needs the whole gradient at once, a clip by its norm or a sum over passes, is not possible.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.norms: dict[int, Tensor] = {}
        """Norm of each gradient since the last `norm`, by the tensor's number."""
        number = 0
        self.hooks = []
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                hook = _Hook(self, group, number)
                self.hooks.append(parameter.register_post_accumulate_grad_hook(hook))
                number += 1

    def norm(self) -> Tensor:
        """Return the norm of the whole gradient since the last call."""
        parts = torch.stack([self.norms[number] for number in sorted(self.norms)])
        self.norms = {}
        found: Tensor = torch.linalg.vector_norm(parts)
        return found

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


class _Hook:
    def __init__(self, steps: StepsInBackward, group: dict[str, Any], number: int) -> None:
        self.steps, self.group, self.number = steps, group, number

    @torch.no_grad()
    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        optimizer = self.steps.optimizer
        self.steps.norms[self.number] = torch.linalg.vector_norm(parameter.grad)
        groups = optimizer.param_groups
        # `before` keeps the tensor's number, by which stochastic rounding is keyed
        optimizer.param_groups = [{**self.group, "params": [parameter], "before": self.number}]
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
        parameter.grad = None
