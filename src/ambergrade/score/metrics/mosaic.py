"""Mosaic: the 8 × 8 grid that lossy files and autoencoders leave in a picture, measured without a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ambergrade.nouns import Picture, Prompt
from ambergrade.score.scoring import Metric

STEP = 8
"""Pixels: the side of JPEG's blocks and of a latent's patch."""
CAP = 12.0
"""Grey levels: a larger step is an edge that was drawn, not a block's."""
PATTERNED = 0.4
"""Share of steps beyond CAP at one phase, less the weakest phase's, of drawn grids alone: no JPEG reaches 0.31."""


class Mosaic(Metric):
    """`mosaic` in grey levels (0 to 255): how much steeper luma steps across the 8 × 8 grid than between its lines.

    A step is |I(x+1) - I(x)| less the mean of its two neighbours, capped, so that smooth shades and drawn edges
    cancel; its mean over each of the 8 phases is taken along x and along y, and the largest phase less the median one
    is the answer (after the block-edge differences of Wang, Bovik & Evans 2000). About 0.1 without a grid; the phase is
    free, so a cropped file's grid is found too, but a resized one's (no longer 8 wide) is not.
    A picture whose grid is drawn in hard edges (screentones of period 2, 4 or 8, pixel art enlarged without smoothing)
    is NaN: not scored, and counted as such. A photograph enlarged in that way is in blocks, and is told as such (4 to
    6.5).
    """

    name = "mosaic"
    columns: Mapping[str, bool] = {"mosaic": False}
    needs_prompts = False

    def __init__(self, device: str = "cpu") -> None:
        self.fingerprint: Mapping[str, Any] = {"weights": "none", "version": 2, "step": STEP, "cap": CAP}

    def rows(self, pictures: Sequence[Picture], prompts: Mapping[str, Prompt]) -> Mapping[str, npt.NDArray[Any]]:
        return {"mosaic": np.array([blockiness(picture.pixels) for picture in pictures])}


def blockiness(pixels: npt.NDArray[np.uint8]) -> float:
    """The measure of one picture (height, width, 3) uint8; NaN for less than four blocks a side or a drawn pattern."""
    if min(pixels.shape[:2]) < 4 * STEP:
        return float("nan")
    luma = pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as JPEG's
    return (_along(luma) + _along(luma.T)) / 2


def _along(luma: npt.NDArray[np.float32]) -> float:
    """Largest less median phase of the steps along the last axis."""
    step = np.abs(np.diff(luma, axis=1))
    hard = np.array([(step[:, phase::STEP] > CAP).mean() for phase in range(STEP)])
    if hard.max() - hard.min() > PATTERNED:
        return float("nan")
    step = np.minimum(step, CAP)
    excess = step[:, 1:-1] - (step[:, :-2] + step[:, 2:]) / 2
    columns = excess.mean(0)
    phases = np.array([columns[phase::STEP].mean() for phase in range(STEP)])
    return float(phases.max() - np.median(phases))
