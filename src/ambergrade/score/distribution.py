"""What FD, KID, MIND, CMMD and PRDC share: features of every picture, a reference, a jackknife over prompts.

A plug gives its formula in `statistics`; value, error, paired difference and remarks are the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ambergrade.errors import BadInput
from ambergrade.nouns import Measurement, Picture, Prompt
from ambergrade.score.distances import Floats, Grouped
from ambergrade.score.reference import Reference, find_reference
from ambergrade.score.scoring import Metric
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import Z95, PairedDifference, jackknife_corrected, jackknife_error, normal_p

GROUPS = 50
"""Jackknife groups of prompts, at most."""


class SetDistance(Metric):
    """A distance between the generated and the real pictures as sets. Its error bars say sampling noise only."""

    columns: Mapping[str, bool] = {}
    needs_prompts = False
    values: ClassVar[Mapping[str, bool]]
    """Names of what `statistics` gives, to whether higher is better."""
    corrected: ClassVar[Sequence[str]] = ()
    """Those that are also given as `<name>_corrected`, less the bias of order 1/n that the jackknife sees."""
    shares: ClassVar[Sequence[str]] = ()
    """Those that lie between 0 and 1, and so do their limits."""
    needs_rank = False
    """Whether a covariance must have full rank for the number to mean something."""
    needs_features = True
    """Whether the reference's moments alone do not suffice."""
    _few = False
    _trust = False

    def __init__(
        self,
        extractor: str,
        reference: str,
        pictures: str | None = None,
        batch: int = 32,
        device: str = "cpu",
    ) -> None:
        """`extractor`: a timm or open_clip folder, or pytorch-fid's Inception as .safetensors.

        `reference`: an .npz of reference statistics, or a list of picture files in the folder `pictures`.
        """
        from ambergrade.score.features import feature_source  # a sheet is read without it

        self._source = feature_source(extractor, device=device)
        self._reference = find_reference(self._source, reference, pictures, batch=batch, trust=self._trust)
        if self.needs_features and self._reference.features is None:
            raise BadInput(
                f"{self.name} compares pictures with pictures, but {reference} holds moments only.\n"
                "Build it from the pictures: python pipelines/evaluate.py action=reference …"
            )
        self.fingerprint: Mapping[str, Any] = {
            **self._source.fingerprint,
            "reference": self._reference.digest,
            "reference_pictures": self._reference.m,
            "dimensions": self._reference.d,
        }

    def rows(self, pictures: Sequence[Picture], prompts: Mapping[str, Prompt]) -> Mapping[str, npt.NDArray[Any]]:
        """`features.<digest>`: (n, d) float32, worked out once for all metrics of this extractor."""
        return {self._source.key: self._source([picture.pixels for picture in pictures])}

    def constants(self, prompts: Mapping[str, Prompt]) -> Mapping[str, Any]:
        """Where in the sheet the features and the reference are, and whether few pictures are enough."""
        return {"features": self._source.key, "reference": self._reference.digest, "few": self._few}

    def references(self) -> Mapping[str, Reference]:
        return {self._reference.digest: self._reference}

    @classmethod
    def statistics(cls, x: Floats, group: npt.NDArray[np.int64], reference: Reference) -> Mapping[str, Grouped]:
        """Each of `values` for pictures (n, d), and with each group of `group` (n,) left out."""
        raise NotImplementedError

    @classmethod
    def aggregates(cls, sheet: ScoreSheet, *, seed: int) -> dict[str, Measurement]:
        """Value ± 1.96 jackknife errors over groups of prompts. NaN where it is refused: see `remarks`.

        These must never be bootstrapped: doubled pictures double the bias (facts: measured).
        """
        found = {}
        for name, (value, left_out) in cls._all(sheet).items():
            half = Z95 * jackknife_error(left_out)
            low, high = value - half, value + half
            if name in cls.shares and not math.isnan(half):
                low, high = max(low, 0.0), min(high, 1.0)
            found[name] = Measurement(value, low, high, sheet.n, cls._better(name))
        return found

    @classmethod
    def differences(cls, sheet: ScoreSheet, baseline: ScoreSheet, *, seed: int) -> dict[str, PairedDifference]:
        """Paired jackknife: both sheets leave out the same prompts at once."""
        ours, theirs = cls._all(sheet), cls._all(baseline)
        prompts, found = len(set(sheet.prompt_ids)), {}
        for name, (value, left_out) in ours.items():
            other, other_left_out = theirs[name]
            apart, error = value - other, jackknife_error(left_out - other_left_out)
            low, high = apart - Z95 * error, apart + Z95 * error
            p = math.nan if math.isnan(error) else normal_p(apart, error)
            found[name] = PairedDifference(apart, low, high, p, prompts, 2.8 * error, cls._better(name))
        return found

    @classmethod
    def remarks(cls, sheet: ScoreSheet) -> list[str]:
        if _prompts(sheet) < 3:
            return [f"{cls.name}: not given, its error needs pictures of at least 3 prompts, found {_prompts(sheet)}."]
        if not cls._lacks_rank(sheet):
            return []
        reference = sheet.references[sheet.constants[cls.name]["reference"]]
        told = f"{cls.name}: {sheet.n} pictures and {reference.m} references for {reference.d} features (n < d)"
        if sheet.constants[cls.name]["few"]:
            return [f"{told}: a covariance lacks rank, so it is mostly the metric's own bias. Compare at equal n only."]
        return [f"{told}: refused, it would be mostly its own bias. Draw more pictures, or set few=true on the metric."]

    @classmethod
    def _all(cls, sheet: ScoreSheet) -> dict[str, Grouped]:
        """All values with their leave-outs, the corrected ones included; NaN where they are refused."""
        constants = sheet.constants[cls.name]
        refused = _prompts(sheet) < 3 or (cls._lacks_rank(sheet) and not constants["few"])
        nothing = math.nan, np.full(3, math.nan)
        if refused:
            found: dict[str, Grouped] = dict.fromkeys(cls.values, nothing)
        else:
            group = prompt_groups(sheet.prompt_ids)
            x = sheet.features[constants["features"]].astype(np.float64)
            found = dict(cls.statistics(x, group, sheet.references[constants["reference"]]))
        for name in cls.corrected:
            value, left_out = found[name]
            # The correction moves every leave-out by nearly as much, so the plain ones give its error.
            found[f"{name}_corrected"] = (jackknife_corrected(value, left_out), left_out) if not refused else nothing
        return found

    @classmethod
    def _better(cls, name: str) -> bool:
        return cls.values[name.removesuffix("_corrected")]

    @classmethod
    def _lacks_rank(cls, sheet: ScoreSheet) -> bool:
        reference = sheet.references[sheet.constants[cls.name]["reference"]]
        return cls.needs_rank and min(sheet.n, reference.m or reference.d) < reference.d


def prompt_groups(prompt_ids: Sequence[str], most: int = GROUPS) -> npt.NDArray[np.int64]:
    """(n,): jackknife group of every picture; prompt k belongs to group k mod G, so pictures of one stay together."""
    place = {prompt_id: k for k, prompt_id in enumerate(dict.fromkeys(prompt_ids))}
    groups = min(most, len(place))
    return np.array([place[prompt_id] % groups for prompt_id in prompt_ids], dtype=np.int64)


def _prompts(sheet: ScoreSheet) -> int:
    return len(set(sheet.prompt_ids))
