"""The forward process and SDXL's micro-conditions, drawn image by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ambergrade.errors import BadSetting
from ambergrade.identity import random_seed
from ambergrade.nouns import CaptionedPicture


def alpha_bars(scheduler_config: Mapping[str, Any]) -> Tensor:
    """ᾱ_t, (T,) fp32, of the family's schedule as stock DDPM computes it."""
    prediction = scheduler_config.get("prediction_type", "epsilon")
    if prediction != "epsilon" or scheduler_config.get("rescale_betas_zero_snr"):
        raise BadSetting(
            f"The scheduler config asks for prediction_type {prediction!r}, rescale_betas_zero_snr "
            f"{bool(scheduler_config.get('rescale_betas_zero_snr'))}; training knows epsilon without rescaling only."
        )
    alphas: Tensor = DDPMScheduler.from_config(dict(scheduler_config)).alphas_cumprod
    return alphas


def add_noise(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """√ᾱ x + √(1-ᾱ) ε (Ho et al. 2020, equation 4); (B, C, H, W), (B, C, H, W), (B,)."""
    signal = alpha_bar.sqrt()[:, None, None, None]
    return signal * clean + (1 - alpha_bar).sqrt()[:, None, None, None] * noise


def draw_noise(shape: Sequence[int], seed: int, images: Sequence[int], purpose: str = "noise") -> Tensor:
    """(len(images), *shape) normal noise, each image's its own by (seed, purpose, image), on the CPU."""
    return torch.stack([torch.randn(*shape, generator=generator(seed, purpose, image)) for image in images])


def draw_timesteps(count: int, seed: int, images: Sequence[int]) -> Tensor:
    """(len(images),) int64, uniform on 0 … count-1, each image's its own."""
    return torch.cat([torch.randint(count, (1,), generator=generator(seed, "timestep", image)) for image in images])


def time_ids(pictures: Sequence[CaptionedPicture]) -> Tensor:
    """(B, 6): original height, width; crop top, left; target height, width (Podell et al. 2023, section 2.2)."""
    return torch.tensor([[*p.original_size[::-1], *p.crop[::-1], *p.bucket[::-1]] for p in pictures]).float()


def generator(seed: int, purpose: str, *item: Any) -> torch.Generator:
    """A CPU generator keyed by (seed, purpose, item)."""
    return torch.Generator().manual_seed(random_seed(seed, purpose, *item))
