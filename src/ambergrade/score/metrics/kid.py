"""KID: an unbiased kernel distance between generated and real pictures' features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ambergrade.score.distances import Floats, Grouped, kid_groups
from ambergrade.score.distribution import SetDistance
from ambergrade.score.reference import Reference
from ambergrade.score.sheet import ScoreSheet

LARGEST_SCALE = 10.0
"""Mean square of a feature beyond which the cubic kernel is all about a few large ones."""


class Kid(SetDistance):
    """`kid` (Bińkowski et al. 2018) × 1000 over the full samples; unbiased, so it may be below zero."""

    name = "kid"
    values: ClassVar[Mapping[str, bool]] = {"kid": False}

    @classmethod
    def statistics(cls, x: Floats, group: npt.NDArray[np.int64], reference: Reference) -> Mapping[str, Grouped]:
        assert reference.features is not None
        return {"kid": kid_groups(x, reference.features.astype(np.float64), group)}

    @classmethod
    def remarks(cls, sheet: ScoreSheet) -> list[str]:
        x = sheet.features[sheet.constants[cls.name]["features"]].astype(np.float64)
        scale = float(np.square(x).mean())
        said = super().remarks(sheet)
        if scale > LARGEST_SCALE:
            said.append(f"kid: features have a mean square of {scale:.3g}; the cubic kernel is meant for about 1.")
        return said
