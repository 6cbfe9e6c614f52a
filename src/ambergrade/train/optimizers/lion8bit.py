"""Lion with a byte for each moment of a weight (Dettmers et al. 2022), from the optional package bitsandbytes."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ambergrade.errors import BadSetting


def optimizer(
    groups: list[dict[str, Any]], *, betas: tuple[float, float] = (0.9, 0.95), weight_decay: float = 0.1
) -> torch.optim.Optimizer:
    """Make an optimizer of the groups (`params`, `lr`, `decayed`). Raises BadSetting where bitsandbytes is missing."""
    try:
        library = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise BadSetting(
            f"optimizer=lion8bit needs bitsandbytes, which is not installed ({error}).\n"
            "Install it with: pip install bitsandbytes; or take optimizer=lion."
        ) from error
    groups = [{**group, "weight_decay": weight_decay if group["decayed"] else 0.0} for group in groups]
    made: torch.optim.Optimizer = library.optim.Lion8bit(groups, betas=tuple(betas))
    return made
