"""Fine-tuning of an SDXL UNet and both text encoders: CaptionSet + Networks in, the same Networks trained.

Everything random is keyed by (seed, purpose, number of the image in the run), so a killed run resumes to the bit,
and process count and micro-batch change only the order of sums.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from torch import Tensor, nn
from tqdm import tqdm

from ambergrade.errors import BadSetting
from ambergrade.family.files import read_tensors, write_tensors
from ambergrade.family.sdxl import Networks, encode_tokens, tokenize
from ambergrade.identity import digest
from ambergrade.nouns import CaptionedPicture, CaptionSet
from ambergrade.train.batches import Batches, caption_text
from ambergrade.train.diffusion import add_noise, alpha_bars, draw_noise, draw_timesteps, time_ids
from ambergrade.train.latents import Latents
from ambergrade.train.settings import TrainSettings, plug
from ambergrade.train.validation import ValidationLoss, validation_loss

STATE = "state.safetensors"


@dataclass(frozen=True)
class LogRow:
    """Training as it went, averaged over the images since the row before."""

    seen: int
    """Images seen so far."""
    loss: float
    grad_norm: float
    """Before clipping."""
    lr: dict[str, float]
    """Of the last step, by part."""


@dataclass
class TrainReport:
    """What a run did; the weights are in the networks."""

    seen: int
    """Images."""
    rows: list[LogRow] = field(default_factory=list)
    before: ValidationLoss | None = None
    after: ValidationLoss | None = None


class Denoiser(nn.Module):
    """The three trained networks as one, so that accumulation and gradient reduction cover them all."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.unet = networks.unet
        self.te1 = networks.text_encoder
        self.te2 = networks.text_encoder_2

    def forward(self, noisy: Tensor, timesteps: Tensor, ids_1: Tensor, ids_2: Tensor, time_ids: Tensor) -> Tensor:
        """The predicted noise, (B, C, H, W)."""
        states, pooled = encode_tokens(self.te1, self.te2, ids_1, ids_2)
        added = {"text_embeds": pooled, "time_ids": time_ids}
        predicted: Tensor = self.unet(noisy, timesteps, states, added_cond_kwargs=added, return_dict=False)[0]
        return predicted


def fine_tune(
    networks: Networks,
    captions: CaptionSet,
    latents: Latents,
    settings: TrainSettings,
    *,
    scratch: Path,
    on_log: Callable[[LogRow], None] | None = None,
    on_sample: Callable[[Networks, int], None] | None = None,
    validation: tuple[CaptionSet, Latents] | None = None,
) -> TrainReport:
    """Train in place and report. With `settings.ema` the networks end as their average.

    Every `save_every` images the whole state goes to `scratch`; called again after a kill with the same arguments
    (and the weights it began with), the run goes on from there and ends in the same bits. `on_log(row)` hears each
    new row, `on_sample(networks, images seen)` gets the (averaged) networks to draw with, `validation` is a held-out
    set, measured before and after. Launched by accelerate with several processes, each takes a slice of the same
    batches. Raises BadSetting when the batch cannot be divided or `scratch` holds another run.
    """
    accelerator = Accelerator(
        gradient_accumulation_steps=1, mixed_precision="bf16" if settings.precision == "bf16" else "no"
    )
    accumulation = settings.accumulation(accelerator.num_processes)
    accelerator.gradient_accumulation_steps = accumulation
    loss_per_image = plug("losses", "loss", settings.loss)
    factor = plug("schedules", "factor", settings.schedule)
    alphas = alpha_bars(networks.scheduler_config)

    denoiser = Denoiser(networks)
    freeze(denoiser, settings.lr)
    groups = parameter_groups(denoiser, settings.lr)
    optimizer: torch.optim.Optimizer = plug("optimizers", "optimizer", settings.optimizer)(groups)
    model, stepper = accelerator.prepare(denoiser, optimizer)
    networks.vae.to(accelerator.device)
    run = _Run(denoiser, optimizer, settings.ema, digest([asdict(settings), captions.digest]))
    run.restore(scratch / STATE)

    report = TrainReport(run.seen, run.rows, run.before)
    if validation and run.before is None:
        report.before = run.before = validation_loss(networks, *validation)
    batches = Batches({bucket: len(rows) for bucket, rows in latents.positions.items()}, settings.batch, settings.seed)
    denoiser.train()
    bar = tqdm(
        total=settings.images,
        initial=run.seen,
        desc="train",
        unit="img",
        disable=None if accelerator.is_main_process else True,
    )
    with bar:
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
                for places in (
                    range(start, start + settings.micro)
                    for start in range(first, first + accumulation * settings.micro, settings.micro)
                )
            )
            mean_loss, norm = _optimizer_step(accelerator, model, stepper, micro_batches, loss_per_image, settings.clip)
            if not math.isfinite(mean_loss + norm):
                raise BadSetting(
                    f"Training diverged after {run.seen} images: loss {mean_loss}, gradient norm {norm}.\n"
                    "Lower lr, lengthen the schedule's warmup, or clip harder; states saved before can be resumed."
                )
            run.advance(settings.batch, mean_loss, norm)
            bar.update(settings.batch)
            bar.set_postfix(loss=f"{mean_loss:.4f}", refresh=False)

            if _due(run.seen, settings.log_every or settings.batch, settings):
                row = run.log({part: settings.lr[part] * rate for part in settings.lr})
                if on_log and accelerator.is_main_process:
                    on_log(row)
            if on_sample and accelerator.is_main_process and _due(run.seen, settings.sample_every, settings):
                with run.averaged(), torch.no_grad():
                    denoiser.eval()
                    on_sample(networks, run.seen)
                    denoiser.train()
            if _due(run.seen, settings.save_every, settings):
                if accelerator.is_main_process:
                    run.save(scratch / STATE)
                accelerator.wait_for_everyone()
    run.finish()
    denoiser.eval().requires_grad_(True)
    report.seen, report.rows = run.seen, run.rows
    if validation:
        report.after = validation_loss(networks, *validation)
    return report


@dataclass
class MicroBatch:
    """Tensors of one forward pass, B images."""

    noisy: Tensor
    """(B, C, H, W)"""
    noise: Tensor
    timesteps: Tensor
    """(B,) int64"""
    alpha_bar: Tensor
    """(B,)"""
    ids_1: Tensor
    """(B, 77) int64"""
    ids_2: Tensor
    time_ids: Tensor
    """(B, 6)"""

    def to(self, device: torch.device) -> MicroBatch:
        return MicroBatch(**{name: value.to(device) for name, value in vars(self).items()})


def draw_micro_batch(
    networks: Networks,
    pictures: Sequence[CaptionedPicture],
    clean: Tensor,
    images: Sequence[int],
    alphas: Tensor,
    settings: TrainSettings,
) -> MicroBatch:
    """Noise, timesteps and captions of pictures with latents `clean`; `images` are their numbers in the run."""
    texts = [
        caption_text(
            picture.caption,
            settings.seed,
            image,
            shuffle=settings.shuffle,
            tag_dropout=settings.tag_dropout,
            caption_dropout=settings.caption_dropout,
        )
        for picture, image in zip(pictures, images, strict=True)
    ]
    noise = draw_noise(clean.shape[1:], settings.seed, images)
    timesteps = draw_timesteps(len(alphas), settings.seed, images)
    alpha_bar = alphas[timesteps]
    ids_1, ids_2 = tokenize(networks, texts)
    return MicroBatch(add_noise(clean, noise, alpha_bar), noise, timesteps, alpha_bar, ids_1, ids_2, time_ids(pictures))


def freeze(denoiser: Denoiser, lr: Mapping[str, float]) -> None:
    """Leave gradients on for parts with a learning rate, but for what no loss reaches.

    SDXL reads the first text encoder's penultimate states: its last layer and final norm would stay without
    gradient, and distributed training would wait for it.
    """
    for part, rate in lr.items():
        getattr(denoiser, part).requires_grad_(rate > 0)
    denoiser.te1.encoder.layers[-1].requires_grad_(False)
    denoiser.te1.final_layer_norm.requires_grad_(False)


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
) -> tuple[float, float]:
    """Accumulate the micro-batches' gradients and step once; the mean loss over all processes and the gradient norm."""
    losses: list[Tensor] = []
    norm = torch.zeros(())
    for micro in micro_batches:
        micro = micro.to(accelerator.device)
        with accelerator.accumulate(model):
            predicted = model(micro.noisy, micro.timesteps, micro.ids_1, micro.ids_2, micro.time_ids)
            loss = loss_per_image(predicted, micro.noise, micro.alpha_bar).mean()
            accelerator.backward(loss)
            losses.append(loss.detach())
            if accelerator.sync_gradients:
                parameters = [p for group in stepper.param_groups for p in group["params"]]
                norm = accelerator.clip_grad_norm_(parameters, clip or math.inf)
            stepper.step()
            stepper.zero_grad(set_to_none=True)
    return accelerator.reduce(torch.stack(losses).mean(), "mean").item(), float(norm)


def _due(seen: int, every: int, settings: TrainSettings) -> bool:
    """Whether the step that ended at `seen` crossed a multiple of `every`, or was the last."""
    return every > 0 and (seen // every > (seen - settings.batch) // every or seen == settings.images)


class _Run:
    """What changes while training, and its file."""

    def __init__(self, denoiser: Denoiser, optimizer: torch.optim.Optimizer, ema: float, identity: str) -> None:
        self.names = {name: p for name, p in denoiser.named_parameters() if p.requires_grad}
        self.optimizer = optimizer
        self.decay = ema
        self.identity = identity
        self.ema = {name: p.detach().float().clone() for name, p in self.names.items()} if ema else {}
        self.seen = 0
        self.steps = 0
        self.rows: list[LogRow] = []
        self.pending: list[tuple[float, float]] = []
        """(loss, gradient norm) of steps since the last row."""
        self.before: ValidationLoss | None = None

    @torch.no_grad()
    def advance(self, images: int, loss: float, norm: float) -> None:
        """Count a finished optimizer step and move the average."""
        self.seen += images
        self.steps += 1
        self.pending.append((loss, norm))
        if self.ema:
            # A short memory at first, so that the start is forgotten.
            decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
            torch._foreach_lerp_(list(self.ema.values()), [p.data for p in self.names.values()], 1 - decay)

    def log(self, lr: dict[str, float]) -> LogRow:
        losses, norms = zip(*self.pending, strict=True)
        row = LogRow(self.seen, sum(losses) / len(losses), sum(norms) / len(norms), lr)
        self.rows.append(row)
        self.pending = []
        return row

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights in the live modules, while it lasts."""
        raw = {name: self.names[name].data for name in self.ema}
        for name, average in self.ema.items():
            self.names[name].data = average
        try:
            yield
        finally:
            for name, value in raw.items():
                self.names[name].data = value

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the average, if there is one, as the weights."""
        for name, average in self.ema.items():
            self.names[name].copy_(average)

    def save(self, path: Path) -> None:
        tensors: dict[str, Tensor] = {f"weights.{name}": p for name, p in self.names.items()}
        tensors |= {f"ema.{name}": average for name, average in self.ema.items()}
        for name, p in self.names.items():
            tensors |= {f"optimizer.{name}/{key}": value for key, value in self.optimizer.state[p].items()}
        progress = {
            "identity": self.identity,
            "seen": self.seen,
            "steps": self.steps,
            "rows": [asdict(row) for row in self.rows],
            "pending": self.pending,
            "before": asdict(self.before) if self.before else None,
        }
        write_tensors(path, tensors, {"progress": json.dumps(progress)})

    @torch.no_grad()
    def restore(self, path: Path) -> None:
        """Go on from the state at `path`, if there is one."""
        if not path.exists():
            return
        with safe_open(path, "pt") as file:
            progress = json.loads(file.metadata()["progress"])
        if progress["identity"] != self.identity:
            raise BadSetting(
                f"{path} is the state of a run with other settings or captions.\n"
                "Give this run its own scratch folder, or remove the file."
            )
        tensors = read_tensors(path)
        for name, p in self.names.items():
            p.copy_(tensors[f"weights.{name}"])
        for name, average in self.ema.items():
            average.copy_(tensors[f"ema.{name}"])
        self._restore_optimizer({key: value for key, value in tensors.items() if key.startswith("optimizer.")})
        self.seen, self.steps = progress["seen"], progress["steps"]
        self.rows = [LogRow(**row) for row in progress["rows"]]
        self.pending = [(loss, norm) for loss, norm in progress["pending"]]
        if progress["before"]:
            by_timestep = {int(t): value for t, value in progress["before"]["by_timestep"].items()}
            self.before = ValidationLoss(**{**progress["before"], "by_timestep": by_timestep})

    def _restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Through the optimizer's own loading, which knows where each value must lie."""
        values = self.optimizer.state_dict()
        order = [p for group in self.optimizer.param_groups for p in group["params"]]
        index = {id(p): n for n, p in enumerate(order)}
        values["state"] = {n: {} for n in range(len(order))}
        for key, value in tensors.items():
            name, field_name = key.removeprefix("optimizer.").split("/")
            values["state"][index[id(self.names[name])]][field_name] = value.clone()
        self.optimizer.load_state_dict(values)
