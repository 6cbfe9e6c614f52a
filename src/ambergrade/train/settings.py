"""What a training run computes: everything that changes its result, nothing about where it runs."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ambergrade.errors import BadSetting, UnknownName

PARTS = ("unet", "te1", "te2")


@dataclass(frozen=True)
class TrainSettings:
    """The keys of conf/trainer/*.yaml. Counts are images; an optimizer step is `batch` of them."""

    images: int
    """Images to see in all; a multiple of `batch`."""
    batch: int
    """Images of one optimizer step, over all processes: accumulation is derived, batch / (micro * processes)."""
    micro: int
    """Images of one forward and backward pass on one process."""
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
    ema: float = 0.0
    """Decay per step of an fp32 average of the weights, which then is the result; 0 is off."""
    precision: str = "fp32"
    """`fp32`, or `bf16`: fp32 weights under bf16 autocast."""
    seed: int = 0
    save_every: int = 0
    """Images between resumable states; 0 is none. Changes no result, as do the next two."""
    log_every: int = 0
    """Images between log rows, each a mean over them; 0 is one a step."""
    sample_every: int = 0
    """Images between calls of `on_sample`; 0 is none."""

    def __post_init__(self) -> None:
        complaints = []
        if self.batch < 1 or self.images < self.batch or self.images % self.batch:
            near = max(1, round(self.images / max(1, self.batch))) * self.batch
            complaints.append(f"images {self.images} is no multiple of batch {self.batch}: the nearest is {near}")
        if set(self.lr) != set(PARTS) or any(rate < 0 for rate in self.lr.values()) or not any(self.lr.values()):
            complaints.append(f"lr needs {', '.join(PARTS)}, none negative and one above 0, found {dict(self.lr)}")
        if self.precision not in ("fp32", "bf16"):
            complaints.append(f"precision is fp32 or bf16, found {self.precision!r}")
        for name in ("caption_dropout", "tag_dropout", "ema"):
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

    def accumulation(self, processes: int) -> int:
        """Passes per optimizer step on each of `processes`. Raises BadSetting saying which `micro` fit."""
        steps, rest = divmod(self.batch, self.micro * processes)
        if self.micro < 1 or rest or not steps:
            fit = [n for n in range(1, self.batch + 1) if self.batch % (n * processes) == 0]
            what = f"micro may be {', '.join(map(str, fit))}" if fit else f"batch must be a multiple of {processes}"
            raise BadSetting(
                f"batch {self.batch} cannot be made of {processes} process(es) with micro {self.micro}: {what}."
            )
        return steps


def plug(kind: str, function: str, chosen: Mapping[str, Any]) -> Callable[..., Any]:
    """`function` of the file `train/<kind>/<chosen name>.py`, with its parameters filled in.

    Raises UnknownName for a file or a parameter that is not there.
    """
    folder = Path(__file__).parent / kind
    known = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    if chosen["name"] not in known:
        raise UnknownName(f"file in train/{kind}:", chosen["name"], known)
    found = getattr(importlib.import_module(f"ambergrade.train.{kind}.{chosen['name']}"), function)
    parameters = {key: value for key, value in chosen.items() if key != "name"}
    takes = [p.name for p in inspect.signature(found).parameters.values() if p.kind is p.KEYWORD_ONLY]
    for key in parameters:
        if key not in takes:
            raise UnknownName(f"parameter of {kind}/{chosen['name']}:", key, takes)
    return functools.partial(found, **parameters)
