"""Squared error of the predicted noise, optionally with the min-SNR weight."""

from __future__ import annotations

import torch
from torch import Tensor


def loss(predicted: Tensor, noise: Tensor, alpha_bar: Tensor, *, min_snr: float | None = None) -> Tensor:
    """One value per image, (B,), from (B, C, H, W) and ᾱ_t (B,); a batch's loss is their mean.

    ε-prediction (Ho et al. 2020, equation 14). `min_snr` is γ of Hang et al. 2023 (equation 10, its weight for ε:
    min(SNR, γ) / SNR with SNR = ᾱ / (1 - ᾱ)); null weighs all timesteps alike.
    """
    error = (predicted.float() - noise.float()).square().mean(dim=(1, 2, 3))
    if min_snr is None:
        return error
    snr = alpha_bar / (1 - alpha_bar)
    return error * torch.clamp(snr, max=min_snr) / snr
