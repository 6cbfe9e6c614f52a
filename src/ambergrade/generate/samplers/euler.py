"""Euler (Karras et al. 2022, Algorithm 2 without churn): deterministic, one network call a step."""

from __future__ import annotations

from typing import Any

from diffusers import EulerDiscreteScheduler


def scheduler(config: dict[str, Any]) -> EulerDiscreteScheduler:
    """The stock scheduler on the family's own noise schedule; `config` is its scheduler_config.json."""
    return EulerDiscreteScheduler.from_config(config)
