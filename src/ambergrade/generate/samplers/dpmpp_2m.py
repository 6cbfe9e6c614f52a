"""DPM-Solver++ 2M on Karras sigmas (Lu et al. 2022; Karras et al. 2022, equation 5): second order, one call a step."""

from __future__ import annotations

from typing import Any

from diffusers import DPMSolverMultistepScheduler


def scheduler(config: dict[str, Any]) -> DPMSolverMultistepScheduler:
    """The stock scheduler on the family's own noise schedule; `config` is its scheduler_config.json.

    A schedule that ends in pure noise (zero terminal SNR) keeps its own time steps: Karras sigmas from 4096 down would
    spend two thirds of the steps above sigma 14.6, where nothing is to be seen.
    """
    karras = not config.get("rescale_betas_zero_snr")
    return DPMSolverMultistepScheduler.from_config(
        config, algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=karras
    )
