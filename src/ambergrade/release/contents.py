"""Defines what a release is made of: the typed input of `release.build` and `release.card`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ambergrade.errors import BadInput
from ambergrade.nouns import Measurement, SamplerSettings

FILE_NAME = r"\w[^/\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]*"
MOST_LETTERS = 60


@dataclass(frozen=True)
class Prompts:
    """Names the prompts that were scored."""

    name: str
    count: int
    digest: str = ""


@dataclass(frozen=True)
class Scorer:
    """Identifies what gave a metric's numbers."""

    fingerprint: str
    tiny: bool = False
    """Whether it is one of the embedded world's."""


@dataclass(frozen=True)
class Evaluation:
    """Holds the scores on held-out prompts, and the sweep's verdict."""

    prompts: Prompts
    sampler: SamplerSettings
    objective: str
    """The metric that the sweep's points were chosen by."""
    scores: Mapping[str, Mapping[str, Measurement]]
    """Metric to model to number."""
    winner_set: Sequence[Mapping[str, float]]
    """Points that are not significantly different from the best."""
    scorers: Mapping[str, Scorer]
    differences: Mapping[str, Mapping[str, Measurement]] = field(default_factory=dict)
    """Metric to other model to the winner minus that model, paired."""


@dataclass(frozen=True)
class ReleaseContents:
    """Holds everything that a release folder says."""

    name: str
    version: str
    license: str
    family: str
    """Name of the yaml in conf/family."""
    config: str
    """What diffusers' `from_single_file(config=…)` needs: a hub id or `builtin://<family>`."""
    checkpoint: Path
    """One safetensors file."""
    recipe: Mapping[str, Any]
    """`merge.files.recipe_document` of the checkpoint."""
    evaluation: Evaluation
    contact_sheet: Path
    heat_map: Path | None = None
    training: Mapping[str, Any] | None = None
    """Facts for the card, shown in the order given."""
    captions: Mapping[str, Any] | None = None
    """As `training`."""
    lineage: Mapping[str, Any] | None = None
    """Anything that names inputs by digest."""
    summary: str = ""
    checkpoint_sha256: str | None = None
    """The file's sha256, as a record says it; other bytes are refused. None: it is not known."""

    def __post_init__(self) -> None:
        for what, text in (("name", self.name), ("version", self.version)):
            if not re.fullmatch(FILE_NAME, text) or len(text) > MOST_LETTERS:
                raise BadInput(
                    f"The release's {what} {text[:120]!r} cannot be part of a file name.\nBegin with a letter or a "
                    f"digit, and use no slash, no line break and at most {MOST_LETTERS} letters."
                )
        if self.checkpoint.suffix != ".safetensors":
            raise BadInput(
                f"A release holds safetensors only, found {self.checkpoint.name}.\nWrite the weights as safetensors."
            )
        missing = [key for key in ("formula", "coefficients", "models", "dtype") if key not in self.recipe]
        if missing:
            raise BadInput(f"The release's recipe lacks {', '.join(missing)}.\nMake it by merge.files.recipe_document.")

    @property
    def file(self) -> str:
        """Return the name of the weights in the folder."""
        return f"{self.name}-{self.version}.safetensors"
