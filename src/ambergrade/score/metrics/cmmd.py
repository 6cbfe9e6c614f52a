"""CMMD: a kernel distance between CLIP embeddings of generated and real pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ambergrade.score.distances import Floats, Grouped, cmmd_groups
from ambergrade.score.distribution import SetDistance
from ambergrade.score.reference import Reference
from ambergrade.score.sheet import ScoreSheet


class Cmmd(SetDistance):
    """`cmmd` (Jayasumana et al. 2024) as published, and `cmmd_unbiased`, the same kernel's U-statistic."""

    name = "cmmd"
    values: ClassVar[Mapping[str, bool]] = {"cmmd": False, "cmmd_unbiased": False}
    biased = ("cmmd",)

    @classmethod
    def statistics(cls, x: Floats, group: npt.NDArray[np.int64], reference: Reference) -> Mapping[str, Grouped]:
        assert reference.features is not None
        unit, real = _unit(x), _unit(reference.features.astype(np.float64))
        return {
            "cmmd": cmmd_groups(unit, real, group),
            "cmmd_unbiased": cmmd_groups(unit, real, group, unbiased=True),
        }

    @classmethod
    def remarks(cls, sheet: ScoreSheet) -> list[str]:
        return [
            *super().remarks(sheet),
            "cmmd: with unit embeddings and σ = 10 it is nearly 10·‖difference of means‖², so it hardly sees a "
            "collapse that keeps the mean. Read it beside fid and recall.",
        ]


def _unit(x: Floats) -> Floats:
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))
