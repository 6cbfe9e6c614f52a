"""Makes one optimizer step: draws the images of its passes, sums their gradients, moves the weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ambergrade.family.networks import Networks
from ambergrade.nouns import Caption, CaptionedPicture
from ambergrade.train.batches import caption_tags
from ambergrade.train.diffusion import (
    add_noise,
    draw_noise,
    draw_timesteps,
    input_noise,
    offset_noise,
    pyramid_noise,
    target,
    time_ids,
)
from ambergrade.train.in_backward import StepsInBackward
from ambergrade.train.run import QUARTERS, by_quarter
from ambergrade.train.settings import TrainSettings
from ambergrade.train.tokens import tokenize_captions

LossPerImage = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass
class MicroBatch:
    """Holds the tensors of one forward pass, B images."""

    noisy: Tensor
    """(B, C, H, W)"""
    target: Tensor
    """What the UNet is to predict."""
    timesteps: Tensor
    """(B,) int64"""
    alpha_bar: Tensor
    """(B,)"""
    ids: tuple[Tensor, ...]
    """(B, 77) int64, or (B, K, 77), for each text encoder."""
    time_ids: Tensor
    """(B, 6)"""
    weights: Tensor
    """(B,) factors of the images' losses."""
    quarters: Tensor
    """(B,) int64, of the schedule, that the timesteps lie in."""

    def to(self, device: torch.device) -> MicroBatch:
        """Move the tensors; to a GPU from pinned memory, so that the next batch is drawn while this one is computed."""

        def moved(value: Tensor) -> Tensor:
            return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)

        values: dict[str, Any] = {
            name: tuple(map(moved, value)) if isinstance(value, tuple) else moved(value)
            for name, value in vars(self).items()
        }
        return MicroBatch(**values)


class Step(NamedTuple):
    """Says what an optimizer step gave, over all processes."""

    loss: float
    norm: float
    """The gradient's norm, before clipping."""
    parts: Tensor
    """Losses by quarter of the schedule, as `by_quarter` gives them."""


def draw_micro_batch(
    networks: Networks,
    pictures: Sequence[CaptionedPicture],
    clean: Tensor,
    images: Sequence[int],
    alphas: Tensor,
    settings: TrainSettings,
) -> MicroBatch:
    """Draw noise, timesteps and captions of pictures with latents `clean`; `images` are their numbers in the run."""
    tags = [
        caption_tags(
            picture.caption,
            settings.seed,
            image,
            shuffle=settings.shuffle,
            tag_dropout=settings.tag_dropout,
            caption_dropout=settings.caption_dropout,
            group_dropout=settings.group_dropout,
        )
        for picture, image in zip(pictures, images, strict=True)
    ]
    noise = draw_noise(clean.shape[1:], settings.seed, images)
    if settings.noise_offset:
        noise = offset_noise(noise, settings.noise_offset, settings.seed, images)
    if settings.pyramid_noise:
        noise = pyramid_noise(noise, settings.pyramid_noise, settings.seed, images)
    mixed = input_noise(noise, settings.input_noise, settings.seed, images) if settings.input_noise else noise
    timesteps = draw_timesteps(len(alphas), settings.seed, images)
    alpha_bar = alphas[timesteps]
    return MicroBatch(
        add_noise(clean, mixed, alpha_bar),
        target(networks.scheduler_config.get("prediction_type", "epsilon"), clean, noise, alpha_bar),
        timesteps,
        alpha_bar,
        tokenize_captions(networks, tags, settings.tokens),
        time_ids(pictures),
        torch.tensor([loss_weight(picture.caption, settings.loss_weights) for picture in pictures]),
        timesteps * len(QUARTERS) // len(alphas),
    )


def loss_weight(caption: Caption, weights: Mapping[str, float]) -> float:
    """Compute the factor of a picture's loss: the product over the tags of its whole caption."""
    return math.prod(weights.get(tag, 1.0) for tag in (*caption.keep, *caption.flexible, *caption.suffix))


def optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    stepper: torch.optim.Optimizer,
    micro_batches: Iterable[MicroBatch],
    loss_per_image: LossPerImage,
    clip: float,
    before_step: Callable[[], None] = lambda: None,
) -> Step:
    """Accumulate the micro-batches' gradients and step once."""
    losses: list[Tensor] = []
    parts: list[Tensor] = []
    norm = torch.zeros(())
    for micro in micro_batches:
        micro = micro.to(accelerator.device)
        with accelerator.accumulate(model):
            each = _losses(model, micro, loss_per_image)
            loss = each.mean()
            accelerator.backward(loss)
            losses.append(loss.detach())
            parts.append(by_quarter(each, micro.quarters))
            if accelerator.sync_gradients:
                parameters = [p for group in stepper.param_groups for p in group["params"]]
                norm = torch.as_tensor(accelerator.clip_grad_norm_(parameters, clip or math.inf))
                before_step()
                stepper.step()
                for parameter in parameters:  # what zero_grad does, without its detours through 1,700 tensors
                    parameter.grad = None
    loss = accelerator.reduce(torch.stack(losses).mean(), "mean")
    return Step(loss.item(), float(norm), accelerator.reduce(torch.stack(parts).sum(dim=0), "sum"))


def step_in_backward(
    accelerator: Accelerator,
    model: nn.Module,
    steps: StepsInBackward,
    micro_batches: Iterable[MicroBatch],
    loss_per_image: LossPerImage,
) -> Step:
    """Step once within the backward pass of the only micro-batch."""
    (micro,) = (batch.to(accelerator.device) for batch in micro_batches)
    each = _losses(model, micro, loss_per_image)
    loss = each.mean()
    accelerator.backward(loss)
    return Step(loss.item(), float(steps.norm()), by_quarter(each, micro.quarters))


def _losses(model: nn.Module, micro: MicroBatch, loss_per_image: LossPerImage) -> Tensor:
    """Compute one loss an image, (B,)."""
    predicted = model(micro.noisy, micro.timesteps, micro.ids, micro.time_ids)
    return loss_per_image(predicted, micro.target, micro.alpha_bar) * micro.weights
