"""Declares the settings of the release pipeline, as `settings` does those of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ambergrade.chain.settings import (
    DataSettings,
    FamilySettings,
    Journaled,
    PromptFiles,
    ReleaseSettings,
    Suite,
)
from ambergrade.errors import BadSetting
from ambergrade.nouns import SamplerSettings
from ambergrade.release.facts import Origin
from ambergrade.store import find_file
from ambergrade.typed import Plugin


@dataclass(frozen=True, kw_only=True)
class ReleasePipelineSettings(Journaled):
    """conf/release.yaml: a release of a finished sweep, or of a model file."""

    family: FamilySettings
    origins: Mapping[str, Origin]
    data: DataSettings
    prompts: PromptFiles
    sampler: SamplerSettings
    suite: Suite
    gates: Mapping[str, Plugin]
    leaderboard: tuple[str, ...]
    sheet: int
    insist: bool
    release: ReleaseSettings
    sweep: Path | None = None
    point: Mapping[str, float] | None = None
    models: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    inputs: Path | None = None

    def __post_init__(self) -> None:
        if (self.sweep is None) == (self.model is None):
            raise BadSetting("Give either sweep=FOLDER (a finished sweep) or model=FILE, and not both.")
        if self.point and self.sweep is None:
            raise BadSetting("point names a point of a sweep: give sweep=FOLDER too.")
        for file in (self.sweep, self.inputs, self.model):
            if file is not None:
                find_file(str(file))
