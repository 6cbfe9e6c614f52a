"""Squared error of the predicted velocity v = √ᾱ ε - √(1-ᾱ) x, optionally weighed by timestep."""

from __future__ import annotations

import torch
from torch import Tensor

PREDICTION = "v_prediction"


def loss(
    predicted: Tensor, target: Tensor, alpha_bar: Tensor, *, min_snr: float | None = None, debiased: bool = False
) -> Tensor:
    """Compute one value per image, (B,), from (B, C, H, W) and ᾱ_t (B,); a batch's loss is their mean.

    v-prediction (Salimans & Ho 2022, section 4). With SNR = ᾱ / (1 - ᾱ), `min_snr` is γ of Hang et al. 2023 in its
    form for v: min(SNR, γ) / (SNR + 1); `debiased` weighs by 1 / (SNR + 1), SNR at most 1000, the counterpart of its
    weight for ε. Whole at SNR 0, where zero-terminal schedules end.
    """
    error = (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))
    snr = alpha_bar / (1 - alpha_bar)
    if min_snr is not None:
        error = error * torch.clamp(snr, max=min_snr) / (snr + 1)
    return error / (snr.clamp(max=1000) + 1) if debiased else error
