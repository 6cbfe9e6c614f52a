"""Precision, recall, density and coverage: fidelity and diversity apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ambergrade.identity import random_seed
from ambergrade.score.distances import Floats, Grouped, prdc_groups
from ambergrade.score.distribution import SetDistance
from ambergrade.score.reference import Reference
from ambergrade.score.sheet import ScoreSheet

NEIGHBOURS = 5


class Prdc(SetDistance):
    """`precision`, `recall`, `density`, `coverage` (Naeem et al. 2020) with k = 5, at equal numbers of pictures.

    Precision and density ask whether generated pictures look real, recall and coverage whether all that is real is
    drawn. Density may exceed 1. A larger reference is cut to n pictures, always the same ones.
    """

    name = "prdc"
    values: ClassVar[Mapping[str, bool]] = dict.fromkeys(("precision", "recall", "density", "coverage"), True)
    shares = ("precision", "recall", "coverage")

    @classmethod
    def statistics(cls, x: Floats, group: npt.NDArray[np.int64], reference: Reference) -> Mapping[str, Grouped]:
        assert reference.features is not None
        real = reference.features.astype(np.float64)
        rng = np.random.Generator(np.random.Philox(key=random_seed(0, "prdc reference", len(real))))
        real = real[np.sort(rng.permutation(len(real))[: len(x)])]
        if min(len(real), len(x) - int(np.bincount(group).max())) <= NEIGHBOURS:
            nothing = float("nan"), np.full(int(group.max()) + 1, np.nan)
            return dict.fromkeys(cls.values, nothing)
        return prdc_groups(x, real, group, NEIGHBOURS)

    @classmethod
    def remarks(cls, sheet: ScoreSheet) -> list[str]:
        if sheet.n > 2 * NEIGHBOURS:
            return super().remarks(sheet)
        few = f"{sheet.n} pictures are too few for neighbourhoods of {NEIGHBOURS}"
        return [*super().remarks(sheet), f"prdc: no precision, recall, density or coverage, {few}."]
