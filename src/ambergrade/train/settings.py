"""Describes what a training run computes: everything that changes its result, nothing about where it runs."""

from __future__ import annotations

import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ambergrade import typed
from ambergrade.errors import BadSetting, UnknownName

WHERE = ("save_every", "log_every", "sample_every", "validate_every", "checkpointing", "in_backward")
"""Settings that change no result, so no identity either."""
KINDS = {"schedule": ("schedules", "factor"), "loss": ("losses", "loss"), "optimizer": ("optimizers", "optimizer")}
"""Setting that names a file to the file's folder in `train/` and the function in it."""


@dataclass(frozen=True)
class LoraSettings:
    """Adapters that are trained instead of the weights."""

    rank: int
    alpha: float
    """An adapter adds alpha / rank times its product."""
    kind: Literal["lora", "locon", "loha", "lokr"] = "lora"
    """`lora` is peft's, the others are LyCORIS'."""
    factor: int = -1
    """Splits LoKr's product; a huge rank leaves it whole."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise BadSetting(f"rank and alpha must be above 0; found rank {self.rank}, alpha {self.alpha:g}.")


@dataclass(frozen=True)
class TrainSettings:
    """The keys of conf/trainer/*.yaml. Counts are images; an optimizer step is `batch` of them."""

    images: int
    """Images to see in all; a multiple of `batch`."""
    batch: int
    """Images of one optimizer step, over all processes: accumulation is derived, batch / (micro * processes)."""
    micro: int
    """Most images of one forward and backward pass on one process; where a process's share of a batch is less, so many
    as the share."""
    lr: Mapping[str, float]
    """Peak learning rates of the family's parts, such as `unet`, `te1` and `te2`; 0 freezes the part."""
    schedule: Mapping[str, Any]
    """`name` of a file in train/schedules and its parameters."""
    loss: Mapping[str, Any]
    """`name` of a file in train/losses and its parameters."""
    optimizer: Mapping[str, Any]
    """`name` of a file in train/optimizers and its parameters."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 is no clipping."""
    shuffle: bool = True
    """Shuffle the flexible part of captions."""
    caption_dropout: float = 0.0
    """Probability of the empty caption."""
    tag_dropout: float = 0.0
    """Probability, per flexible tag, of leaving it out."""
    group_dropout: float = 0.0
    """Probability, per group of flexible tags (the recipe's parts), of leaving it out whole."""
    tokens: Literal[75, 150, 225] = 75
    """Most tokens of a caption: 75, 150 or 225, in one, two or three windows of the text encoders."""
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    """Tag as spelled in the caption to a factor of its pictures' loss; the factors of several tags multiply."""
    noise_offset: float = 0.0
    """Strength of the noise that a whole channel shares; 0.0357 is usual."""
    pyramid_noise: float = 0.0
    """Weight of each coarser level of noise relative to the finer; 0 is off, 0.3 usual."""
    input_noise: float = 0.0
    """Strength of extra noise that the model sees and is not asked for; 0.1 is usual."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that its last step is all noise; needs a v-prediction loss."""
    ema: float = 0.0
    """Decay per step of an fp32 average of the weights, which then is the result; 0 is off."""
    precision: Literal["fp32", "bf16", "bf16-sr", "bf16-plain"] = "fp32"
    """`fp32`; `bf16`: fp32 weights under bf16 autocast; `bf16-sr`: bf16 weights, rounded stochastically by the
    optimizer; `bf16-plain`: bf16 weights, refused where most steps would be rounded away."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """What is computed again in the backward pass to save memory: `none`, `selective` (the UNet's deepest level and
    middle, where most activations of attention lie) or `full` (all blocks, and the text encoders). Same numbers."""
    in_backward: bool = False
    """Step each weight as soon as its gradient is whole and free the gradient: the same numbers with no second copy of
    the weights for gradients. Needs one pass per step (`micro` = `batch`), one process, and no clipping."""
    compile: bool = False
    """Compile the UNet's repeated blocks."""
    channels_last: bool = True
    """Keep the UNet's pictures with channels innermost, as convolutions want them; false sums in another order."""
    train_embeddings: bool = True
    """False leaves the text encoders' tables of tokens and positions as they are, whose rarely read rows drift."""
    lora: LoraSettings | None = None
    """Null: full fine-tuning. Else adapters of the parts with a learning rate."""
    seed: int = 0
    save_every: int = 0
    """Images between resumable states; 0 is none. Changes no result, as do the next two."""
    log_every: int = 0
    """Images between log rows, each a mean over them; 0 is one a step."""
    sample_every: int = 0
    """Images between calls of `on_sample`; 0 is none."""
    validate_every: int = 0
    """Images between validation losses of the (averaged) weights on the way; 0 is before and after only."""

    def __post_init__(self) -> None:
        complaints = []
        if self.batch < 1 or self.images < self.batch or self.images % self.batch:
            near = max(1, round(self.images / max(1, self.batch))) * self.batch
            complaints.append(f"images {self.images} is no multiple of batch {self.batch}: the nearest is {near}")
        if any(rate < 0 for rate in self.lr.values()) or not any(self.lr.values()):
            complaints.append(f"lr needs a rate above 0 and none below, found {dict(self.lr)}")
        if self.micro < 1:
            complaints.append(f"micro must be at least 1, found {self.micro}")
        negative = [n for n in ("noise_offset", "pyramid_noise", "input_noise", "clip") if getattr(self, n) < 0]
        negative += [f"loss_weights.{tag}" for tag, weight in self.loss_weights.items() if weight < 0]
        if negative:
            complaints.append(f"{', '.join(negative)} must not be negative")
        if self.in_backward and self.clip:
            complaints.append(
                f"in_backward has no norm of the whole gradient to clip by: set clip to 0, or in_backward to false; "
                f"found clip {self.clip:g}"
            )
        for name in ("caption_dropout", "tag_dropout", "group_dropout", "ema"):
            if not 0 <= getattr(self, name) < 1:
                complaints.append(f"{name} lies in 0 ≤ {name} < 1, found {getattr(self, name)}")
        for name in KINDS:
            if "name" not in getattr(self, name):
                complaints.append(f"{name} needs a name, found {dict(getattr(self, name))}")
        if complaints:
            raise BadSetting("; ".join(complaints) + ".")

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> TrainSettings:
        """Check plain values, as a yaml gives them, without loading torch. Raises BadSetting, naming each wrong key."""
        return typed.settings(cls, values, "trainer")

    def check(self) -> None:
        """Try the schedule, loss and optimizer that the settings name, which loads torch: before anything slow.

        Raises BadSetting for a parameter that they do not take or a value that they cannot use, UnknownName for an
        unknown file.
        """
        import torch

        factor, loss, optimizer = (plug(kind, getattr(self, kind)) for kind in KINDS)
        for seen in (self.batch, self.images):
            rate = factor(seen, self.images)
            if not 0 <= rate <= 1:
                raise BadSetting(
                    f"trainer.schedule gives {rate:g} of the learning rate at {seen} images: not in 0 … 1."
                )
        if self.zero_terminal_snr and plug_module("loss", self.loss).PREDICTION == "epsilon":
            raise BadSetting(
                f"trainer.zero_terminal_snr=true needs a v-prediction loss, and {self.loss['name']} trains epsilon: at "
                "the last timestep the picture is all noise.\nTake loss@trainer.loss=v."
            )
        rounds = getattr(plug_module("optimizer", self.optimizer), "ROUNDS_STOCHASTICALLY", False)
        if self.precision == "bf16-sr" and not rounds:
            raise BadSetting(
                f"precision=bf16-sr needs an optimizer that rounds stochastically, and {self.optimizer['name']} does "
                "not.\nTake optimizer=adamw_sr, adafactor or lion, or precision=bf16."
            )
        one = torch.ones(1, 1, 1, 1)
        error = float(loss(one, -one, torch.tensor([0.5])))
        if not (math.isfinite(error) and error > 0):
            raise BadSetting(f"trainer.loss gives {error:g} for a wrong prediction: nothing would be learned.")
        try:
            optimizer([{"params": [torch.nn.Parameter(one)], "lr": 1.0, "decayed": True}])
        except ValueError as complaint:
            raise BadSetting(f"trainer.optimizer: {complaint}.") from complaint

    @property
    def what(self) -> dict[str, Any]:
        """List the settings that decide the result, without those that say where and how often.

        A `micro` above the batch is the batch: the passes are the same.
        """
        chosen = asdict(replace(self, micro=min(self.micro, self.batch)))
        return {key: value for key, value in chosen.items() if key not in WHERE}

    def same_but_for_rounding(self) -> Iterator[TrainSettings]:
        """Yield other settings whose sums are these in another order, so that only last bits of the result differ."""
        for micro in (n for n in range(1, self.batch + 1) if self.batch % n == 0):
            for compiled in (False, True):
                for channels_last in (False, True):
                    other = replace(self, micro=micro, compile=compiled, channels_last=channels_last)
                    if other.what != self.what:
                        yield other

    def per_pass(self, processes: int) -> int:
        """Return the images of one pass on each of `processes`: `micro`, or a smaller share of the batch.

        Raises BadSetting saying which setting to change to what.
        """
        share, rest = divmod(self.batch, processes)
        found = f"batch {self.batch} cannot be made of {processes} process(es) with micro {self.micro}"
        if rest or not share:
            below, above = self.batch - rest, self.batch - rest + processes
            near = " or ".join(str(n) for n in (below, above) if n)
            raise BadSetting(f"{found}: set trainer.batch to a multiple of {processes}, such as {near}.")
        if self.micro < 1 or share % min(self.micro, share):
            fit = [n for n in range(1, share + 1) if share % n == 0]
            raise BadSetting(f"{found}: set trainer.micro to one of {', '.join(map(str, fit))}.")
        return min(self.micro, share)

    def accumulation(self, processes: int) -> int:
        """Return the passes per optimizer step on each of `processes`.

        Raises BadSetting where the batch does not divide, and where `in_backward` would need more passes than one.
        """
        passes = self.batch // (self.per_pass(processes) * processes)
        if self.in_backward and passes * processes > 1:
            raise BadSetting(
                f"in_backward steps within one pass of one process, and batch {self.batch} takes {passes} pass(es) on "
                f"{processes} process(es):\nset trainer.micro and trainer.batch to one number with processes=1, or "
                "trainer.in_backward=false."
            )
        return passes


def plug_module(kind: str, chosen: Mapping[str, Any]) -> Any:
    """Import the file that `trainer.<kind>` names. Raises UnknownName for one that is not there."""
    folder = Path(__file__).parent / KINDS[kind][0]
    known = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    if chosen["name"] not in known:
        raise UnknownName(f"trainer.{kind}", str(chosen["name"]), known)
    return importlib.import_module(f"ambergrade.train.{folder.name}.{chosen['name']}")


def plug(kind: str, chosen: Mapping[str, Any]) -> Callable[..., Any]:
    """Import the function that `trainer.<kind>` names, with its parameters filled in.

    Raises UnknownName for a file that is not there, BadSetting for a parameter that it does not take or whose type is
    another.
    """
    function = getattr(plug_module(kind, chosen), KINDS[kind][1])
    parameters = inspect.signature(function, eval_str=True).parameters.values()
    takes = [(p.name, p.annotation, field(default=p.default)) for p in parameters if p.kind is p.KEYWORD_ONLY]
    given = {key: value for key, value in chosen.items() if key != "name"}
    return functools.partial(function, **vars(typed.settings(make_dataclass(kind, takes), given, f"trainer.{kind}")))


def check_parts(settings: TrainSettings, parts: Sequence[str]) -> None:
    """Raise BadSetting unless there is a learning rate for each of a family's parts, and for nothing else."""
    if set(settings.lr) != set(parts):
        raise BadSetting(f"trainer.lr needs {', '.join(parts)}, found {', '.join(settings.lr)}.")
