"""MIND: a sliced Wasserstein distance between generated and real pictures' features; frugal with pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ambergrade.score.distances import Floats, Grouped, mind_groups
from ambergrade.score.distribution import SetDistance
from ambergrade.score.reference import Reference


class Mind(SetDistance):
    """`mind` (Monge inception distance, as in torch-fidelity) in squared feature units, and `mind_corrected`."""

    name = "mind"
    values: ClassVar[Mapping[str, bool]] = {"mind": False}
    corrected = biased = ("mind",)

    @classmethod
    def statistics(cls, x: Floats, group: npt.NDArray[np.int64], reference: Reference) -> Mapping[str, Grouped]:
        assert reference.features is not None
        return {"mind": mind_groups(x, reference.features.astype(np.float64), group)}
