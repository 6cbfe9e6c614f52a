"""Two taggers on the same pictures: a model trained on one tagger's captions inherits its errors, and pleases it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ambergrade.errors import BadSetting
from ambergrade.nouns import Measurement, Picture, Prompt
from ambergrade.score.adherence import mask_of, mean_where
from ambergrade.score.scoring import Metric
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import (
    Floats,
    PairedDifference,
    bootstrap_difference,
    percentile_interval,
    resampling_weights,
)

VERDICTS = "tagger_agreement.verdicts"


class TaggerAgreement(Metric):
    """A second, differently trained tagger's word on the tags that the prompt asks for or rules out and both know.

    Per picture: `tagger_agreement` share of those tags that both call seen (p > own τ) or both unseen;
    `second_tag_prob` and `second_tag_recall` the second tagger's mean p and share of p > τ over asked tags. A model
    that one tagger alone finds better has learned that tagger's errors.
    Over pictures: `tagger_kappa`, Cohen's κ of all verdicts (1960): agreement beyond what the two taggers' shares of
    seen tags would give by chance; bootstrapped over prompts.
    """

    name = "tagger_agreement"
    columns: Mapping[str, bool] = {"tagger_agreement": True, "second_tag_prob": True, "second_tag_recall": True}

    def __init__(
        self,
        tagger: str,
        second: str,
        thresholds: Mapping[str, float] | None = None,
        second_thresholds: Mapping[str, float] | None = None,
        device: str = "cpu",
    ) -> None:
        """Two WD folders (score/tagger.py), each with its thresholds: by default its own or its model card's.

        Raises BadSetting where their weights are the same or no tag is shared.
        """
        from ambergrade.score.tagger import Tagger  # a sheet is read without it

        key = "suite.metrics.tagger_agreement"
        self._taggers = (
            Tagger(tagger, thresholds, device, key=f"{key}.thresholds"),
            Tagger(second, second_thresholds, device, key=f"{key}.second_thresholds"),
        )
        one, other = (found.fingerprint for found in self._taggers)
        if one["weights"] == other["weights"]:
            raise BadSetting("The second tagger has the first one's weights: it agrees whatever the picture.")
        self._both = [tag for tag in self._taggers[0].known if tag in self._taggers[1].known]
        if not self._both:
            raise BadSetting(f"The taggers {tagger} and {second} know no tag in common.")
        self.fingerprint: Mapping[str, Any] = {**one, "second": other}

    def rows(self, pictures: Sequence[Picture], prompts: Mapping[str, Prompt]) -> Mapping[str, npt.NDArray[Any]]:
        """The columns, (n,), and `tagger_agreement.verdicts` (n, 4): tags seen by both, by the first, the second, none.

        A picture whose prompt names no tag that both know is NaN.
        """
        shown = [prompts[picture.prompt_id] for picture in pictures]
        asked = mask_of([prompt.tags for prompt in shown], self._both)
        judged = asked | mask_of([prompt.unwanted for prompt in shown], self._both)
        pixels = [picture.pixels for picture in pictures]
        p = [found.probabilities(pixels)[:, [found.known[tag] for tag in self._both]] for found in self._taggers]
        first, second = (
            values > np.array([found.threshold(tag) for tag in self._both])
            for values, found in zip(p, self._taggers, strict=True)
        )
        cells = [first & second, first & ~second, ~first & second, ~first & ~second]
        return {
            "tagger_agreement": mean_where(first == second, judged),
            "second_tag_prob": mean_where(p[1], asked),
            "second_tag_recall": mean_where(second, asked),
            VERDICTS: np.stack([(cell & judged).sum(1) for cell in cells], axis=1).astype(np.float32),
        }

    @classmethod
    def aggregates(cls, sheet: ScoreSheet, *, seed: int) -> dict[str, Measurement]:
        value, moved, prompts = _kappa(sheet, seed)
        low, high = percentile_interval(moved, prompts)
        return {"tagger_kappa": Measurement(value, low, high, prompts)}

    @classmethod
    def differences(cls, sheet: ScoreSheet, baseline: ScoreSheet, *, seed: int) -> dict[str, PairedDifference]:
        value, moved, prompts = _kappa(sheet, seed)
        other, other_moved, _ = _kappa(baseline, seed)
        return {"tagger_kappa": bootstrap_difference(value - other, moved - other_moved, prompts, True)}

    @classmethod
    def remarks(cls, sheet: ScoreSheet) -> list[str]:
        if np.isnan(_kappa(sheet, 0)[0]):
            return ["tagger_kappa: not given, both taggers say the same of every tag, or no tag is known to both."]
        return []


def kappa(verdicts: Floats) -> Floats:
    """Cohen's κ of counts (B, 4): both, first alone, second alone, neither. NaN where chance agrees wholly.

    >>> kappa(np.array([[20.0, 5, 10, 15]]))
    array([0.4])
    """
    total = verdicts.sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        both, first, second, neither = (verdicts / total[:, None]).T
        chance = (both + first) * (both + second) + (second + neither) * (first + neither)
        found: Floats = np.where(chance < 1, (both + neither - chance) / (1 - chance), np.nan)
    return found


def _kappa(sheet: ScoreSheet, seed: int) -> tuple[float, Floats, int]:
    """κ of all pictures, of every bootstrap draw of prompts, and the prompts behind it."""
    place = {prompt_id: k for k, prompt_id in enumerate(dict.fromkeys(sheet.prompt_ids))}
    by_prompt = np.zeros((len(place), 4))
    rows = [place[prompt_id] for prompt_id in sheet.prompt_ids]
    np.add.at(by_prompt, rows, sheet.features[VERDICTS].astype(np.float64))
    by_prompt = by_prompt[by_prompt.sum(1) > 0]
    if not len(by_prompt):
        return float("nan"), np.full(2, np.nan), 0
    return (
        float(kappa(by_prompt.sum(0)[None])[0]),
        kappa(resampling_weights(len(by_prompt), seed=seed) @ by_prompt),
        len(by_prompt),
    )
