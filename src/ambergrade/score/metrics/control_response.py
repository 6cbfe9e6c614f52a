"""Control response: what quality, year and rating words do to the same seed, measured by contrast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ambergrade.errors import BadSetting
from ambergrade.nouns import Measurement, Picture, Prompt, PromptSet
from ambergrade.score.contrast import contrasted, pairs
from ambergrade.score.metrics.mosaic import blockiness
from ambergrade.score.scoring import Metric
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import (
    Floats,
    PairedDifference,
    bootstrap_difference,
    mean_interval,
    percentile_interval,
    prompt_means,
    resampling_weights,
)

SEEN = ("sharpness", "saturation", "mosaic")


class ControlResponse(Metric):
    """Pairs of pictures that differ in one word (`contrast.contrasted`), on the same prompts and seeds.

    For each axis, with d_i the difference of the two pictures' features: `response_<axis>` = Σ_{i≠j} d_i·d_j /
    ((P-1)·Σ‖d_i‖²), the share of the change that is common to all prompts. Chance is 0: a word that only shuffles the
    picture changes each prompt its own way. `response_<axis>_<what>` is the first pole less the second in `sharpness`
    (mean step of luma, grey levels), `saturation` (largest less smallest channel, grey levels) and `mosaic`.
    """

    name = "control_response"
    columns: Mapping[str, bool] = {f"seen_{what}": what != "mosaic" for what in SEEN}

    def __init__(
        self,
        extractor: str,
        axes: Mapping[str, Sequence[str]],
        poles: Mapping[str, Sequence[str]],
        prompts: int | None = None,
        device: str = "cpu",
    ) -> None:
        """`axes`: axis to its words; `poles`: axis to the two that are contrasted; `prompts`: the first so many."""
        wrong = [axis for axis, pair in poles.items() if len(pair) != 2 or axis not in axes]
        if wrong:
            raise BadSetting(f"Each of `poles` needs two words and its `axes` entry; look at {', '.join(wrong)}.")
        from ambergrade.score.features import feature_source  # a sheet is read without it

        self._source = feature_source(extractor, device=device)
        self._axes, self._poles, self._prompts = axes, poles, prompts
        self.fingerprint: Mapping[str, Any] = {
            **self._source.fingerprint,
            "poles": {axis: list(pair) for axis, pair in poles.items()},
        }

    def prompts(self, prompts: PromptSet) -> PromptSet:
        """The contrast prompts to draw for a prompt set."""
        return contrasted(prompts.first(self._prompts), self._axes, self._poles)

    def rows(self, pictures: Sequence[Picture], prompts: Mapping[str, Prompt]) -> Mapping[str, npt.NDArray[Any]]:
        seen = np.array([_seen(picture.pixels) for picture in pictures])
        found: dict[str, npt.NDArray[Any]] = {f"seen_{what}": seen[:, k] for k, what in enumerate(SEEN)}
        return found | {self._source.key: self._source([picture.pixels for picture in pictures])}

    def constants(self, prompts: Mapping[str, Prompt]) -> Mapping[str, Any]:
        return {"features": self._source.key}

    @classmethod
    def aggregates(cls, sheet: ScoreSheet, *, seed: int) -> dict[str, Measurement]:
        found = {}
        for axis, rows in pairs(sheet.prompt_ids, sheet.seeds).items():
            bases = [base for base, _, _ in rows]
            value, moved, count = _consistency(sheet, rows, seed)
            found[f"response_{axis}"] = Measurement(value, *percentile_interval(moved, count), count)
            for what in SEEN:
                apart = prompt_means(_apart(sheet.columns[f"seen_{what}"], rows), bases)
                found[f"response_{axis}_{what}"] = mean_interval(
                    apart, seed=seed, higher_is_better=cls.columns[f"seen_{what}"]
                )
        return found

    @classmethod
    def differences(cls, sheet: ScoreSheet, baseline: ScoreSheet, *, seed: int) -> dict[str, PairedDifference]:
        """Compare the responses: does this model hear the word better than the baseline, same prompts and seeds?"""
        found = {}
        theirs = pairs(baseline.prompt_ids, baseline.seeds)
        for axis, rows in pairs(sheet.prompt_ids, sheet.seeds).items():
            bases, other = [base for base, _, _ in rows], theirs[axis]
            (value, moved, count), (base_value, base_moved, _) = (
                _consistency(sheet, rows, seed),
                _consistency(baseline, other, seed),
            )
            found[f"response_{axis}"] = bootstrap_difference(value - base_value, moved - base_moved, count, True)
            for what in SEEN:
                column = f"seen_{what}"
                gap = _apart(sheet.columns[column], rows) - _apart(baseline.columns[column], other)
                means = prompt_means(gap, bases)
                if (known := ~np.isnan(means)).any():  # a picture that cannot be measured leaves its prompt out
                    means = means[known]
                weights = resampling_weights(len(means), seed=seed)
                found[f"response_{axis}_{what}"] = bootstrap_difference(
                    float(means.mean()), weights @ means / len(means), len(means), cls.columns[column]
                )
        return found

    @classmethod
    def remarks(cls, sheet: ScoreSheet) -> list[str]:
        if pairs(sheet.prompt_ids, sheet.seeds):
            return []
        return ["control_response: no contrast pictures are in this sheet; evaluate.py draws them with its own model."]


def _seen(pixels: npt.NDArray[np.uint8]) -> tuple[float, float, float]:
    x = pixels.astype(np.float32)
    luma = x @ np.array([0.299, 0.587, 0.114], np.float32)
    sharpness = (np.abs(np.diff(luma, axis=0)).mean() + np.abs(np.diff(luma, axis=1)).mean()) / 2
    return float(sharpness), float((x.max(2) - x.min(2)).mean()), blockiness(pixels)


def _apart(values: Floats, rows: Sequence[tuple[str, int, int]]) -> Floats:
    return np.asarray(values[[first for _, first, _ in rows]] - values[[second for _, _, second in rows]])


def _consistency(sheet: ScoreSheet, rows: Sequence[tuple[str, int, int]], seed: int) -> tuple[float, Floats, int]:
    """The common share of the change, its bootstrap replicates over prompts, and the prompts."""
    features = sheet.features[sheet.constants["control_response"]["features"]]
    apart = _apart(features.astype(np.float64), rows)
    bases = list(dict.fromkeys(base for base, _, _ in rows))
    place = np.array([bases.index(base) for base, _, _ in rows])
    mean = np.stack([apart[place == k].mean(0) for k in range(len(bases))])  # (P, d)
    gram, count = mean @ mean.T, len(bases)
    own = np.diag(gram)

    def share(weights: Floats) -> Floats:
        # A prompt that is drawn twice is no second witness: its product with itself stays out.
        common = ((weights @ gram) * weights).sum(1) - (weights**2) @ own
        among = weights.sum(1) ** 2 - (weights**2).sum(1)
        size = weights @ own / weights.sum(1)
        known = (among > 0) & (size > 0)
        return np.asarray(np.divide(common, among * size, out=np.full(len(weights), np.nan), where=known))

    return float(share(np.ones((1, count)))[0]), share(resampling_weights(count, seed=seed)), count
