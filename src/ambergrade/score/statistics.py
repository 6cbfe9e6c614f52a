"""Intervals and tests whose unit is the prompt: pictures of one prompt are clustered, prompts are not.

Shapes: P prompts, K points (merges, models), B bootstrap draws, G jackknife groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from ambergrade.errors import BadInput
from ambergrade.identity import random_seed
from ambergrade.nouns import Measurement

Floats = npt.NDArray[np.float64]
Places = npt.NDArray[np.int64]

DRAWS = 2000
Z95 = NormalDist().inv_cdf(0.975)
PAIRS_AT_ONCE = 5000
"""Pairs of points compared in one piece: 1,000 points make 499,500, whose differences alone would take a GB."""
EXACT_SIGN_FLIPS = 12
"""Up to so many prompts all 2^P sign patterns are tried."""


@dataclass(frozen=True)
class PairedDifference:
    """A point minus a baseline on the same prompts and seeds, with its 95 % interval."""

    value: float
    low: float
    high: float
    p: float
    """Two-sided, for a true difference of zero."""
    n: int
    """Prompts behind it."""
    detectable: float
    """Smallest true difference found with 80 % power: 2.8 standard errors."""
    higher_is_better: bool = True

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `undecided` where the interval holds zero or is unknown."""
        if self.low > 0 or self.high < 0:
            return "better" if (self.value > 0) == self.higher_is_better else "worse"
        return "undecided"


@dataclass(frozen=True)
class WinnerSet:
    """The points that cannot be told from the best one, all comparisons held at once."""

    best: int
    members: tuple[int, ...]
    behind: tuple[float, ...]
    """How far each point's mean lies behind the best one's (≥ 0 is worse), in the score's unit; NaN if not compared."""
    low: tuple[float, ...]
    """Simultaneous lower limits of `behind` (95 %); a point is a member where it is ≤ 0."""
    high: tuple[float, ...]
    n: int
    """Prompts behind it."""


def prompt_means(values: Floats, prompt_ids: Sequence[Hashable]) -> Floats:
    """Mean of each prompt's pictures, (n,) to (P,), prompts in order of first appearance.

    A NaN (not scored) picture is left out; a prompt with none left is NaN.
    """
    order = {prompt_id: place for place, prompt_id in enumerate(dict.fromkeys(prompt_ids))}
    place = np.array([order[prompt_id] for prompt_id in prompt_ids], dtype=np.int64)
    seen = ~np.isnan(values)
    count = np.bincount(place[seen], minlength=len(order))
    total = np.bincount(place[seen], weights=values[seen], minlength=len(order))
    means: Floats = np.divide(total, count, out=np.full(len(order), np.nan), where=count > 0)
    return means


@lru_cache(maxsize=4)  # one sheet's aggregates ask for the same two dozen times
def resampling_weights(prompts: int, *, seed: int = 0, draws: int = DRAWS) -> Floats:
    """How often each bootstrap draw holds each prompt: (B, P), every row sums to P. Read-only.

    Keyed by (seed, P, B): points with the same prompts share one index draw, which is what pairs them.
    """
    rng = _generator(seed, "bootstrap", prompts, draws)
    picked = rng.integers(prompts, size=(draws, prompts)) + prompts * np.arange(draws)[:, None]
    weights = np.bincount(picked.ravel(), minlength=draws * prompts).reshape(draws, prompts).astype(np.float64)
    weights.setflags(write=False)
    return weights


def percentile_interval(replicates: Floats, prompts: int) -> tuple[float, float]:
    """Hesterberg's expanded percentile interval (2015, section 3.3) of bootstrap replicates of a mean over P prompts.

    A resampled mean varies by (P-1)/P of the variance and knows no t tails, so the plain 95 % percentiles cover 92 to
    94 % at 30 to 80 prompts; the tail is taken at Φ(-√(P/(P-1))·t) instead. NaN replicates are left out.
    """
    if prompts < 2 or np.isnan(replicates).all():
        return math.nan, math.nan
    tail = 100 * NormalDist().cdf(-math.sqrt(prompts / (prompts - 1)) * _t_from_normal(Z95, prompts - 1))
    low, high = np.nanpercentile(replicates, [tail, 100 - tail])
    return float(low), float(high)


def mean_interval(values: Floats, *, seed: int = 0, draws: int = DRAWS, higher_is_better: bool = True) -> Measurement:
    """Mean over prompts, (P,), with its percentile bootstrap interval; NaN prompts are left out of `n`."""
    scored = values[~np.isnan(values)]
    if scored.size == 0:
        return Measurement(math.nan, math.nan, math.nan, 0, higher_is_better)
    replicates = resampling_weights(scored.size, seed=seed, draws=draws) @ scored / scored.size
    low, high = percentile_interval(replicates, scored.size)
    return Measurement(float(scored.mean()), low, high, scored.size, higher_is_better)


def paired_difference(
    point: Floats, baseline: Floats, *, seed: int = 0, draws: int = DRAWS, higher_is_better: bool = True
) -> PairedDifference:
    """Mean of `point - baseline` over the prompts scored in both, (P,) each.

    Interval: paired percentile bootstrap. p: sign flips. Detectable: 2.8·σ_d/√P (facts: 80 % power at 5 %).
    """
    differences = (point - baseline)[~np.isnan(point - baseline)]
    n = differences.size
    if n == 0:
        return PairedDifference(math.nan, math.nan, math.nan, math.nan, 0, math.nan, higher_is_better)
    replicates = resampling_weights(n, seed=seed, draws=draws) @ differences / n
    low, high = percentile_interval(replicates, n)
    detectable = 2.8 * float(differences.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    p = sign_flip_p(differences, seed=seed)
    return PairedDifference(float(differences.mean()), low, high, p, n, detectable, higher_is_better)


def sign_flip_p(differences: Floats, *, seed: int = 0, draws: int = 9999) -> float:
    """Two-sided permutation p of a zero mean for differences (P,) symmetric about zero (Fisher's sign flips).

    Exact up to EXACT_SIGN_FLIPS prompts; beyond, (1 + hits)/(1 + draws), which is never zero.
    """
    n = differences.size
    observed = abs(differences.sum())
    slack = 1e-12 * np.abs(differences).sum()  # equal sums differ by rounding once the order of signs changes
    if n <= EXACT_SIGN_FLIPS:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=n)))
        return float(np.mean(np.abs(signs @ differences) >= observed - slack))
    signs = _generator(seed, "sign flips", n, draws).integers(2, size=(draws, n)) * 2.0 - 1.0
    return float((1 + np.sum(np.abs(signs @ differences) >= observed - slack)) / (1 + draws))


def winner_set(
    scores: Floats,
    *,
    seed: int = 0,
    draws: int = DRAWS,
    higher_is_better: bool = True,
    error: float = 0.05,
    alive: Sequence[int] | None = None,
) -> WinnerSet:
    """The best of K points by mean over prompts, and all that cannot be told from it; `scores` is (K, P).

    Max-T over joint draws of all K(K-1)/2 pairwise differences (Romano & Wolf 2005): one critical value holds every
    pair at once, so the intervals stay true although the best was picked from the same data. Draws flip the signs of
    prompts (Fisher's randomisation), each studentised by its own spread. Points of one and the same model on 40
    prompts show a false winner in 4.1 (9 normal ones) and 4.2 % (25 U-shaped ones) of 3,000 runs.
    Prompts that any point lacks (NaN) are left out of all.

    For a race: `error` is what this look may spend of its 5 %, and only the rows `alive` are compared. The others are
    NaN where they were not drawn; their pairs stay in the critical value, on the prompts that both have, so that the
    family of tests is the one of the full evaluation, whoever has been left behind.
    """
    rows = list(range(len(scores)) if alive is None else alive)
    scores = scores[:, ~np.isnan(scores[rows]).any(axis=0)] * (1.0 if higher_is_better else -1.0)
    n = scores.shape[1]
    if n < 2:
        raise BadInput(f"A winner set needs at least 2 prompts scored at every point, found {n}.")
    mean = np.full(len(scores), np.nan)
    mean[rows] = scores[rows].mean(axis=1)
    best = int(np.nanargmax(mean))
    spread = np.zeros(len(scores))
    spread[rows] = np.sqrt(np.maximum(_pairwise_variance(scores[rows])[rows.index(best)], 0.0) / n)
    critical = _max_t(scores, seed, max(draws, math.ceil(10 / error)), error)  # 10 draws or more lie beyond it
    behind = mean[best] - mean
    half = np.multiply(critical, spread, out=np.zeros(len(scores)), where=spread > 0)
    low, high = behind - half, behind + half
    members = tuple(k for k in rows if low[k] <= 0)
    return WinnerSet(best, members, tuple(map(float, behind)), tuple(map(float, low)), tuple(map(float, high)), n)


def wilson_interval(hits: npt.ArrayLike, n: npt.ArrayLike) -> tuple[Floats, Floats]:
    """95 % interval of a share `hits`/`n` (Wilson 1927), elementwise; NaN where n is 0."""
    h, m = np.asarray(hits, dtype=np.float64), np.asarray(n, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        share, z2 = h / m, Z95**2
        middle = (share + z2 / (2 * m)) / (1 + z2 / m)
        half = Z95 / (1 + z2 / m) * np.sqrt(share * (1 - share) / m + z2 / (4 * m**2))
        return np.clip(middle - half, 0.0, 1.0), np.clip(middle + half, 0.0, 1.0)


def jackknife_error(leave_out: Floats) -> float:
    """Standard error from leave-one-group-out values (G,): √((G-1)/G · Σ(θ₋g - θ̄)²) (Efron & Tibshirani, eq. 11.5)."""
    groups = leave_out.size
    return math.sqrt((groups - 1) / groups * float(np.sum((leave_out - leave_out.mean()) ** 2)))


def jackknife_corrected(value: float, leave_out: Floats) -> float:
    """θ less its bias of order 1/n: G·θ - (G-1)·mean θ₋g (Efron & Tibshirani, eq. 10.16 and 10.17)."""
    groups = leave_out.size
    return groups * value - (groups - 1) * float(leave_out.mean())


def bootstrap_difference(value: float, replicates: Floats, prompts: int, higher_is_better: bool) -> PairedDifference:
    """A difference with its paired replicates' interval and p; all NaN where nothing could be compared."""
    known = replicates[~np.isnan(replicates)]
    if known.size < 2:
        return PairedDifference(value, math.nan, math.nan, math.nan, prompts, math.nan, higher_is_better)
    low, high = percentile_interval(known, prompts)
    tail = min(float(np.mean(known <= 0)), float(np.mean(known >= 0)))
    p = min(1.0, 2 * max(tail, 1 / (1 + known.size)))
    return PairedDifference(value, low, high, p, prompts, 2.8 * float(known.std(ddof=1)), higher_is_better)


def simultaneous_differences(
    scores: Floats, baseline: Floats, *, seed: int = 0, draws: int = DRAWS, higher_is_better: bool = True
) -> tuple[PairedDifference, ...]:
    """Each of K points (K, P) minus one baseline (P,), with intervals that hold all at once (95 % for the family).

    Max-T over joint sign flips (Westfall & Young 1993), as in `winner_set`; p is adjusted the same way.
    Prompts that any point or the baseline lacks are left out of all.
    """
    apart = scores - baseline
    apart = apart[:, ~np.isnan(apart).any(axis=0)]
    n = apart.shape[1]
    if n < 2:
        raise BadInput(f"Simultaneous intervals need at least 2 prompts scored everywhere, found {n}.")
    mean, error = apart.mean(1), apart.std(1, ddof=1) / math.sqrt(n)
    live = error > 1e-12 * np.maximum(np.abs(mean), 1e-300)
    largest = _largest_t(apart[live].T, _signs(n, seed, draws)) if live.any() else np.zeros(draws)
    critical = _upper_quantile(largest)
    found = []
    for k in range(len(apart)):
        t = abs(mean[k]) / error[k] if live[k] else (0.0 if mean[k] == 0 else math.inf)
        p = (1 + int(np.sum(largest >= t))) / (1 + draws)
        half = critical * error[k] if live[k] else 0.0
        value = float(mean[k])
        found.append(PairedDifference(value, value - half, value + half, p, n, 2.8 * float(error[k]), higher_is_better))
    return tuple(found)


def false_discovery_q(p: Floats) -> Floats:
    """Benjamini & Hochberg's (1995) q of each p, NaN kept: the share of false ones among all with a q as small."""
    q = np.full(p.shape, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    if known.size == 0:
        return q
    order = known[np.argsort(p[known])]
    raised = p[order] * order.size / np.arange(1, order.size + 1)
    q[order] = np.minimum(np.minimum.accumulate(raised[::-1])[::-1], 1.0)
    return q


def normal_p(value: float, error: float) -> float:
    """Two-sided p of zero for a value with a normal standard error."""
    if error == 0:
        return 1.0 if value == 0 else 0.0
    return math.erfc(abs(value) / error / math.sqrt(2))


def _pairwise_variance(scores: Floats) -> Floats:
    """Var(score_j - score_k) over prompts, unbiased: (K, K)."""
    covariance = np.atleast_2d(np.cov(scores))
    own = np.diag(covariance)
    variance: Floats = own[:, None] + own[None, :] - 2 * covariance
    return np.where(variance > 1e-12 * (own[:, None] + own[None, :]), variance, 0.0)  # equal rows leave rounding


def _max_t(scores: Floats, seed: int, draws: int, error: float) -> float:
    """1 - `error` quantile over draws of the largest studentised |d̄*| among all pairs of rows (K, P), for P prompts.

    A pair that lacks prompts (NaN) is judged on those that both have, by the same draws, and its t is taken to the
    scale of P prompts: the few prompts of points left behind have heavy tails, which are not the finalists'.
    0 where all points are equal.
    """
    signs, largest = _signs(scores.shape[1], seed, draws), np.zeros(draws)
    for mask, first, second in _pairs_by_prompts(~np.isnan(scores)):
        found = np.zeros(draws)
        for start in range(0, len(first) if mask.sum() >= 2 else 0, PAIRS_AT_ONCE):
            these = slice(start, start + PAIRS_AT_ONCE)
            one, other = scores[first[these]][:, mask], scores[second[these]][:, mask]
            apart = one - other
            live = apart.var(1) > 1e-12 * (one.var(1) + other.var(1))  # equal rows leave rounding
            if live.any():
                found = np.maximum(found, _largest_t(apart[live].T, signs[:, mask]))
        largest = np.maximum(largest, found if mask.all() else _t_of_other_size(found, int(mask.sum()), mask.size))
    return _upper_quantile(largest, error)


def _pairs_by_prompts(drawn: npt.NDArray[np.bool_]) -> Iterator[tuple[npt.NDArray[np.bool_], Places, Places]]:
    """The pairs of rows of (K, P), grouped by the prompts that both rows have: that mask (P,), first and second rows.

    Rows are alike in a race's rungs, so there are few masks, whatever the number of pairs.
    """
    patterns, pattern = np.unique(drawn, axis=0, return_inverse=True)
    common = patterns[:, None] & patterns[None]
    masks, mask_of = np.unique(common.reshape(-1, drawn.shape[1]), axis=0, return_inverse=True)
    first, second = np.triu_indices(len(drawn), 1)
    which = mask_of.reshape(len(patterns), -1)[pattern.ravel()[first], pattern.ravel()[second]]
    for number, mask in enumerate(masks):
        places = np.flatnonzero(which == number)
        yield mask, first[places], second[places]


def _t_of_other_size(t: Floats, n: int, other: int) -> Floats:
    """The t of `other` prompts that is as unlikely as `t` of n, by Wallace's (1959) normal approximation and back."""
    degrees, wanted = n - 1, other - 1
    z = (8 * degrees + 1) / (8 * degrees + 3) * np.sqrt(degrees * np.log1p(t**2 / degrees))
    u = z * (8 * wanted + 3) / (8 * wanted + 1)
    return np.asarray(np.sqrt(wanted * np.expm1(u**2 / wanted)))


def _signs(n: int, seed: int, draws: int) -> Floats:
    """(B, n): ±1 for every draw and prompt."""
    return np.asarray(_generator(seed, "signs", n).integers(0, 2, (draws, n)) * 2.0 - 1.0, dtype=np.float64)


def _largest_t(apart: Floats, signs: Floats) -> Floats:
    """max over columns of |d̄*|/se* for every draw of signs (B, P), one a prompt, of differences (P, columns): (B,).

    Exact where a difference is as likely as its negative, as between two runs of one model. Signs instead of resampled
    prompts: a draw's own spread then never vanishes. Resampled and studentised, a column that differs on few prompts
    drives the largest t of 300 pairs to 6.3 (25 points of the demo on 40 prompts; signs give 3.5), and nothing is
    ever told apart.
    """
    n = len(apart)
    squared = np.square(apart).mean(0)
    largest = np.empty(len(signs))
    for start in range(0, len(signs), 250):  # (250, columns) at a time bounds the memory
        moved = signs[start : start + 250] @ apart / n
        variance = (squared - moved**2) / (n - 1)
        t2 = np.divide(moved**2, variance, out=np.full_like(moved, math.inf), where=variance > 1e-12 * squared)
        largest[start : start + 250] = np.sqrt(t2.max(1))
    return largest


def _upper_quantile(replicates: Floats, error: float = 0.05) -> float:
    """The ⌈(1 - error)·(B+1)⌉-th smallest of B: an interpolated quantile of few draws would be exceeded more often."""
    place = min(math.ceil((1 - error) * (replicates.size + 1)), replicates.size)
    return float(np.partition(replicates, place - 1)[place - 1])


def _t_from_normal(z: float, degrees: int) -> float:
    """The t quantile at the tail probability of normal quantile `z` (Abramowitz & Stegun 26.7.5, three terms)."""
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / degrees + second / degrees**2 + third / degrees**3


def _generator(seed: int, purpose: str, *item: Any) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=random_seed(seed, purpose, *item)))
