"""Makes the optimizers of the optional package bitsandbytes, which keep a byte for each moment of a weight."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from ambergrade.errors import BadSetting


def eight_bit(
    kind: str, groups: list[dict[str, Any]], betas: tuple[float, float], weight_decay: float, *, instead: str
) -> torch.optim.Optimizer:
    """Make bitsandbytes' `kind`, such as AdamW8bit. Raises BadSetting where the package is missing."""
    try:
        library = importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise BadSetting(
            f"optimizer={kind.lower()} needs bitsandbytes, which is not installed ({error}).\n"
            f"Install it with: pip install bitsandbytes; or take optimizer={instead}."
        ) from error
    groups = [{**group, "weight_decay": weight_decay if group["decayed"] else 0.0} for group in groups]
    made: torch.optim.Optimizer = getattr(library.optim, kind)(groups, betas=tuple(betas))
    return made
