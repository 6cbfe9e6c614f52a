"""Fits a smooth surface to a sweep over two coefficients: where its best point lies, and how well that is known.

The surface is quadratic in both coefficients, as in response surface methodology (Box and Wilson 1951). Every prompt
has a level of its own, so that points of a race, which were drawn on fewer prompts, take part on the prompts they have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ambergrade.score.statistics import interval_text, percentile_interval, resampling_weights

Floats = npt.NDArray[np.float64]

FEWEST_POINTS = 9
"""A quadratic surface has six numbers; fewer points than these leave nothing to judge it by."""
STEPS = 61
"""Places along each axis that are looked at for the best point."""


@dataclass(frozen=True)
class Surface:
    """A quadratic surface over two coefficients, relative to its mean over the points."""

    low: tuple[float, float]
    """The smallest values of the two coefficients, and below the largest: nothing is claimed beyond."""
    high: tuple[float, float]
    terms: tuple[float, ...]
    """Factors of x, y, x², xy, y², where x and y run from -1 to 1 between low and high."""
    best: tuple[float, float]
    """Coefficients of the best point within the limits."""
    intervals: tuple[tuple[float, float], tuple[float, float]]
    """95 % limits of each coefficient of the best point, from prompts resampled; NaN where prompts are too few."""
    explained: float
    """Share of the variance between the points' means that the surface explains (R²)."""

    def text(self, axes: tuple[str, str]) -> str:
        """Say where the best point lies, with its limits: `a 0.72 [0.61, 0.80], b 1.10 [0.95, 1.31]`."""
        places = (
            f"{axis} {value:.2f} {interval_text(*limits, '.2f')}"
            for axis, value, limits in zip(axes, self.best, self.intervals, strict=True)
        )
        return (
            f"A quadratic surface through all points is best at {', '.join(places)}; "
            f"it explains {self.explained:.0%} of their differences."
        )

    def heights(self, first: Floats, second: Floats) -> Floats:
        """The surface's height where coefficients have these values (arrays of one shape)."""
        x, y = (
            2 * (values - low) / (high - low) - 1
            for values, low, high in zip((first, second), self.low, self.high, strict=True)
        )
        made: Floats = np.moveaxis(_features(x, y), 0, -1) @ np.array(self.terms)
        return made


def fit_surface(places: Floats, scores: Floats, *, higher_is_better: bool = True, seed: int = 0) -> Surface | None:
    """Fit a surface by least squares to scores of prompts at places.

    Args:
        places: (points, 2), the coefficients.
        scores: (points, prompts), NaN where a point was not drawn on a prompt.

    Returns None for too few points, or where a coefficient has fewer than three values: no surface is decided there.
    """
    known = ~np.isnan(scores).all(axis=1)
    places, scores = places[known], scores[known]
    if len(places) < FEWEST_POINTS or any(len(np.unique(values)) < 3 for values in places.T):
        return None
    scores = scores[:, (~np.isnan(scores)).sum(axis=0) > 1]  # one point alone on a prompt tells of no difference
    low, high = places.min(axis=0), places.max(axis=0)
    features = _features(*(2 * (places - low) / (high - low) - 1).T).T
    if np.linalg.matrix_rank(features - features.mean(axis=0)) < features.shape[1]:
        return None
    seen = ~np.isnan(scores)
    share = seen / seen.sum(axis=0)
    within = features[:, None, :] - np.einsum("kp,kf->pf", share, features)  # less each prompt's mean over its points
    filled = np.where(seen, scores, 0.0)
    apart = np.where(seen, filled - (share * filled).sum(axis=0), 0.0)
    within *= seen[:, :, None]
    squares, products = np.einsum("kpf,kpg->pfg", within, within), np.einsum("kpf,kp->pf", within, apart)
    terms = np.linalg.solve(squares.sum(axis=0), products.sum(axis=0))

    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, STEPS)] * 2, indexing="ij")).reshape(2, -1)
    heights = _features(*grid) * (1 if higher_is_better else -1)
    prompts = scores.shape[1]
    weights = resampling_weights(prompts, seed=seed)
    normal = (weights @ squares.reshape(prompts, -1)).reshape(-1, *squares.shape[1:])
    normal += 1e-9 * squares.sum(axis=0)  # a draw that misses what decides a term leaves it as it is
    resampled = np.linalg.solve(normal, (weights @ products + 1e-9 * products.sum(axis=0))[:, :, None])[:, :, 0]
    ends = [grid[:, np.argmax(rows @ heights, axis=1)] for rows in np.array_split(resampled, len(resampled) // 100 + 1)]
    spread = np.concatenate(ends, axis=1)
    best = grid[:, int(np.argmax(terms @ heights))]

    def coefficients(x: Floats, axis: int) -> Floats:
        values: Floats = low[axis] + (x + 1) / 2 * (high[axis] - low[axis])
        return values

    limits = [percentile_interval(coefficients(spread[axis], axis), prompts) for axis in (0, 1)]
    left = apart - np.einsum("kpf,f->kp", within, terms)
    count = seen.sum(axis=1)
    before, after = apart.sum(axis=1) / count, left.sum(axis=1) / count
    explained = 1 - float(after @ after / (before @ before)) if before.any() else 1.0
    return Surface(
        low=(float(low[0]), float(low[1])),
        high=(float(high[0]), float(high[1])),
        terms=tuple(map(float, terms)),
        best=(float(coefficients(best[0], 0)), float(coefficients(best[1], 1))),
        intervals=(limits[0], limits[1]),
        explained=explained,
    )


def _features(x: Floats, y: Floats) -> Floats:
    made: Floats = np.stack([x, y, x * x, x * y, y * y])
    return made
