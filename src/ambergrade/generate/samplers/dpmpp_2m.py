"""DPM-Solver++ 2M on Karras sigmas (Lu et al. 2022; Karras et al. 2022, equation 5): second order, one call a step."""

from __future__ import annotations

from typing import Any

from diffusers import DPMSolverMultistepScheduler


def scheduler(config: dict[str, Any]) -> DPMSolverMultistepScheduler:
    """The stock scheduler on the family's own noise schedule; `config` is its scheduler_config.json."""
    return DPMSolverMultistepScheduler.from_config(
        config, algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=True
    )
