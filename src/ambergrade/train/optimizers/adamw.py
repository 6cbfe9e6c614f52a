"""AdamW (Loshchilov & Hutter 2019) in fp32: torch's own."""

from __future__ import annotations

from typing import Any

import torch


def optimizer(
    groups: list[dict[str, Any]],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> torch.optim.Optimizer:
    """Make an optimizer of the groups (`params`, `lr`, `decayed`); decay spares groups that are not `decayed`."""
    # Fused: a UNet of 1,700 small tensors takes a third of the foreach form's time, on the CPU too.
    groups = [{**group, "weight_decay": weight_decay if group["decayed"] else 0.0} for group in groups]
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)
