"""Draws noise, timesteps and SDXL's micro-conditions, image by image, and mixes noise into pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor
from torch.nn.functional import interpolate

from ambergrade.errors import BadSetting
from ambergrade.identity import random_seed
from ambergrade.nouns import CaptionedPicture

PREDICTIONS = ("epsilon", "v_prediction")


def alpha_bars(scheduler_config: Mapping[str, Any]) -> Tensor:
    """Compute ᾱ_t, (T,) fp32, of the family's schedule as stock DDPM does.

    With `rescale_betas_zero_snr` ᾱ_T is 0 (Lin et al. 2023, algorithm 1). Raises BadSetting for what training does
    not know: another prediction type, or ε-prediction of a picture that is all noise, which says nothing.
    """
    prediction = scheduler_config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS:
        known = ", ".join(PREDICTIONS)
        raise BadSetting(f"The scheduler config asks for prediction_type {prediction!r}; known: {known}.")
    if prediction == "epsilon" and scheduler_config.get("rescale_betas_zero_snr"):
        raise BadSetting(
            "Zero-terminal SNR (rescale_betas_zero_snr) goes with v-prediction: at the last timestep the picture is\n"
            "all noise, and its ε is given away. Train with loss@trainer.loss=v."
        )
    alphas: Tensor = DDPMScheduler.from_config(dict(scheduler_config)).alphas_cumprod
    if scheduler_config.get("rescale_betas_zero_snr"):
        alphas[-1] = 0.0  # diffusers leaves what the last product rounds to
    return alphas


def add_noise(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Mix √ᾱ x + √(1-ᾱ) ε (Ho et al. 2020, equation 4); (B, C, H, W), (B, C, H, W), (B,)."""
    signal = alpha_bar.sqrt()[:, None, None, None]
    return signal * clean + (1 - alpha_bar).sqrt()[:, None, None, None] * noise


def target(prediction: str, clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Compute what the UNet is to say, (B, C, H, W): ε, or v = √ᾱ ε - √(1-ᾱ) x (Salimans & Ho 2022, appendix D)."""
    if prediction == "epsilon":
        return noise
    signal = alpha_bar.sqrt()[:, None, None, None]
    return signal * noise - (1 - alpha_bar).sqrt()[:, None, None, None] * clean


def draw_noise(shape: Sequence[int], seed: int, images: Sequence[int], purpose: str = "noise") -> Tensor:
    """Draw (len(images), *shape) normal noise on the CPU, each image's keyed by (seed, purpose, image)."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, purpose, image)) for image in images])


def offset_noise(noise: Tensor, strength: float, seed: int, images: Sequence[int]) -> Tensor:
    """Add one more draw for each whole channel to the noise: ε + strength · δ, δ (B, C, 1, 1).

    It lets a model learn the mean brightness (Guttenberg 2023, "Diffusion with offset noise"). Variance 1 + strength².
    """
    return noise + strength * draw_noise((noise.shape[1], 1, 1), seed, images, "noise offset")


def pyramid_noise(noise: Tensor, discount: float, seed: int, images: Sequence[int], levels: int = 10) -> Tensor:
    """Add noise of coarser scales (Whitaker 2023, "Multi-resolution noise"), at unit variance per image.

    Level i is coarser by r_i, drawn in 2–4 of the level before, is stretched to the full size (bilinear) and weighs
    discount^i; it ends where a side is one latent pixel.
    """
    made = []
    for flat, image in zip(noise, images, strict=True):
        draw = generator(seed, "pyramid noise", image)
        (channels, height, width), total, shrink = flat.shape, flat.clone(), 1.0
        for level in range(1, levels + 1):
            shrink *= 2 + 2 * float(torch.rand((), generator=draw))
            size = max(1, int(height / shrink)), max(1, int(width / shrink))
            coarse = torch.randn(1, channels, *size, generator=draw)
            total += discount**level * interpolate(coarse, (height, width), mode="bilinear")[0]
            if 1 in size:
                break
        made.append(total / total.std())
    return torch.stack(made)


def input_noise(noise: Tensor, strength: float, seed: int, images: Sequence[int]) -> Tensor:
    """Make the noise that is mixed in, while the plain one stays the target: ε + strength · ξ (Ning et al. 2023)."""
    return noise + strength * draw_noise(noise.shape[1:], seed, images, "input noise")


def draw_timesteps(count: int, seed: int, images: Sequence[int]) -> Tensor:
    """Draw (len(images),) int64, uniform on 0 … count-1, each image's its own."""
    return torch.cat([torch.randint(count, (1,), generator=generator(seed, "timestep", image)) for image in images])


def time_ids(pictures: Sequence[CaptionedPicture]) -> Tensor:
    """List (B, 6): original height, width; crop top, left; target height, width (Podell et al. 2023, section 2.2)."""
    return torch.tensor([[*p.original_size[::-1], *p.crop[::-1], *p.bucket[::-1]] for p in pictures]).float()


def generator(seed: int, purpose: str, *item: Any) -> torch.Generator:
    """Make a CPU generator keyed by (seed, purpose, item)."""
    return torch.Generator().manual_seed(random_seed(seed, purpose, *item))
