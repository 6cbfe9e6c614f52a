"""Measures the loss on held-out pictures at fixed timesteps with fixed noise: any two checkpoints can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tqdm import tqdm

from ambergrade.errors import BadInput
from ambergrade.family.networks import Networks
from ambergrade.nouns import CaptionSet
from ambergrade.train.diffusion import add_noise, alpha_bars, draw_noise, target, time_ids
from ambergrade.train.latents import Cached
from ambergrade.train.tokens import encode, tokenize_captions

QUANTILES = tuple(n / 10 for n in range(1, 10))


@dataclass(frozen=True)
class ValidationLoss:
    """Holds mean squared errors of the predicted noise, or velocity for a v-prediction model."""

    by_timestep: dict[int, float]
    mean: float
    """Over the timesteps, each counting alike."""
    images: int


@torch.no_grad()
def validation_loss(
    networks: Networks,
    captions: CaptionSet,
    latents: Cached,
    *,
    quantiles: Sequence[float] = QUANTILES,
    seed: int = 0,
    batch: int = 32,
    tokens: int = 75,
) -> ValidationLoss:
    """Measure the unweighted loss with whole captions at the given quantiles of the schedule.

    The noise of a picture depends on (seed, position in the set, timestep) alone. `batch` is pictures per forward pass.
    """
    if not captions.pictures:
        raise BadInput("The validation set has no pictures.")
    device = networks.unet.device
    alphas = alpha_bars(networks.scheduler_config)
    prediction = networks.scheduler_config.get("prediction_type", "epsilon")
    timesteps = [round(quantile * len(alphas)) for quantile in quantiles]
    sums = dict.fromkeys(timesteps, 0.0)
    modules = list(networks.trained.values())
    training = [module.training for module in modules]
    for module in modules:
        module.eval()
    with tqdm(total=len(captions.pictures), desc="validation", unit="img", disable=None, leave=False) as bar:
        for bucket, positions in latents.positions.items():
            for start in range(0, len(positions), batch):
                rows = list(range(start, min(start + batch, len(positions))))
                places = positions[rows].tolist()
                pictures = [captions.pictures[place] for place in places]
                clean = latents.rows(bucket, rows)
                tags = [(*p.caption.keep, *p.caption.flexible, *p.caption.suffix) for p in pictures]
                ids = [ids.to(device) for ids in tokenize_captions(networks, tags, tokens)]
                states, pooled = encode(networks, ids)
                added = networks.added(pooled, time_ids(pictures).to(device))
                for timestep in timesteps:
                    noise = draw_noise(clean.shape[1:], seed, places, f"validation noise {timestep}")
                    alpha_bar = alphas[timestep].expand(len(rows))
                    noisy = add_noise(clean, noise, alpha_bar)
                    wanted = target(prediction, clean, noise, alpha_bar)
                    predicted = networks.unet(
                        noisy.to(device, networks.unet.dtype),
                        timestep,
                        states,
                        added_cond_kwargs=added,
                        return_dict=False,
                    )[0]
                    error = (predicted.float().cpu() - wanted).square().mean(dim=(1, 2, 3))
                    sums[timestep] += float(error.double().sum())
                bar.update(len(rows))
    for module, was in zip(modules, training, strict=True):
        module.train(was)
    count = len(captions.pictures)
    means = {timestep: value / count for timestep, value in sums.items()}
    return ValidationLoss(means, sum(means.values()) / len(means), count)
