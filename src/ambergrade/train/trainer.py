"""Fine-tunes a UNet and its text encoders: CaptionSet + Networks in, the same Networks trained.

Everything random is keyed by (seed, purpose, number of the image in the run), so a killed run resumes to the bit,
and process count and micro-batch change only the order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from ambergrade.errors import BadSetting, UnknownName
from ambergrade.family.networks import Networks
from ambergrade.nouns import CaptionSet
from ambergrade.train import lora
from ambergrade.train.batches import Batches
from ambergrade.train.denoiser import (
    HALF,
    Denoiser,
    choose_precision,
    freeze,
    parameter_groups,
    save_memory,
    set_prediction,
)
from ambergrade.train.diffusion import alpha_bars
from ambergrade.train.flops import StepFlop, peak_flops
from ambergrade.train.in_backward import StepsInBackward
from ambergrade.train.latents import Cached
from ambergrade.train.run import LogRow, TrainingRun
from ambergrade.train.settings import TrainSettings, check_parts, plug
from ambergrade.train.state import images_seen
from ambergrade.train.steps import draw_micro_batch, optimizer_step, step_in_backward
from ambergrade.train.tokens import unread_layer_left_out
from ambergrade.train.validation import ValidationLoss, validation_loss

__all__ = ["HALF", "LogRow", "TrainingReport", "fine_tune", "unfinished_run"]

STATES = "state"
"""Folder of resumable states within a run's scratch folder."""


@dataclass
class TrainingReport:
    """Says what a training did; the weights are in the networks."""

    seen: int
    """Images."""
    rows: list[LogRow] = field(default_factory=list)
    before: ValidationLoss | None = None
    between: dict[int, ValidationLoss] = field(default_factory=dict)
    """Images seen to the loss on the way; of the average, if there is one."""
    after: ValidationLoss | None = None
    lora: Path | None = field(default=None, compare=False)
    """The adapters' file in the scratch folder, where adapters were trained: an output beside the weights, which hold
    the adapters already."""


def fine_tune(
    networks: Networks,
    captions: CaptionSet,
    latents: Cached,
    settings: TrainSettings,
    *,
    scratch: Path,
    on_log: Callable[[LogRow], None] | None = None,
    on_sample: Callable[[Networks, int], None] | None = None,
    on_gradient: Callable[[Mapping[str, Tensor]], None] | None = None,
    on_validation: Callable[[ValidationLoss, int], None] | None = None,
    validation: tuple[CaptionSet, Cached] | None = None,
) -> TrainingReport:
    """Train in place and report. With `settings.ema` the networks end as their average; with bf16 weights in bf16.

    Every `save_every` images the whole state goes to `scratch`; called again after a kill with the same arguments
    (and the weights it began with), the run goes on from there and ends in the same bits. Adapters are written to
    `scratch` too, where the report names their file, and merged into the weights. `on_log(row)` hears each
    new row, `on_sample(networks, images seen)` gets the (averaged) networks to draw with, `on_gradient(name to
    gradient)` sees each step's clipped gradient. `validation` is a held-out set, measured before, after and each
    `validate_every` images, which `on_validation(loss, images seen)` hears. Launched by accelerate with several
    processes, each takes a slice of the same batches. Raises BadSetting when the batch cannot be divided, plain bf16
    could not learn, or `scratch` holds another run, UnknownName for a weight of a tag that no caption has.
    """
    settings.check()
    check_parts(settings, networks.family.parts)
    check_loss_weights(settings, captions)
    accelerator = Accelerator(gradient_accumulation_steps=1, mixed_precision="no")
    accumulation = settings.accumulation(accelerator.num_processes)
    size = settings.per_pass(accelerator.num_processes)
    accelerator.gradient_accumulation_steps = accumulation
    loss_per_image, factor = plug("loss", settings.loss), plug("schedule", settings.schedule)
    set_prediction(networks, settings)
    alphas = alpha_bars(networks.scheduler_config)

    denoiser = Denoiser(networks, autocast=settings.precision == "bf16")
    adapters = lora.Adapters(denoiser, settings.lr, settings.seed, settings.lora) if settings.lora else None
    if adapters is None:
        freeze(denoiser, settings.lr, embeddings=not settings.train_embeddings)
    choose_precision(denoiser, settings)
    save_memory(networks, settings)
    optimizer: torch.optim.Optimizer = plug("optimizer", settings.optimizer)(parameter_groups(denoiser, settings.lr))
    model, stepper = accelerator.prepare(denoiser, optimizer)
    networks.vae.to(accelerator.device)
    run = TrainingRun(denoiser, optimizer, settings.ema, {**settings.what, "captions": captions.digest})
    run.restore(scratch / STATES)
    in_backward = StepsInBackward(optimizer) if settings.in_backward else None

    def show_gradient() -> None:
        if on_gradient:
            on_gradient({name: p.grad for name, p in run.names.items() if p.grad is not None})

    report = TrainingReport(run.seen, run.rows, run.before, between=run.between)
    if validation and run.before is None:
        report.before = run.before = validation_loss(networks, *validation, tokens=settings.tokens)
    peak = peak_flops(accelerator.device)
    flop = StepFlop(networks, settings.lr, settings.tokens) if peak and adapters is None else None
    batches = Batches({bucket: len(rows) for bucket, rows in latents.positions.items()}, settings.batch, settings.seed)
    denoiser.train()
    silent = None if accelerator.is_main_process else True
    stock = settings.compile or adapters is not None
    with (
        tqdm(total=settings.images, initial=run.seen, desc="train", unit="img", disable=silent) as bar,
        nullcontext() if stock else unread_layer_left_out(networks),
    ):
        while run.seen < settings.images:
            bucket, rows = batches(run.seen // settings.batch)
            rate = factor(run.seen + settings.batch, settings.images)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr[group["part"]] * rate
            first = accelerator.process_index * settings.batch // accelerator.num_processes
            micro_batches = (
                draw_micro_batch(
                    networks,
                    [captions.pictures[int(latents.positions[bucket][rows[place]])] for place in places],
                    latents.rows(bucket, [rows[place] for place in places]),
                    [run.seen + place for place in places],
                    alphas,
                    settings,
                )
                for places in (range(start, start + size) for start in range(first, first + accumulation * size, size))
            )
            if in_backward:
                step = step_in_backward(accelerator, model, in_backward, micro_batches, loss_per_image)
            else:
                step = optimizer_step(
                    accelerator, model, stepper, micro_batches, loss_per_image, settings.clip, show_gradient
                )
            if not math.isfinite(step.loss + step.norm):
                raise BadSetting(
                    f"Training diverged after {run.seen} images: loss {step.loss}, gradient norm {step.norm}.\n"
                    "Lower lr, lengthen the schedule's warmup, or clip harder; states saved before can be resumed."
                )
            run.advance(settings.batch, *step)
            run.flop += settings.batch * flop.of_image(bucket) if flop else 0.0
            bar.update(settings.batch)
            bar.set_postfix(loss=f"{step.loss:.4f}", refresh=False)

            if _due(run.seen, settings.log_every or settings.batch, settings):
                rates = {part: settings.lr[part] * rate for part in settings.lr}
                row = run.log(rates, peak * accelerator.num_processes if peak and flop else None)
                if on_log and accelerator.is_main_process:
                    on_log(row)
            if on_sample and accelerator.is_main_process and _due(run.seen, settings.sample_every, settings):
                with run.averaged(), torch.no_grad():
                    denoiser.eval()
                    on_sample(networks, run.seen)
                    denoiser.train()
            if validation and _due(run.seen, settings.validate_every, settings) and run.seen < settings.images:
                with run.averaged():
                    found = validation_loss(networks, *validation, tokens=settings.tokens)
                run.between[run.seen] = found
                if on_validation and accelerator.is_main_process:
                    on_validation(found, run.seen)
            if _due(run.seen, settings.save_every, settings):
                if accelerator.is_main_process:
                    run.save(scratch / STATES)
                accelerator.wait_for_everyone()
    if in_backward:
        in_backward.remove()
    run.finish()
    if adapters is not None:
        report.lora = scratch / lora.FILE
        if accelerator.is_main_process:
            adapters.write(report.lora)
        adapters.merge()
    denoiser.eval().requires_grad_(True)
    if settings.precision not in HALF:
        denoiser.float()  # bf16 weights stay so: twice the memory would say nothing more
    report.seen, report.rows = run.seen, run.rows
    if validation:
        report.after = validation_loss(networks, *validation, tokens=settings.tokens)
    return report


def unfinished_run(settings: TrainSettings, scratch_of: Callable[[TrainSettings], Path]) -> str | None:
    """Say where a killed run lies that this one does not go on with, since only last bits of its result would differ.

    `scratch_of` gives the scratch folder of a training with other settings. None where this training has states of its
    own, or there is no such run.
    """
    if images_seen(scratch_of(settings) / STATES):
        return None
    for other in settings.same_but_for_rounding():
        seen = images_seen(scratch_of(other) / STATES)
        if seen:
            changed = [key for key, value in other.what.items() if settings.what[key] != value]
            there, here = (
                " ".join(f"trainer.{key}={str(which.what[key]).lower()}" for key in changed)
                for which in (other, settings)
            )
            return (
                f"A run with {there} was broken off after {seen:,} of {settings.images:,} images. With {here} the same "
                f"sums are made in another order,\nwhich changes last bits, so this one begins anew. To go on with "
                f"that one: {there}"
            )
    return None


def check_loss_weights(settings: TrainSettings, captions: CaptionSet) -> None:
    """Raise UnknownName for a tag in `loss_weights` that no caption of the set has: it would weigh nothing."""
    if not settings.loss_weights:
        return
    parts = (part for p in captions.pictures for part in (p.caption.keep, p.caption.flexible, p.caption.suffix))
    known = {tag for part in parts for tag in part}
    for tag in settings.loss_weights:
        if tag not in known:
            raise UnknownName("trainer.loss_weights: in the captions, the tag", tag, known)


def _due(seen: int, every: int, settings: TrainSettings) -> bool:
    """Say whether the step that ended at `seen` crossed a multiple of `every`, or was the last."""
    return every > 0 and (seen // every > (seen - settings.batch) // every or seen == settings.images)
