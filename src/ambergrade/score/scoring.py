"""Scores a stream of pictures with a list of metrics, each a plug in score/metrics/."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ambergrade.errors import BadInput, BadSetting, UnknownName
from ambergrade.identity import digest
from ambergrade.nouns import Measurement, Picture, Prompt, PromptSet, SamplerSettings
from ambergrade.score import metrics as plugs
from ambergrade.score.reference import Reference
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import PairedDifference

MOST_FAULTY = 0.005
"""Share of pictures that may be faulty: a few NaN are an accident, more are a broken model (facts 5.21)."""


class Metric(Protocol):
    """A scorer: loaded once, asked batch by batch, and then set-level questions without the model.

    `conf/metric/clip_score.yaml` holds the constructor's arguments of `ClipScore` in
    `score/metrics/clip_score.py`. A plug derives from this class and overrides what it has to say.
    """

    name: str
    columns: Mapping[str, bool]
    """Per-picture column to whether higher is better."""
    fingerprint: Mapping[str, Any]
    """What made the numbers; plain JSON without paths."""
    needs_prompts: bool = True
    """Whether a picture without its prompt means nothing to it."""

    def rows(self, pictures: Sequence[Picture], prompts: Mapping[str, Prompt]) -> Mapping[str, npt.NDArray[Any]]:
        """(n,) for every name in `columns`, NaN where not scored; (n, d) for features to keep.

        Features are named `metric.what`, or `features.<digest>` by a network that several metrics share.
        """
        raise NotImplementedError

    def constants(self, prompts: Mapping[str, Prompt]) -> Mapping[str, Any]:
        """What the functions below need beside the rows; plain JSON."""
        return {}

    def references(self) -> Mapping[str, Reference]:
        """Reference statistics by their digest, which go into the sheet once for all metrics that name them."""
        return {}

    @classmethod
    def scores(cls, **settings: Any) -> Mapping[str, bool]:
        """The `columns` that it has when it is built with these settings; nothing is loaded."""
        return getattr(cls, "columns", {})

    @classmethod
    def aggregates(cls, sheet: ScoreSheet, *, seed: int) -> dict[str, Measurement]:
        """Set-level values beside the columns' means."""
        return {}

    @classmethod
    def differences(cls, sheet: ScoreSheet, baseline: ScoreSheet, *, seed: int) -> dict[str, PairedDifference]:
        """Paired differences of what `aggregates` gives."""
        return {}

    @classmethod
    def remarks(cls, sheet: ScoreSheet) -> list[str]:
        """What a reader of the numbers must know."""
        return []


def metric_class(name: str) -> type[Metric]:
    """`clip_score` to the class `ClipScore` of score/metrics/clip_score.py. Raises UnknownName."""
    known = [module.name for module in pkgutil.iter_modules(plugs.__path__)]
    if name not in known:
        raise UnknownName("metric", name, known)
    module = importlib.import_module(f"{plugs.__name__}.{name}")
    return cast(type[Metric], getattr(module, "".join(word.capitalize() for word in name.split("_"))))


def load_metric(name: str, **settings: Any) -> Metric:
    """Build the metric `name` with its constructor's arguments, as in conf/metric/<name>.yaml."""
    try:
        return metric_class(name)(**settings)
    except TypeError as error:
        if "argument" not in str(error):
            raise
        raise BadSetting(f"metric {name}: {error}.\nconf/metric/{name}.yaml lists its settings.") from error


def score(
    pictures: Iterable[Picture],
    prompts: PromptSet,
    metrics: Sequence[Metric],
    *,
    sampler: SamplerSettings | None = None,
    how: Mapping[str, Any] | None = None,
    batch: int = 32,
    progress: str = "score",
) -> ScoreSheet:
    """Score a stream, `batch` pictures in memory at a time; the rows come in the prompts' order, then by seed.

    `how`: what else made the pictures and pairs them, beside the sampler (a precision, say). `batch` changes rows by
    rounding at most (about 1e-6).
    A picture with a `fault` has NaN in every column and its reason in the sheet; it is never worth 0.
    Raises BadInput for a picture of an unknown prompt, a repeated picture, pixels of another kind, no picture at all,
    or more than 0.5 % faulty pictures, all of them by name.
    """
    by_id = prompts.by_id()
    keys: list[tuple[str, int]] = []
    faults: dict[tuple[str, int], str] = {}
    blank: list[str] = []
    parts: dict[str, list[npt.NDArray[Any]]] = {}
    stream = iter(tqdm(pictures, desc=progress, unit="picture", total=len(prompts.prompts), disable=None))
    while some := list(itertools.islice(stream, batch)):
        for picture in some:
            _check(picture, by_id)
        sound = [picture for picture in some if not picture.fault]
        faults |= {(picture.prompt_id, picture.seed): picture.fault for picture in some if picture.fault}
        blank += [f"{p.prompt_id} {p.seed}" for p in sound if (p.pixels == p.pixels[0, 0]).all()]
        keys += [(picture.prompt_id, picture.seed) for picture in sound]
        if sound:
            for name, values in _rows(metrics, sound, by_id).items():
                parts.setdefault(name, []).append(values)
    if not keys and not faults:
        raise BadInput("No pictures to score: the stream was empty.")
    _refuse_faults(faults, len(keys) + len(faults))
    keys += faults
    if len(set(keys)) < len(keys):
        twice = sorted({key for key in keys if keys.count(key) > 1})[:3]
        raise BadInput(f"Pictures repeat (prompt, seed): {twice}.\nGive every picture of a prompt its own seed.")

    place = {prompt.id: number for number, prompt in enumerate(prompts.prompts)}
    order = sorted(range(len(keys)), key=lambda i: (place[keys[i][0]], keys[i][1]))
    arrays = {name: _with_gaps(np.concatenate(values), len(faults))[order] for name, values in parts.items()}
    columns = {column: better for metric in metrics for column, better in metric.columns.items()}
    return ScoreSheet(
        prompt_ids=tuple(keys[i][0] for i in order),
        seeds=tuple(keys[i][1] for i in order),
        columns={name: arrays[name].astype(np.float64) for name in columns},
        features={name: values.astype(np.float32) for name, values in arrays.items() if name not in columns},
        higher_is_better=columns,
        fingerprints={metric.name: metric.fingerprint for metric in metrics},
        constants={metric.name: metric.constants(by_id) for metric in metrics},
        references={key: value for metric in metrics for key, value in metric.references().items()},
        sampler={} if sampler is None else {**asdict(sampler), **(how or {})},
        prompts_digest=digest([by_id[keys[i][0]] for i in order]),
        faults={f"{key} {seed}": reason for (key, seed), reason in sorted(faults.items())},
        blank=tuple(sorted(blank)),
    )


def _refuse_faults(faults: Mapping[tuple[str, int], str], total: int) -> None:
    if len(faults) > MOST_FAULTY * total:
        told = [f"{key}, seed {seed}: {reason}" for (key, seed), reason in sorted(faults.items())]
        more = [f"… and {len(told) - 12} more"] if len(told) > 12 else []
        raise BadInput(
            f"{len(faults)} of {total} pictures are faulty, more than {MOST_FAULTY:.1%}:\n  "
            + "\n  ".join(told[:12] + more)
            + "\nMend or take out the files, or look at the checkpoint's weights and the VAE's precision."
        )


def _with_gaps(values: npt.NDArray[Any], missing: int) -> npt.NDArray[Any]:
    """The rows, and NaN rows for pictures that are not there."""
    return np.concatenate([values, np.full((missing, *values.shape[1:]), np.nan)]) if missing else values


def _rows(
    metrics: Sequence[Metric], pictures: Sequence[Picture], prompts: Mapping[str, Prompt]
) -> dict[str, npt.NDArray[Any]]:
    """Every metric's rows of one batch. A scorer that fails ends the scoring: its pictures are never worth 0."""
    found: dict[str, npt.NDArray[Any]] = {}
    for metric in metrics:
        try:
            mine = metric.rows(pictures, prompts)
        except Exception as error:
            keys = [(picture.prompt_id, picture.seed) for picture in pictures]
            error.add_note(f"Raised by the metric {metric.name} on the pictures {keys[:4]} … of {len(keys)}.")
            raise
        for name, values in mine.items():
            if np.isinf(values).any():
                row = int(np.argwhere(np.isinf(values))[0][0])
                key = f"prompt '{pictures[row].prompt_id}', seed {pictures[row].seed}"
                raise BadInput(f"The metric {metric.name} gives infinity as {name} of {key}: look at its weights.")
        found |= mine
    return found


def _check(picture: Picture, prompts: Mapping[str, Prompt]) -> None:
    """One picture contract, so that no scorer rescales what is already scaled (facts 0.2)."""
    pixels = picture.pixels
    if not picture.fault and (pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size):
        raise BadInput(
            f"Picture of prompt {picture.prompt_id}: {pixels.dtype} {pixels.shape}.\n"
            "Give height × width × 3 uint8 RGB, 0 to 255."
        )
    if picture.prompt_id not in prompts:
        raise UnknownName("prompt", picture.prompt_id, prompts)
