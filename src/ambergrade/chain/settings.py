"""Declares the settings of every pipeline: one frozen dataclass each, read once at the door (`ambergrade.typed`).

The fields are the keys of conf/<pipeline>.yaml, where each has its comment. This module imports nothing heavy, so that
a wrong value is told before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ambergrade.captions.recipe import CaptionRecipe
from ambergrade.captions.settings import Limits, Selection
from ambergrade.errors import BadSetting, UnknownName
from ambergrade.nouns import SamplerSettings
from ambergrade.release.facts import Origin, check_name
from ambergrade.release.licenses import load_license
from ambergrade.store import find_file
from ambergrade.train.settings import TrainSettings, check_parts
from ambergrade.typed import Plugin

Values = Mapping[str, Sequence[float | str | bool] | Mapping[str, float | bool]]
"""The axes of a search: name to listed values, or to a range {low, high} with step or log."""


@dataclass(frozen=True)
class Invocation:
    """Tells which command asked for the work: for the journal, never for an identity."""

    line: str = ""
    """The command as it was typed."""
    overrides: tuple[str, ...] = ()
    """Its overrides, secrets masked."""
    secret: tuple[str, ...] = ()
    """Dotted keys of settings that came from the environment or look like secrets: masked wherever they are shown."""


@dataclass(frozen=True)
class Compute:
    """Where and how fast; never part of an identity."""

    device: Literal["auto", "cpu", "cuda"] = "cpu"
    threads: int | None = None
    """Threads of each process; null leaves torch's choice."""
    workers: int = 1
    portable: bool = False
    """The same bits on every x86-64 processor with AVX2: see `chain.portable`. This one is part of every identity."""

    def __post_init__(self) -> None:
        if self.portable and (self.device, self.threads) != ("cpu", 1):
            raise BadSetting(
                f"compute.portable needs device=cpu and threads=1, found {self.device} and {self.threads}.\n"
                "Give compute=portable."
            )
        if (self.threads is not None and self.threads < 1) or self.workers < 1:
            raise BadSetting(f"threads and workers are at least 1, found {self.threads} and {self.workers}.")


@dataclass(frozen=True)
class FamilySettings:
    """A model family, and the sizes of the pictures it is trained on (pixels)."""

    name: str
    config: str
    resolution: int
    bucket_step: int
    min_side: int
    max_side: int


@dataclass(frozen=True)
class Drawing:
    """What the embedded world draws; the arguments of `world.booru.write_booru`."""

    seed: int
    count: int
    prompts: int = 40
    references: int = 200
    tag_noise: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSettings:
    database: str
    pictures: str
    selection: Selection
    draw: Drawing | None = None
    folder: str | None = None
    """The folder that what is drawn lies in."""
    reference: str | None = None
    reference_pictures: str | None = None
    leave_out: str | None = None


@dataclass(frozen=True)
class MergeFormula:
    """A formula of conf/merge with the numbers that its author chose."""

    formula: str
    coefficients: Mapping[str, float]
    dtype: str | None = None
    policies: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchSettings:
    """A search of conf/search; `values` are its axes."""

    name: str
    objective: str
    values: Values = field(default_factory=dict)
    higher_is_better: bool = True
    start: Mapping[str, float | str | bool] | None = None
    trials: int | None = None
    seed: int | None = None
    sampler: str | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """The arguments of `search.load.search`: what is not set is left to the search."""
        given = {key: value for key, value in asdict(self).items() if value is not None}
        return {**given, "start": self.start}


@dataclass(frozen=True)
class PromptFiles:
    """Files of prompts: one set to choose by, and one for the last word. A count takes the first so many."""

    sweep: str
    heldout: str
    sweep_count: int | None = None
    heldout_count: int | None = None


@dataclass(frozen=True)
class Suite:
    """The metrics that pictures are scored with, by the name that a suite gives them."""

    metrics: Mapping[str, Plugin]
    contrast: Plugin | None = None
    networks: Mapping[str, str] = field(default_factory=dict)
    """Kind of network (clip, tagger, features) to its folder, for the metrics' yamls to refer to."""


@dataclass(frozen=True)
class ReleaseSettings:
    name: str
    version: str | int
    folder: Path
    license: str | None = None
    """A yaml of conf/license; None: the one that the parents' licences ask for."""
    summary: str = ""
    author: str = ""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """None: the merge's own."""
    diffusers: bool = False
    """Write the weights as a diffusers folder too."""
    parents: bool = False
    """Put copies of the models that it was merged from into it."""

    def __post_init__(self) -> None:
        check_name("name", self.name)
        check_name("version", str(self.version))
        if self.license is not None:
            load_license(self.license)


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every pipeline has. None of it changes a result."""

    root: Path
    """Holds mlruns/ with all results."""
    debug: bool = False

    def what(self, *where: str) -> dict[str, Any]:
        """The settings that decide a result: without those that every pipeline has and those that `where` names."""
        return {key: value for key, value in vars(self).items() if key not in ("root", "debug", "compute", *where)}


@dataclass(frozen=True, kw_only=True)
class Journaled(Common):
    """What every pipeline has that keeps a journal."""

    name: str
    """The name of the MLflow experiment."""
    compute: Compute


@dataclass(frozen=True, kw_only=True)
class Swept(Journaled):
    """What a sweep is made of, alone or within the whole story."""

    family: FamilySettings
    models: Mapping[str, str | None]
    data: DataSettings
    merge: MergeFormula
    search: SearchSettings
    prompts: PromptFiles
    sampler: SamplerSettings
    suite: Suite
    leaderboard: tuple[str, ...]
    sheet: int
    race: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class GammaSettings(Swept):
    """conf/gamma.yaml: the whole story."""

    captions: CaptionRecipe
    trainer: TrainSettings
    gates: Mapping[str, Plugin]
    base: str
    trained: str
    insist: bool
    release: ReleaseSettings
    origins: Mapping[str, Origin] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_networks(self.family, self.trainer)
        check_alias("base", self.base, self.models)
        check_formula_models(self.merge, {**self.models, self.trained: "made by the training stage"})

    def check_files(self) -> None:
        """Raise MissingObject for a file that will be needed and is not there."""
        for source in self.models.values():
            if source:
                find_file(source)


@dataclass(frozen=True, kw_only=True)
class TrainPipelineSettings(Journaled):
    """conf/train.yaml: a fine-tune alone."""

    family: FamilySettings
    models: Mapping[str, str | None]
    data: DataSettings
    captions: CaptionRecipe
    trainer: TrainSettings
    prompts: PromptFiles
    sampler: SamplerSettings
    base: str
    trained: str
    processes: int = 1
    out: Path | None = None
    plan: bool = False
    gpu: str = "h100"
    pictures: int = 0
    verify: Literal["resume", "gradients", "latents"] | None = None
    steps: int = 6
    kills: int = 2
    compared: int = 8

    def __post_init__(self) -> None:
        check_networks(self.family, self.trainer)
        check_alias("base", self.base, self.models)
        if self.processes < 1:
            raise BadSetting(f"processes is {self.processes}, at least 1 is needed.")
        self.trainer.accumulation(self.processes)

    def check_files(self) -> None:
        """Raise MissingObject for a file that will be needed and is not there."""
        find_file(self.models[self.base] or f"models.{self.base} (null)")


@dataclass(frozen=True, kw_only=True)
class SweepSettings(Swept):
    """conf/sweep.yaml: one point of a sweep, with what is the same for all of them."""

    write_winner: bool = True
    screen: tuple[str, ...] | None = None
    dry: bool = False
    why: str = ""

    def __post_init__(self) -> None:
        check_networks(self.family)
        check_formula_models(self.merge, self.models)

    def check_files(self) -> None:
        """Raise MissingObject for a model of the formula that is not there."""
        from ambergrade.merge.formula import Formula

        for alias in Formula.parse(self.merge.formula, self.models).models:
            find_file(self.models[alias] or "")


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings(Journaled):
    """conf/evaluate.yaml: scores of a model or of pictures, and what is done with score sheets."""

    family: FamilySettings
    sampler: SamplerSettings
    suite: Suite
    captions: CaptionRecipe
    action: Literal["score", "compare", "reference", "calibrate"] = "score"
    model: str | None = None
    pictures: str | None = None
    prompts_path: str | None = None
    count: int | None = None
    seeds: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    compiled: bool = False
    noise_batch: int | None = None
    noise_count: int = 12
    post: str | None = None
    reference: str | None = None
    reference_pictures: str | None = None
    primary: str = "tag_prob"
    sheet: str | tuple[str, ...] | None = None
    baseline: str | None = None
    margins: Mapping[str, float] = field(default_factory=dict)
    tagger: str = "builtin://tagger"
    out: Path | None = None

    def __post_init__(self) -> None:
        numbers = {"count": self.count, "seeds": self.seeds, "noise_batch": self.noise_batch}
        wrong = [f"{name} is {number}" for name, number in numbers.items() if number is not None and number < 1]
        if wrong or self.noise_count < 1:
            raise BadSetting(f"{', '.join(wrong) or f'noise_count is {self.noise_count}'}: at least 1 is needed.")
        self._check_given()
        files = [self.baseline, self.pictures, self.prompts_path, self.post, self.reference, self.reference_pictures]
        files += [self.sheet] if isinstance(self.sheet, str) else list(self.sheet or ())
        files += [self.model] if self.model is not None and not self.model.startswith("models:/") else []
        for file in files:
            if file is not None:
                find_file(file)
        if self.pictures is not None and not Path(self.pictures).is_dir():
            raise BadSetting(f"pictures={self.pictures} is no folder.")

    def _check_given(self) -> None:
        """Raise BadSetting for what the action needs and nobody gave."""
        needed = {"compare": ("sheet", "baseline"), "reference": ("reference",), "calibrate": ("pictures", "tagger")}
        missing = [name for name in needed.get(self.action, ()) if getattr(self, name) is None]
        if self.action == "score":
            if self.model is not None:
                check_networks(self.family)
            if (self.model is None) == (self.pictures is None):
                raise BadSetting(
                    "Give either model=… (pictures are drawn) or pictures=DIR (they are there), and not both."
                )
            if "fid" in self.suite.metrics and self.reference is None:
                missing.append("reference")
        if missing:
            given = " ".join(f"{name}=…" for name in missing)
            raise BadSetting(f"No value for: {', '.join(missing)}.\nGive it on the command line: {given}")


@dataclass(frozen=True)
class Percentiles:
    metric: Literal["score", "fav_count"] | None = None
    first_id: int = 0
    last_id: int | None = None


@dataclass(frozen=True, kw_only=True)
class DataPipelineSettings(Journaled):
    """conf/data.yaml: what is done with a booru before training."""

    family: FamilySettings
    data: DataSettings
    captions: CaptionRecipe
    action: Literal["build", "lint", "explain", "captions", "percentiles"]
    limits: Limits
    percentiles: Percentiles
    database: str | None = None
    pictures: str | None = None
    id: int | None = None
    out: Path | None = None


@dataclass(frozen=True, kw_only=True)
class MergePipelineSettings(Common):
    """conf/merge.yaml: one merge of files."""

    models: Mapping[str, str | None]
    merge: MergeFormula
    compute: Compute
    recipe: Path | None = None
    coefficients: Mapping[str, float] = field(default_factory=dict)
    models_path: Path | None = None
    out: Path | None = None
    dry_run: bool = False
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class VerifySettings(Common):
    """conf/verify.yaml: a merged file is made again from its own header."""

    compute: Compute
    model: Path
    models_path: Path


@dataclass(frozen=True, kw_only=True)
class ReindexSettings(Common):
    """conf/reindex.yaml: a lost MLflow database is made again."""


def check_networks(family: FamilySettings, trainer: TrainSettings | None = None) -> None:
    """Raise BadSetting for a family that cannot be trained and drawn with, or not by this trainer."""
    from ambergrade.family.load import family as named

    chosen = named(family.name)
    _ = chosen.networks
    if trainer is not None:
        check_parts(trainer, chosen.parts)


def check_alias(key: str, alias: str, models: Mapping[str, str | None]) -> None:
    """Raise UnknownName for an alias that no model of conf/models has."""
    if alias not in models:
        raise UnknownName(key, alias, models, "Aliases are in conf/models.")


def check_formula_models(merge: MergeFormula, models: Mapping[str, str | None]) -> None:
    """Raise BadSetting for a model that the formula names and no file is given for; MissingObject for a lost file."""
    from ambergrade.merge.formula import Formula

    formula = Formula.parse(merge.formula, models)
    formula.check_coefficients(merge.coefficients)
    missing = [alias for alias in formula.models if not models[alias]]
    if missing:
        raise BadSetting(
            f"The formula needs {', '.join(missing)}.\nName the file: models.{missing[0]}=PATH, "
            "for example the one that the train pipeline wrote."
        )
    for source in formula.lora_paths.values():
        find_file(source)
