"""What a training run computes: everything that changes its result, nothing about where it runs."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ambergrade.errors import BadSetting, UnknownName

PARTS = ("unet", "te1", "te2")
PRECISIONS = ("fp32", "bf16", "bf16-sr", "bf16-plain")
TOKENS = (75, 150, 225)
ADAPTERS = ("lora", "locon", "loha", "lokr")
CHECKPOINTING = ("none", "selective", "full")
WHERE = ("save_every", "log_every", "sample_every", "validate_every", "checkpointing", "in_backward")
"""Settings that change no result, so no identity either."""
ADDED = {"channels_last": True, "train_embeddings": True}
"""Settings that came later, with their defaults: at these they are in no identity."""


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
    """Peak learning rates of `unet`, `te1`, `te2`; 0 freezes the part."""
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
    tokens: int = 75
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
    precision: str = "fp32"
    """`fp32`; `bf16`: fp32 weights under bf16 autocast; `bf16-sr`: bf16 weights, rounded stochastically by the
    optimizer; `bf16-plain`: bf16 weights, refused where most steps would be rounded away."""
    checkpointing: str = "none"
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
    lora: Mapping[str, Any] | None = None
    """Null: full fine-tuning. Else adapters of the parts with a learning rate: `rank`, `alpha`, `kind`: `lora` (peft;
    the default), `locon`, `loha` or `lokr` (LyCORIS; `factor` splits LoKr's product, a huge rank leaves it whole)."""
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
        if set(self.lr) != set(PARTS) or any(rate < 0 for rate in self.lr.values()) or not any(self.lr.values()):
            complaints.append(f"lr needs {', '.join(PARTS)}, none negative and one above 0, found {dict(self.lr)}")
        for name, known in (("precision", PRECISIONS), ("tokens", TOKENS), ("checkpointing", CHECKPOINTING)):
            if getattr(self, name) not in known:
                complaints.append(f"{name} is one of {', '.join(map(str, known))}; found {getattr(self, name)!r}")
        negative = [n for n in ("noise_offset", "pyramid_noise", "input_noise", "clip") if getattr(self, n) < 0]
        negative += [f"loss_weights.{tag}" for tag, weight in self.loss_weights.items() if weight < 0]
        if negative:
            complaints.append(f"{', '.join(negative)} must not be negative")
        if self.in_backward and self.clip:
            complaints.append(
                f"in_backward has no norm of the whole gradient to clip by: set clip to 0, or in_backward to false; "
                f"found clip {self.clip:g}"
            )
        if self.lora is not None:
            if not {"rank", "alpha"} <= set(self.lora) <= {"rank", "alpha", "kind", "factor"}:
                complaints.append(f"lora needs rank and alpha, and may have kind and factor; found {dict(self.lora)}")
            if self.lora.get("kind", "lora") not in ADAPTERS:
                complaints.append(f"lora.kind is one of {', '.join(ADAPTERS)}; found {self.lora['kind']!r}")
        for name in ("caption_dropout", "tag_dropout", "group_dropout", "ema"):
            if not 0 <= getattr(self, name) < 1:
                complaints.append(f"{name} lies in 0 ≤ {name} < 1, found {getattr(self, name)}")
        for name in ("schedule", "loss", "optimizer"):
            if "name" not in getattr(self, name):
                complaints.append(f"{name} needs a name, found {dict(getattr(self, name))}")
        if complaints:
            raise BadSetting("Training settings cannot be used: " + "; ".join(complaints) + ".")

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> TrainSettings:
        """Settings of plain values, as a yaml gives them. Raises UnknownName or BadSetting."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise UnknownName("training setting", key, known)
        absent = [f for f in ("images", "batch", "micro", "lr", "schedule", "loss", "optimizer") if f not in values]
        if absent:
            raise BadSetting(f"Training settings lack {', '.join(absent)}.")
        return cls(**values)

    @property
    def what(self) -> dict[str, Any]:
        """The settings that decide the result, without those that say where and how often."""
        said = {key: value for key, value in asdict(self).items() if key not in WHERE}
        return {key: value for key, value in said.items() if key not in ADDED or value != ADDED[key]}

    def per_pass(self, processes: int) -> int:
        """Images of one forward and backward pass on each of `processes`: `micro`, or a smaller share of the batch.

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
        """Passes per optimizer step on each of `processes`.

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
    """The file `train/<kind>/<chosen name>.py`. Raises UnknownName for one that is not there."""
    folder = Path(__file__).parent / kind
    known = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    if chosen["name"] not in known:
        raise UnknownName(f"file in train/{kind}:", chosen["name"], known)
    return importlib.import_module(f"ambergrade.train.{kind}.{chosen['name']}")


def plug(kind: str, function: str, chosen: Mapping[str, Any]) -> Callable[..., Any]:
    """`function` of the file `train/<kind>/<chosen name>.py`, with its parameters filled in.

    Raises UnknownName for a file or a parameter that is not there.
    """
    found = getattr(plug_module(kind, chosen), function)
    parameters = {key: value for key, value in chosen.items() if key != "name"}
    takes = [p.name for p in inspect.signature(found).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for key in parameters:
        if key not in takes:
            raise UnknownName(f"parameter of {kind}/{chosen['name']}:", key, takes)
    return functools.partial(found, **parameters)
