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
from ambergrade.score.statistics import (
    FEWEST,
    PairedDifference,
    jackknife_corrected,
    jackknife_error,
    t_interval,
)

GROUPS = 50
"""Jackknife groups of prompts, at most."""
ENOUGH = 4
"""Pictures a feature from which `fid_corrected`'s interval holds the true distance in 92 to 99 of 100 runs (d = 32)."""


class SetDistance(Metric):
    """A distance between the generated and the real pictures as sets. Its error bars say sampling noise only."""

    columns: Mapping[str, bool] = {}
    needs_prompts = False
    values: ClassVar[Mapping[str, bool]]
    """Names of what `statistics` gives, to whether higher is better."""
    corrected: ClassVar[Sequence[str]] = ()
    """Those that are also given as `<name>_corrected`, less the bias of order 1/n that the jackknife sees."""
    biased: ClassVar[Sequence[str]] = ()
    """Those whose value at n pictures lies above the true distance: they have no interval of their own."""
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
        """Value ± t·jackknife errors over groups of prompts. NaN where it is refused: see `remarks`.

        A biased value has no interval, since no interval around it holds the true distance: its corrected form has one.
        These must never be bootstrapped: doubled pictures double the bias (facts: measured).
        """
        found = {}
        for name, (value, left_out) in cls._all(sheet).items():
            low, high, _ = t_interval(value, jackknife_error(left_out), len(left_out))
            if name in cls.shares:
                low, high = float(np.maximum(low, 0.0)), float(np.minimum(high, 1.0))  # NaN stays
            if name in cls.biased or _prompts(sheet) < FEWEST or cls._too_few(sheet):
                low = high = math.nan
            found[name] = Measurement(value, low, high, sheet.n, cls._better(name))
        return found

    @classmethod
    def differences(cls, sheet: ScoreSheet, baseline: ScoreSheet, *, seed: int) -> dict[str, PairedDifference]:
        """Paired jackknife: both sheets leave out the same prompts at once. Two like biases cancel each other."""
        ours, theirs = cls._all(sheet), cls._all(baseline)
        prompts, found = _prompts(sheet), {}
        for name, (value, left_out) in ours.items():
            other, other_left_out = theirs[name]
            apart, error = value - other, jackknife_error(left_out - other_left_out)
            low, high, p = t_interval(apart, error, len(left_out))
            if prompts < FEWEST:
                low = high = p = math.nan
            found[name] = PairedDifference(apart, low, high, p, prompts, 2.8 * error, cls._better(name))
        return found

    @classmethod
    def remarks(cls, sheet: ScoreSheet) -> list[str]:
        if _prompts(sheet) < 3:
            return [f"{cls.name}: not given, its error needs pictures of at least 3 prompts, found {_prompts(sheet)}."]
        reference = sheet.references[sheet.constants[cls.name]["reference"]]
        told = f"{cls.name}: {sheet.n} pictures and {reference.m} references for {reference.d} features"
        if cls._lacks_rank(sheet) and sheet.constants[cls.name]["few"]:
            return [
                f"{told} (n < d): a covariance lacks rank, so it is mostly the metric's own bias. "
                "Compare at equal n only."
            ]
        if cls._lacks_rank(sheet):
            return [
                f"{told} (n < d): refused, it would be mostly its own bias. "
                "Draw more pictures, or set few=true on the metric."
            ]
        if cls._too_few(sheet):
            least = ENOUGH * reference.d
            return [f"{told}: no interval, one of fewer than {ENOUGH}·d = {least} holds the true distance too rarely."]
        return []

    @classmethod
    def _all(cls, sheet: ScoreSheet) -> dict[str, Grouped]:
        """All values with their leave-outs, the corrected ones first; NaN where they are refused."""
        constants = sheet.constants[cls.name]
        if _prompts(sheet) < 3 or (cls._lacks_rank(sheet) and not constants["few"]):
            nothing = math.nan, np.full(3, math.nan)
            return dict.fromkeys([*(f"{name}_corrected" for name in cls.corrected), *cls.values], nothing)
        group = prompt_groups(sheet.prompt_ids)
        x = sheet.features[constants["features"]].astype(np.float64)
        plain = dict(cls.statistics(x, group, sheet.references[constants["reference"]]))
        # The correction moves every leave-out by nearly as much, so the plain ones give its error.
        corrected = {f"{name}_corrected": (jackknife_corrected(*plain[name]), plain[name][1]) for name in cls.corrected}
        return corrected | plain

    @classmethod
    def _better(cls, name: str) -> bool:
        return cls.values[name.removesuffix("_corrected")]

    @classmethod
    def _lacks_rank(cls, sheet: ScoreSheet) -> bool:
        return cls._fewer_than(sheet, 1)

    @classmethod
    def _too_few(cls, sheet: ScoreSheet) -> bool:
        return cls._fewer_than(sheet, ENOUGH)

    @classmethod
    def _fewer_than(cls, sheet: ScoreSheet, times: int) -> bool:
        """Whether there are fewer pictures, drawn or real, than so many times the features."""
        reference = sheet.references[sheet.constants[cls.name]["reference"]]
        return cls.needs_rank and min(sheet.n, reference.m or sheet.n) < times * reference.d


def prompt_groups(prompt_ids: Sequence[str], most: int = GROUPS) -> npt.NDArray[np.int64]:
    """(n,): jackknife group of every picture; prompt k belongs to group k mod G, so pictures of one stay together."""
    place = {prompt_id: k for k, prompt_id in enumerate(dict.fromkeys(prompt_ids))}
    groups = min(most, len(place))
    return np.array([place[prompt_id] % groups for prompt_id in prompt_ids], dtype=np.int64)


def _prompts(sheet: ScoreSheet) -> int:
    return len(set(sheet.prompt_ids))
