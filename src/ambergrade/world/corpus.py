"""Arrays of drawn pictures with their scenes: what the autoencoder and the scorers are trained on."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ambergrade.world.draw import draw
from ambergrade.world.grammar import Scene, sample

Pixels = npt.NDArray[np.uint8]


def scenes(seed: int, start: int, count: int, *, clean: bool = False, undamaged: float = 0.25) -> list[Scene]:
    """Scenes start … start + count - 1 of world `seed`; grammar.sample explains `clean` and `undamaged`."""
    return [sample(seed, index, clean=clean, undamaged=undamaged) for index in range(start, start + count)]


def pictures(shown: Sequence[Scene], *, size: int = 128, workers: int = 1) -> Pixels:
    """N × size × size × 3, RGB, 0–255."""
    job = partial(_pixels, size=size)
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        drawn = list(tqdm(pool.imap(job, shown, 64), "drawing", len(shown), unit="picture", disable=None))
    return np.stack(drawn)


def _pixels(scene: Scene, size: int) -> Pixels:
    return np.asarray(draw(scene, size, size))
