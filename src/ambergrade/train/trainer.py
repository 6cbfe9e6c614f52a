"""Fine-tuning of an SDXL UNet and both text encoders: CaptionSet + Networks in, the same Networks trained.

Everything random is keyed by (seed, purpose, number of the image in the run), so a killed run resumes to the bit,
and process count and micro-batch change only the order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from ambergrade.errors import BadSetting
from ambergrade.family import sdxl
from ambergrade.family.sdxl import Networks
from ambergrade.identity import digest
from ambergrade.nouns import Caption, CaptionedPicture, CaptionSet
from ambergrade.train import lora
from ambergrade.train.batches import Batches, caption_tags
from ambergrade.train.blocks import blocks_as_one
from ambergrade.train.diffusion import (
    add_noise,
    alpha_bars,
    draw_noise,
    draw_timesteps,
    input_noise,
    offset_noise,
    pyramid_noise,
    target,
    time_ids,
)
from ambergrade.train.flops import StepFlop, peak_flops
from ambergrade.train.heap import kept_heap
from ambergrade.train.in_backward import StepsInBackward
from ambergrade.train.latents import Cached
from ambergrade.train.rounding import lost_share
from ambergrade.train.run import QUARTERS, LogRow, Run, by_quarter
from ambergrade.train.settings import TrainSettings, plug, plug_module
from ambergrade.train.tokens import encode, tokenize_captions, unread_layer_left_out
from ambergrade.train.validation import ValidationLoss, validation_loss

__all__ = ["Denoiser", "LogRow", "TrainReport", "fine_tune", "freeze", "parameter_groups"]

STATES = "state"
"""Folder of resumable states within a run's scratch folder."""
TRAINED = ("unet", "text_encoder", "text_encoder_2")
"""Components that may be trained."""
HALF = ("bf16-sr", "bf16-plain")
"""Precisions whose weights are bf16."""
MOST_LOST = 0.5
"""Plain bf16 is refused when more than this share of a part's weights would not feel a step."""


@dataclass
class TrainReport:
    """What a run did; the weights are in the networks."""

    seen: int
    """Images."""
    rows: list[LogRow] = field(default_factory=list)
    before: ValidationLoss | None = None
    between: dict[int, ValidationLoss] = field(default_factory=dict)
    """Images seen to the loss on the way; of the average, if there is one."""
    after: ValidationLoss | None = None


class Denoiser(nn.Module):
    """The three trained networks as one, so that accumulation and gradient reduction cover them all."""

    def __init__(self, networks: Networks, *, autocast: bool = False) -> None:
        """`autocast` computes fp32 weights' matrix products in bf16."""
        super().__init__()
        self.autocast = autocast
        self.unet = networks.unet
        self.te1 = networks.text_encoder
        self.te2 = networks.text_encoder_2

    def forward(self, noisy: Tensor, timesteps: Tensor, ids_1: Tensor, ids_2: Tensor, time_ids: Tensor) -> Tensor:
        """The predicted noise, (B, C, H, W)."""
        # Not accelerate's mixed precision, which would hold for every later run of the process.
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.autocast):
            states, pooled = encode(self.te1, self.te2, ids_1, ids_2)
            added = {"text_embeds": pooled, "time_ids": time_ids}
            dtype = self.unet.conv_in.weight.dtype  # the property `dtype` walks through all modules
            predicted: Tensor = self.unet(
                noisy.to(dtype), timesteps, states, added_cond_kwargs=added, return_dict=False
            )[0]
        return predicted


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
) -> TrainReport:
    """Train in place and report. With `settings.ema` the networks end as their average; with bf16 weights in bf16.

    Every `save_every` images the whole state goes to `scratch`; called again after a kill with the same arguments
    (and the weights it began with), the run goes on from there and ends in the same bits. `on_log(row)` hears each
    new row, `on_sample(networks, images seen)` gets the (averaged) networks to draw with, `on_gradient(name to
    gradient)` sees each step's clipped gradient. `validation` is a held-out set, measured before, after and each
    `validate_every` images, which `on_validation(loss, images seen)` hears. Launched by accelerate with several
    processes, each takes a slice of the same batches. Raises BadSetting when the batch cannot be divided, plain bf16
    could not learn, or `scratch` holds another run.
    """
    accelerator = Accelerator(gradient_accumulation_steps=1, mixed_precision="no")
    accumulation = settings.accumulation(accelerator.num_processes)
    size = settings.per_pass(accelerator.num_processes)
    accelerator.gradient_accumulation_steps = accumulation
    loss_per_image = plug("losses", "loss", settings.loss)
    factor = plug("schedules", "factor", settings.schedule)
    set_prediction(networks, settings)
    alphas = alpha_bars(networks.scheduler_config)

    denoiser = Denoiser(networks, autocast=settings.precision == "bf16")
    adapters = lora.Adapters(denoiser, settings.lr, settings.seed, **settings.lora) if settings.lora else None
    if adapters is None:
        freeze(denoiser, settings.lr, embeddings=not settings.train_embeddings)
    choose_precision(denoiser, settings)
    save_memory(networks, settings)
    groups = parameter_groups(denoiser, settings.lr)
    optimizer: torch.optim.Optimizer = plug("optimizers", "optimizer", settings.optimizer)(groups)
    model, stepper = accelerator.prepare(denoiser, optimizer)
    networks.vae.to(accelerator.device)
    run = Run(denoiser, optimizer, settings.ema, digest([settings.what, captions.digest]))
    run.restore(scratch / STATES)
    in_backward = StepsInBackward(optimizer) if settings.in_backward else None

    def heard(run: Run) -> None:
        if on_gradient:
            on_gradient({name: p.grad for name, p in run.names.items() if p.grad is not None})

    report = TrainReport(run.seen, run.rows, run.before, between=run.between)
    if validation and run.before is None:
        report.before = run.before = validation_loss(networks, *validation, tokens=settings.tokens)
    peak = peak_flops(accelerator.device)
    flop = StepFlop(networks, settings.lr, settings.tokens) if peak and adapters is None else None
    batches = Batches({bucket: len(rows) for bucket, rows in latents.positions.items()}, settings.batch, settings.seed)
    denoiser.train()
    bar = tqdm(
        total=settings.images,
        initial=run.seen,
        desc="train",
        unit="img",
        disable=None if accelerator.is_main_process else True,
    )
    stock = settings.compile or adapters is not None
    roomy = accelerator.device.type == "cpu" and not settings.in_backward  # which is chosen to save memory
    with (
        bar,
        kept_heap() if roomy else nullcontext(),
        nullcontext() if stock else blocks_as_one(networks.unet),
        nullcontext() if stock else unread_layer_left_out(networks.text_encoder),
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
                step = _step_in_backward(accelerator, model, in_backward, micro_batches, loss_per_image)
            else:
                step = _optimizer_step(
                    accelerator, model, stepper, micro_batches, loss_per_image, settings.clip, lambda: heard(run)
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
        adapters.merge(scratch)
    denoiser.eval().requires_grad_(True)
    if settings.precision not in HALF:
        denoiser.float()  # bf16 weights stay so: twice the memory would say nothing more
    report.seen, report.rows = run.seen, run.rows
    if validation:
        report.after = validation_loss(networks, *validation, tokens=settings.tokens)
    return report


@dataclass
class MicroBatch:
    """Tensors of one forward pass, B images."""

    noisy: Tensor
    """(B, C, H, W)"""
    target: Tensor
    """What the UNet is to predict."""
    timesteps: Tensor
    """(B,) int64"""
    alpha_bar: Tensor
    """(B,)"""
    ids_1: Tensor
    """(B, 77) int64"""
    ids_2: Tensor
    time_ids: Tensor
    """(B, 6)"""
    weights: Tensor
    """(B,) factors of the images' losses."""
    quarters: Tensor
    """(B,) int64, of the schedule, that the timesteps lie in."""

    def to(self, device: torch.device) -> MicroBatch:
        """There; from pinned memory to a GPU, so that the next batch is drawn while this one is computed."""
        values: dict[str, Tensor] = vars(self)
        if device.type == "cuda":
            values = {name: value.pin_memory() for name, value in values.items()}
        return MicroBatch(
            **{name: value.to(device, non_blocking=device.type == "cuda") for name, value in values.items()}
        )


class Step(NamedTuple):
    """What an optimizer step gave, over all processes."""

    loss: float
    norm: float
    """Of the gradient, before clipping."""
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
    """Noise, timesteps and captions of pictures with latents `clean`; `images` are their numbers in the run."""
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
        *tokenize_captions(networks, tags, settings.tokens),
        time_ids(pictures),
        torch.tensor([loss_weight(picture.caption, settings.loss_weights) for picture in pictures]),
        timesteps * len(QUARTERS) // len(alphas),
    )


def loss_weight(caption: Caption, weights: Mapping[str, float]) -> float:
    """The factor of a picture's loss: the product over the tags of its whole caption."""
    return math.prod(weights.get(tag, 1.0) for tag in (*caption.keep, *caption.flexible, *caption.suffix))


def set_prediction(networks: Networks, settings: TrainSettings) -> None:
    """Let the networks' scheduler config say what the loss trains, so that validation and sampling follow.

    The marks by which a single file says the same go with the weights. Raises BadSetting for an ε-loss on a
    v-prediction model, which would unlearn it.
    """
    trained = plug_module("losses", settings.loss).PREDICTION
    found = networks.scheduler_config.get("prediction_type", "epsilon")
    if trained == "epsilon" and found != "epsilon":
        raise BadSetting(f"The base predicts {found}, and loss={settings.loss['name']} trains epsilon. Take loss=v.")
    if trained != found:
        networks.scheduler_config = {**networks.scheduler_config, "prediction_type": trained}
    if settings.zero_terminal_snr:
        networks.scheduler_config = sdxl.from_noise({**networks.scheduler_config, "rescale_betas_zero_snr": True})
    networks.passive |= sdxl.marks(networks.scheduler_config)


def choose_precision(denoiser: Denoiser, settings: TrainSettings) -> None:
    """bf16 weights where they are asked for.

    Raises BadSetting where they would not learn: plain rounding at a rate that most weights would not feel, or
    bf16-sr with an optimizer that does not round stochastically.
    """
    if settings.precision not in HALF:
        return
    name = settings.optimizer["name"]
    if settings.precision == "bf16-sr":
        if not getattr(plug_module("optimizers", settings.optimizer), "ROUNDS_STOCHASTICALLY", False):
            raise BadSetting(
                f"precision=bf16-sr needs an optimizer that rounds stochastically, and {name} does not.\n"
                "Take optimizer=adamw_sr, adafactor or lion, or precision=bf16."
            )
    else:
        for part, rate in settings.lr.items():
            lost = lost_share((p for p in getattr(denoiser, part).parameters() if p.requires_grad), rate)
            if rate and lost > MOST_LOST:
                raise BadSetting(
                    f"lr.{part}={rate:g} with precision=bf16-plain trains next to nothing: bf16 rounds a step of that\n"
                    f"size away for {lost:.0%} of its weights. Take precision=bf16 (fp32 weights), or bf16-sr with\n"
                    "optimizer=adamw_sr, adafactor or lion."
                )
    denoiser.to(torch.bfloat16)


def save_memory(networks: Networks, settings: TrainSettings) -> None:
    """Compute blocks again instead of keeping their activations, lay memory out, and compile, as the settings ask."""
    unet = networks.unet
    if settings.checkpointing != "none":
        unet.enable_gradient_checkpointing()
        if settings.checkpointing == "selective":
            for block in [*unet.down_blocks[:-1], *unet.up_blocks[1:]]:
                for module in block.modules():  # the transformers in it decide for themselves
                    if hasattr(module, "gradient_checkpointing"):
                        module.gradient_checkpointing = False
        else:
            for encoder in (networks.text_encoder, networks.text_encoder_2):
                # transformers 5 renamed it, and warns of the old name
                enable = getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)
                enable({"use_reentrant": False})
    else:
        unet.disable_gradient_checkpointing()
    unet.to(memory_format=torch.channels_last if settings.channels_last else torch.contiguous_format)
    if settings.compile:
        unet.compile_repeated_blocks()


def freeze(denoiser: Denoiser, lr: Mapping[str, float], *, embeddings: bool = False) -> None:
    """Leave gradients on for parts with a learning rate, but for what no loss reaches and, if asked, embeddings.

    SDXL reads the first text encoder's penultimate states: its last layer and final norm would stay without
    gradient, and distributed training would wait for it.
    """
    for part, rate in lr.items():
        getattr(denoiser, part).requires_grad_(rate > 0)
    denoiser.te1.encoder.layers[-1].requires_grad_(False)
    denoiser.te1.final_layer_norm.requires_grad_(False)
    if embeddings:
        for module in denoiser.modules():
            if isinstance(module, nn.Embedding):
                module.requires_grad_(False)


def parameter_groups(denoiser: Denoiser, lr: Mapping[str, float]) -> list[dict[str, Any]]:
    """Trained parameters by part; weight decay spares norms, biases and embeddings (rows rarely seen would drift)."""
    embeddings = {id(m.weight) for m in denoiser.modules() if isinstance(m, nn.Embedding)}
    groups: list[dict[str, Any]] = []
    for part in lr:
        trained = [p for p in getattr(denoiser, part).parameters() if p.requires_grad]
        for decayed in (True, False):
            chosen = [p for p in trained if (p.ndim > 1 and id(p) not in embeddings) is decayed]
            if chosen:
                groups.append({"params": chosen, "lr": lr[part], "part": part, "decayed": decayed})
    return groups


def _optimizer_step(
    accelerator: Accelerator,
    model: nn.Module,
    stepper: torch.optim.Optimizer,
    micro_batches: Iterable[MicroBatch],
    loss_per_image: Callable[[Tensor, Tensor, Tensor], Tensor],
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
                norm = _clip(accelerator, parameters, clip or math.inf)
                before_step()
                stepper.step()
                for parameter in parameters:  # what zero_grad does, without its detours through 1,700 tensors
                    parameter.grad = None
    loss = accelerator.reduce(torch.stack(losses).mean(), "mean")
    return Step(loss.item(), float(norm), accelerator.reduce(torch.stack(parts).sum(dim=0), "sum"))


def _clip(accelerator: Accelerator, parameters: list[nn.Parameter], most: float) -> Tensor:
    """The norm of the whole gradient, which then is at most `most`; on a CPU in few calls, with the same values."""
    if accelerator.device.type != "cpu":
        return torch.as_tensor(accelerator.clip_grad_norm_(parameters, most))
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    factor = most / (norm + 1e-6)  # as torch's clip_grad_norm_ has it
    if factor < 1:
        torch._foreach_mul_(gradients, factor)
    return norm


def _step_in_backward(
    accelerator: Accelerator,
    model: nn.Module,
    steps: StepsInBackward,
    micro_batches: Iterable[MicroBatch],
    loss_per_image: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Step:
    """The step of one pass on one process, made while it goes backward."""
    (micro,) = (batch.to(accelerator.device) for batch in micro_batches)
    each = _losses(model, micro, loss_per_image)
    loss = each.mean()
    accelerator.backward(loss)
    return Step(loss.item(), float(steps.norm()), by_quarter(each, micro.quarters))


def _losses(model: nn.Module, micro: MicroBatch, loss_per_image: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """(B,)"""
    predicted = model(micro.noisy, micro.timesteps, micro.ids_1, micro.ids_2, micro.time_ids)
    return loss_per_image(predicted, micro.target, micro.alpha_bar) * micro.weights


def _due(seen: int, every: int, settings: TrainSettings) -> bool:
    """Whether the step that ended at `seen` crossed a multiple of `every`, or was the last."""
    return every > 0 and (seen // every > (seen - settings.batch) // every or seen == settings.images)
