"""The facts of a release: `release.json`. Everything else that is text in the folder is derived from them.

`Draft` is what is known before the weights are written, `ReleaseFacts` adds their digests and those of every other
file that is no paper. `papers.papers(facts)` derives the papers, so that anybody can derive them again and compare.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ambergrade.errors import BadInput, BadSetting
from ambergrade.nouns import Measurement, SamplerSettings
from ambergrade.release.licenses import License
from ambergrade.typed import plain, settings

FACTS = "release.json"
MOST_BYTES = 16 << 20
"""The longest release.json that is read."""
FILE_NAME = r"\w[^/\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]*"
MOST_LETTERS = 60


@dataclass(frozen=True)
class Prompts:
    """Names the prompts that were scored; they lie in prompts.jsonl with their seeds."""

    name: str
    count: int
    digest: str = ""


@dataclass(frozen=True)
class Scorer:
    """Identifies what gave a metric's numbers."""

    fingerprint: str
    tiny: bool = False
    """Whether it is one of the embedded world's."""
    settings: Mapping[str, Any] | None = None
    """What loads it anywhere (score.scoring.load_metric); None where that names a file that no stranger has."""


@dataclass(frozen=True)
class Score:
    """A measurement as JSON holds it: what was not scored (NaN) is null."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    """Pictures or prompts behind it."""
    higher_is_better: bool = True

    @classmethod
    def of(cls, found: Measurement) -> Score:
        """Return a measurement with null for NaN and infinity."""
        value, low, high = (
            number if abs(number) < float("inf") else None for number in (found.value, found.low, found.high)
        )
        return cls(value, low, high, found.n, found.higher_is_better)


@dataclass(frozen=True)
class Evaluation:
    """Holds the scores on held-out prompts, and the sweep's verdict. All but the verdict follows from the sheets."""

    prompts: Prompts
    sampler: SamplerSettings
    objective: str
    """The metric that the released point was chosen by; empty where nothing was chosen."""
    columns: tuple[str, ...]
    """The metrics that tables show, in their order."""
    sheets: Mapping[str, str]
    """Model, as tables call it, to its score sheet in the folder; the released model's first."""
    scores: Mapping[str, Mapping[str, Score]]
    """Metric to model to number."""
    scorers: Mapping[str, Scorer]
    differences: Mapping[str, Mapping[str, Score]] = field(default_factory=dict)
    """Metric to other model to the released model minus that one, paired."""
    winner_set: tuple[Mapping[str, float], ...] = ()
    """Points of the sweep that are not significantly different from the best; empty where there was no sweep."""

    def __post_init__(self) -> None:
        if not self.sheets:
            raise BadSetting("An evaluation names the score sheet that its numbers follow from.")

    @property
    def released(self) -> str:
        """Return what tables call the released model."""
        return next(iter(self.sheets))


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, as conf/origins says it."""

    license: str = "unknown"
    """A yaml of conf/license."""
    hub: str | None = None
    """Its id on the Hugging Face hub."""
    url: str | None = None
    """Its page elsewhere."""
    author: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Parent:
    """A model that the release was merged from: its digests, its file in the folder if it is there, its origin."""

    weights: str | None = None
    file: str | None = None
    name: str | None = None
    origin: Origin = field(default_factory=Origin)

    @property
    def digests(self) -> dict[str, str]:
        """Return what a recipe names it by."""
        given = {"name": self.name, "weights": self.weights, "file": self.file}
        return {key: text for key, text in given.items() if text is not None}


@dataclass(frozen=True)
class Recipe:
    """The merge that made the weights: the keys of recipe.yaml."""

    formula: str
    """As it was written."""
    coefficients: Mapping[str, float]
    dtype: str | None
    policies: Mapping[str, str]
    models: Mapping[str, Parent]
    ancestors: Mapping[str, Any] = field(default_factory=dict)
    """What the parents were merged from themselves, as their headers say it."""


@dataclass(frozen=True)
class Captions:
    """The captions that were trained on, and so the words that prompts are made of."""

    recipe: str
    """Name of the yaml in conf/captions."""
    manifest: str
    """Digest of the caption set: picture hashes, tags, recipe and selection."""
    pictures: int
    order: tuple[str, ...]
    """Parts of a caption in their order."""
    rating: Mapping[str, tuple[str, ...]]
    quality: tuple[str, ...]
    """Better to worse."""
    year: tuple[str, ...]
    """New to old."""


@dataclass(frozen=True)
class Training:
    """A parent that was trained for this release."""

    name: str
    """Its alias in the formula."""
    base: str
    base_weights: str
    """sha256 of the base's weights."""
    shown: Mapping[str, Any]
    """The settings that a card prints, in their order."""
    settings: Mapping[str, Any]
    """All of them: the keys of a yaml in conf/trainer."""
    captions: Captions


@dataclass(frozen=True)
class Sample:
    """A picture in samples/, with what drew it."""

    file: str
    text: str
    negative: str
    seed: int


@dataclass(frozen=True)
class Environment:
    """What the release was made with."""

    ambergrade: str
    python: str
    isa: str
    """The instruction set of torch's kernels, such as AVX2: training and pictures depend on it, merges do not."""
    lock: str | None
    """sha256 of requirements.lock, where the release was made from a checkout."""
    packages: Mapping[str, str]
    """Distribution to version: all that ambergrade needs, directly or not."""


@dataclass(frozen=True)
class File:
    """A file of the release that is no paper."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Weights:
    """The released file by every digest that people know it by."""

    name: str
    bytes: int
    file: str
    """sha256 of the file's bytes."""
    weights: str
    """sha256 over the tensors in name order, whatever the header says."""
    listed: Mapping[str, str]
    """AutoV1, AutoV2 and AutoV3, by which sites list it."""
    header: Mapping[str, str]
    """What its header says of the release, and the merge alone would not have put there."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """All that a release says, but for the digests of its files."""

    name: str
    version: str
    summary: str = ""
    author: str = ""
    license: str
    """A key of `licenses`."""
    license_why: str
    licenses: Mapping[str, License]
    """Every licence that the release or a parent is under."""
    family: str
    """Name of the yaml in conf/family."""
    architecture: str
    """ModelSpec's word for the family."""
    pipeline: str
    """The class of diffusers that draws with it."""
    resolution: int
    """Pixels; a picture's area is about its square."""
    recipe: Recipe | None
    """None where nobody knows how the weights were made."""
    training: Training | None = None
    """None where nothing was trained for this release."""
    evaluation: Evaluation
    samples: tuple[Sample, ...] = ()
    environment: Environment

    def __post_init__(self) -> None:
        check_name("name", self.name)
        check_name("version", self.version)
        if self.license not in self.licenses:
            raise BadSetting(f"The release is under {self.license}, which its licenses do not describe.")

    @property
    def file(self) -> str:
        """Return the name of the weights in the folder."""
        return f"{self.name}-{self.version}.safetensors"

    @property
    def parents(self) -> Mapping[str, Parent]:
        """Return the models that it was merged from."""
        return self.recipe.models if self.recipe else {}


@dataclass(frozen=True, kw_only=True)
class ReleaseFacts(Draft):
    """All that release.json says."""

    weights: Weights
    files: Mapping[str, File]
    """Relative name to digest, of every file that is neither a paper nor a list of files."""


def check_name(what: str, text: str) -> None:
    """Raise BadInput for a name or version that cannot be part of a file name."""
    if not re.fullmatch(FILE_NAME, text) or len(text) > MOST_LETTERS:
        raise BadInput(
            f"The release's {what} {text[:120]!r} cannot be part of a file name.\nBegin with a letter or a "
            f"digit, and use no slash, no line break and at most {MOST_LETTERS} letters."
        )


def write_facts(facts: Draft) -> str:
    """Return the text of release.json: keys in the order of the fields."""
    return json.dumps(plain(facts), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_facts(folder: Path) -> ReleaseFacts:
    """Read release.json of a folder that may be hostile. Raises BadInput for anything but the facts of a release."""
    file = folder / FACTS
    if file.is_symlink() or not file.is_file():
        raise BadInput(f"{folder} is no release: it has no {FACTS}.")
    with file.open("rb") as opened:
        text = opened.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise BadInput(f"{FACTS} has more than {MOST_BYTES:,} bytes: it holds no facts of a release.")
    return parse_facts(text)


def parse_facts(text: bytes) -> ReleaseFacts:
    """Read the text of a release.json. Raises BadInput as `read_facts`."""
    try:
        values = json.loads(text.decode(), parse_constant=_refuse, object_pairs_hook=_once)
        if b"\\ud" in text.lower():
            json.dumps(values, ensure_ascii=False).encode()  # half a character fits in no paper
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{FACTS} is no JSON: {str(error)[:120]}.") from None
    if not isinstance(values, dict):
        raise BadInput(f"{FACTS} is no JSON object.")
    try:
        return settings(ReleaseFacts, values)
    except (BadSetting, RecursionError) as error:
        told = "\n".join(line[:200] for line in str(error).splitlines()[:6])
        raise BadInput(f"{FACTS} does not hold the facts of a release.\n{told}") from None


def _refuse(text: str) -> None:
    raise ValueError(f"it holds the number {text}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"it gives '{next(key for key in names if names.count(key) > 1)[:80]}' twice")
    return found


def as_json(value: Any) -> str:
    """Return a value as the papers print JSON: sorted, one blank a level."""
    return json.dumps(plain(value), indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
