"""Squared error of the predicted noise, optionally weighed by timestep."""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTION = "epsilon"


def loss(
    predicted: Tensor, target: Tensor, alpha_bar: Tensor, *, min_snr: float | None = None, debiased: bool = False
) -> Tensor:
    """Compute one value per image, (B,), from (B, C, H, W) and ᾱ_t (B,); a batch's loss is their mean.

    ε-prediction (Ho et al. 2020, equation 14). With SNR = ᾱ / (1 - ᾱ), `min_snr` is γ of Hang et al. 2023 (equation
    10, its weight for ε: min(SNR, γ) / SNR); `debiased` weighs by 1 / √SNR, SNR at most 1000 (Yu et al. 2023,
    equation 8). Null and false weigh all timesteps alike; both multiply, as Kohaku Zeta trained.
    """
    error = (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))
    if min_snr is None and not debiased:
        return error
    snr = alpha_bar / (1 - alpha_bar)
    if min_snr is not None:
        error = error * torch.clamp(snr, max=min_snr) / snr
    return error / snr.clamp(max=1000).sqrt() if debiased else error
