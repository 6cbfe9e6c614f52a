"""How far one set of features lies from another: Fréchet, kernel, sliced and nearest-neighbour distances, in float64.

Pure functions of arrays. Shapes: n generated and m real pictures, d features, G jackknife groups. Each `…_groups`
function returns the value and the G values with one group of generated pictures left out (`statistics.jackknife_…`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from ambergrade.identity import random_seed

Floats = npt.NDArray[np.float64]
Grouped = tuple[float, Floats]
DIRECTIONS = 1000
"""MIND slices features along so many directions."""
CMMD_SIGMA = 10.0
"""CMMD's kernel has this width (Jayasumana et al. 2024), for embeddings of length one."""


def frechet_distance(mean: Floats, covariance: Floats, mean_2: Floats, covariance_2: Floats) -> Floats:
    """‖μ₁-μ₂‖² + tr(Σ₁+Σ₂) - 2·tr((Σ₁Σ₂)^½); the first pair may be stacked, (..., d) and (..., d, d).

    The trace is the sum of roots of the eigenvalues of S₂Σ₁S₂ with S₂ = Σ₂^½: symmetric, so all real.
    """
    root = covariance_root(covariance_2)
    crossed = _sum_of_roots(np.asarray(np.linalg.eigvalsh(root @ covariance @ root), dtype=np.float64))
    traces = np.trace(covariance, axis1=-2, axis2=-1) + np.trace(covariance_2)
    distance: Floats = np.square(mean - mean_2).sum(-1) + traces - 2 * crossed
    return distance


def covariance_root(covariance: Floats) -> Floats:
    """Σ^½ by eigh, (d, d); negative eigenvalues, which are rounding, count as zero."""
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T)


def frechet_groups(x: Floats, group: npt.NDArray[np.int64], mean: Floats, covariance: Floats) -> Grouped:
    """Fréchet distance of pictures (n, d) from a reference's moments, whole and without each group.

    With n ≥ d two symmetric eigenproblems of size d. With n < d the cross term is the sum of singular values of
    X_c·Σ^½/√(n-1), taken from its n × n Gram matrix: the same number without the d × d problem.
    """
    groups = int(group.max()) + 1
    cross = _gram_cross(x, covariance) if x.shape[0] < x.shape[1] else _moment_cross(x, covariance)
    trace = float(np.trace(covariance))

    def value(keep: npt.NDArray[np.bool_]) -> float:
        inside = x[keep]
        centre = inside.mean(0)
        own = float(np.square(inside - centre).sum() / (len(inside) - 1))
        return float(np.square(centre - mean).sum()) + own + trace - 2 * cross(keep)

    everything = np.ones(len(x), dtype=np.bool_)
    return value(everything), np.array([value(group != g) for g in range(groups)])


def kernel_groups(
    kxx: Floats, kxy: Floats, kyy_mean: float, group: npt.NDArray[np.int64], *, unbiased: bool
) -> Grouped:
    """MMD² = k̄xx + k̄yy - 2k̄xy of kernel matrices (n, n) and (n, m) (Gretton et al. 2012, equations 3 and 5).

    `unbiased` leaves a picture's kernel with itself out of k̄xx; `kyy_mean` is the caller's in the same manner.
    """
    member = (np.arange(int(group.max()) + 1)[:, None] == group[None, :]).astype(np.float64)
    within = kxx - np.diag(np.diag(kxx)) if unbiased else kxx
    by_group = member @ within @ member.T  # (G, G)
    crossed = member @ kxy.mean(1)
    size = member.sum(1)

    def value(n: Floats, xx: Floats, xy: Floats) -> Floats:
        return np.asarray(xx / (n * (n - 1) if unbiased else n * n) + kyy_mean - 2 * xy / n)

    total, n = by_group.sum(), float(len(group))
    without = total - by_group.sum(0) - by_group.sum(1) + np.diag(by_group)
    whole = value(np.array(n), np.array(total), np.array(crossed.sum()))
    return float(whole), value(n - size, without, crossed.sum() - crossed)


def kid_groups(x: Floats, y: Floats, group: npt.NDArray[np.int64]) -> Grouped:
    """KID (Bińkowski et al. 2018): unbiased MMD² of the kernel (xᵀy/d + 1)³ over the full samples, × 1000."""
    kyy = polynomial_kernel(y, y)
    m = len(y)
    kyy_mean = float((kyy.sum() - np.trace(kyy)) / (m * (m - 1)))
    value, left_out = kernel_groups(polynomial_kernel(x, x), polynomial_kernel(x, y), kyy_mean, group, unbiased=True)
    return 1000 * value, 1000 * left_out


def polynomial_kernel(x: Floats, y: Floats) -> Floats:
    """(xᵀy/d + 1)³: (n, m)."""
    base = x @ y.T / x.shape[1] + 1
    return np.asarray(base * base * base)  # numpy's ** 3 is ten times slower


def gaussian_kernel(x: Floats, y: Floats, sigma: float) -> Floats:
    """exp(-‖x-y‖²/(2σ²)): (n, m)."""
    return np.asarray(np.exp(-squared_distances(x, y) / (2 * sigma**2)))


def cmmd_groups(x: Floats, y: Floats, group: npt.NDArray[np.int64], *, unbiased: bool = False) -> Grouped:
    """CMMD (Jayasumana et al. 2024): 1000·MMD² with a Gaussian kernel of σ = 10 between unit vectors.

    Published code takes the biased form, which is `unbiased=False`. Between unit vectors the kernel is nearly linear,
    so the number is close to 10·‖μx-μy‖²: it hears the means and little else.
    """
    kyy = gaussian_kernel(y, y, CMMD_SIGMA)
    m = len(y)
    kyy_mean = float((kyy.sum() - np.trace(kyy)) / (m * (m - 1))) if unbiased else float(kyy.mean())
    kxx, kxy = gaussian_kernel(x, x, CMMD_SIGMA), gaussian_kernel(x, y, CMMD_SIGMA)
    value, left_out = kernel_groups(kxx, kxy, kyy_mean, group, unbiased=unbiased)
    return 1000 * value, 1000 * left_out


def mind_groups(x: Floats, y: Floats, group: npt.NDArray[np.int64], directions: int = DIRECTIONS) -> Grouped:
    """MIND: 3·d times the mean over unit directions of ∫|F⁻¹-G⁻¹|² (sliced Wasserstein-2², torch-fidelity's scale).

    The directions are keyed by d alone, so every sheet is cut along the same ones. Isotropic Gaussians of equal
    spread give 3·‖μ₁-μ₂‖², three times their Fréchet distance.
    """
    d = x.shape[1]
    rng = np.random.Generator(np.random.Philox(key=random_seed(0, "mind directions", d)))
    units = rng.normal(size=(d, directions))
    units /= np.linalg.norm(units, axis=0)
    order = np.argsort(px := x @ units, axis=0)
    ours, theirs = np.take_along_axis(px, order, 0).T, np.sort(y @ units, axis=0).T  # (U, n), (U, m)

    def value(sorted_x: Floats) -> float:
        return float(3 * d * np.mean(_wasserstein_2(sorted_x, theirs)))

    left_out = []
    for g in range(int(group.max()) + 1):
        kept = (group != g)[order].T
        left_out.append(value(ours[kept].reshape(directions, -1)))
    return value(ours), np.array(left_out)


def prdc_groups(x: Floats, y: Floats, group: npt.NDArray[np.int64], k: int = 5) -> dict[str, Grouped]:
    """Precision, recall, density and coverage (Naeem et al. 2020, eq. 2 to 5), balls to the k-th neighbour.

    Two sets from one distribution have density 1 and coverage 1 - Π_{i=1..k}(n-i)/(2n-i) in expectation.
    """
    between, within = np.sqrt(squared_distances(y, x)), np.sqrt(squared_distances(x, x))
    own = np.sqrt(squared_distances(y, y))
    np.fill_diagonal(within, np.inf)
    np.fill_diagonal(own, np.inf)
    real_radius = np.partition(own, k - 1, axis=1)[:, k - 1]

    def values(keep: npt.NDArray[np.bool_]) -> tuple[float, float, float, float]:
        apart = between[:, keep]
        inside = apart < real_radius[:, None]
        radius = np.partition(within[np.ix_(keep, keep)], k - 1, axis=1)[:, k - 1]
        return (
            float(inside.any(0).mean()),
            float((apart < radius[None, :]).any(1).mean()),
            float(inside.sum(0).mean() / k),
            float((apart.min(1) < real_radius).mean()),
        )

    whole = values(np.ones(len(x), dtype=np.bool_))
    left_out = np.array([values(group != g) for g in range(int(group.max()) + 1)])
    return {
        name: (whole[place], left_out[:, place])
        for place, name in enumerate(("precision", "recall", "density", "coverage"))
    }


def squared_distances(x: Floats, y: Floats) -> Floats:
    """‖x-y‖² of all pairs, (n, m), not below zero."""
    apart = np.square(x).sum(1)[:, None] + np.square(y).sum(1)[None, :] - 2 * x @ y.T
    return np.asarray(np.maximum(apart, 0))


def _moment_cross(x: Floats, covariance: Floats) -> Callable[[npt.NDArray[np.bool_]], float]:
    """tr((Σ₁Σ₂)^½) of kept pictures, by d × d matrices."""
    root = covariance_root(covariance)
    outer, total = x.T @ x, x.sum(0)

    def cross(keep: npt.NDArray[np.bool_]) -> float:
        gone = x[~keep]
        n = int(keep.sum())
        mean = (total - gone.sum(0)) / n
        own = (outer - gone.T @ gone - n * np.outer(mean, mean)) / (n - 1)
        return float(_sum_of_roots(np.linalg.eigvalsh(root @ own @ root)))

    return cross


def _gram_cross(x: Floats, covariance: Floats) -> Callable[[npt.NDArray[np.bool_]], float]:
    """tr((Σ₁Σ₂)^½) of kept pictures, by n × n matrices."""
    gram = (x - x.mean(0)) @ covariance @ (x - x.mean(0)).T

    def cross(keep: npt.NDArray[np.bool_]) -> float:
        kept = gram[np.ix_(keep, keep)]
        centred = kept - kept.mean(0) - kept.mean(1)[:, None] + kept.mean()
        return float(_sum_of_roots(np.linalg.eigvalsh(centred / (len(kept) - 1))))

    return cross


def _sum_of_roots(values: Floats) -> Floats:
    """Σ√λ⁺; a negative part beyond rounding means the matrices were no covariances."""
    negative, positive = np.minimum(values, 0).sum(-1), np.maximum(values, 0)
    assert np.all(-negative <= 1e-6 * positive.sum(-1) + 1e-12), float(np.min(negative))
    return np.asarray(np.sqrt(positive).sum(-1))


def _wasserstein_2(x: Floats, y: Floats) -> Floats:
    """∫|F⁻¹-G⁻¹|² along the last axis of sorted samples (U, n) and (U, m): (U,)."""
    n, m = x.shape[1], y.shape[1]
    if n == m:
        return np.asarray(np.square(x - y).mean(1))
    # Both quantile functions are steps; integers keep their joints exact.
    steps = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    width = np.diff(steps, prepend=0) / (n * m)
    apart = x[:, (steps - 1) // m] - y[:, (steps - 1) // n]
    return np.asarray(np.square(apart) @ width)
