"""UniPC (Zhao et al. 2023), order 2, predictor and corrector: good pictures in 10 to 20 steps, one call a step."""

from __future__ import annotations

from typing import Any

from diffusers import UniPCMultistepScheduler


def scheduler(config: dict[str, Any]) -> UniPCMultistepScheduler:
    """The stock scheduler on the family's own noise schedule; `config` is its scheduler_config.json."""
    return UniPCMultistepScheduler.from_config(config)
