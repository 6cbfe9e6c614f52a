"""FID / FD: Fréchet distance of the generated pictures' feature distribution from that of real pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ambergrade.score.distances import Floats, Grouped, frechet_groups
from ambergrade.score.distribution import SetDistance
from ambergrade.score.reference import Reference


class Fid(SetDistance):
    """`fid` (Heusel et al. 2017, eq. 6) in float64, in squared feature units, and `fid_corrected` less its 1/n bias.

    It is called FID only with pytorch-fid's Inception; with other extractors the same formula is a Fréchet distance.
    The corrected value is the headline, and the one with an interval, from 4 pictures a feature.
    FID's bias differs from model to model (Chong & Forsyth 2020), so equal n does not cancel it.
    """

    name = "fid"
    values: ClassVar[Mapping[str, bool]] = {"fid": False}
    corrected = biased = ("fid",)
    needs_rank = True
    needs_features = False

    def __init__(
        self,
        extractor: str,
        reference: str,
        pictures: str | None = None,
        few: bool = False,
        trust_reference: bool = False,
        batch: int = 32,
        device: str = "cpu",
    ) -> None:
        """As the other set distances. `few`: give a number even with fewer pictures than features.

        `trust_reference`: take an .npz that does not say what made it, such as pytorch-fid's own.
        """
        self._few, self._trust = few, trust_reference
        super().__init__(extractor, reference, pictures, batch, device)

    @classmethod
    def statistics(cls, x: Floats, group: npt.NDArray[np.int64], reference: Reference) -> Mapping[str, Grouped]:
        return {"fid": frechet_groups(x, group, reference.mean, reference.covariance)}
