"""AdamW with a byte for each moment of a weight (Dettmers et al. 2022), from the optional package bitsandbytes."""

from __future__ import annotations

from typing import Any

import torch

from ambergrade.train.eight_bit import eight_bit


def optimizer(
    groups: list[dict[str, Any]], *, betas: tuple[float, float] = (0.9, 0.999), weight_decay: float = 0.01
) -> torch.optim.Optimizer:
    """Make an optimizer of the groups (`params`, `lr`, `decayed`). Raises BadSetting where bitsandbytes is missing."""
    return eight_bit("AdamW8bit", groups, betas, weight_decay, instead="adamw")
