"""Euler ancestral (k-diffusion's `sample_euler_ancestral`): fresh noise at each step, from each picture's generator."""

from __future__ import annotations

from typing import Any

from diffusers import EulerAncestralDiscreteScheduler


def scheduler(config: dict[str, Any]) -> EulerAncestralDiscreteScheduler:
    """The stock scheduler on the family's own noise schedule; `config` is its scheduler_config.json."""
    return EulerAncestralDiscreteScheduler.from_config(config)
