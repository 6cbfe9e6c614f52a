"""Racing: all points start on a few shared prompts, and only those that may still be the best are drawn further.

Maron & Moore's Hoeffding races (1994) and Birattari's F-Race (2002), with simultaneous paired intervals as the test.
A rung adds prompts to those drawn before: nothing is drawn twice, and a finalist ends with the full evaluation's rows.

Every rung is a look at the same question, and the looks share one error of 5 %, as in a group-sequential trial: the
last look keeps nine tenths of it, so that its verdict is a full evaluation's, and the earlier ones divide the rest. By
the union bound no more than 5 % of races leave a point behind for one that is no better, however many rungs there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import spearmanr

from ambergrade.errors import BadSetting
from ambergrade.identity import random_seed

Floats = npt.NDArray[np.float64]
TINY = 1e-300
Judge = Callable[[Floats, Sequence[int], float], Sequence[int]]
"""Scores (K points, P prompts), paired by column and NaN where a point was not drawn; the rows still in the race; and
the error that this look may make. It gives those of the rows that are not significantly different from the best."""


@dataclass(frozen=True)
class Rung:
    """What to draw next: every listed point on the prompts from `start` to before `stop`."""

    number: int
    start: int
    stop: int
    points: tuple[str, ...]


class Race:
    """Ask for a rung, tell every point's scores on it (or that it failed), and ask again until None.

    >>> race = Race(["near", "far"], [4, 8], judge=lambda scores, alive, error: [int(scores.mean(1).argmax())])
    >>> rung = race.ask()
    >>> (rung.start, rung.stop, rung.points)
    (0, 4, ('near', 'far'))
    >>> race.tell("near", [1.0, 1, 1, 1]); race.tell("far", [0.0, 0, 0, 0])
    >>> race.ask() is None, race.alive, race.spent, race.full
    (True, ('near',), 8, 16)
    """

    def __init__(self, points: Sequence[str], rungs: Sequence[int], judge: Judge, *, error: float = 0.05) -> None:
        """`rungs` are prompts in all after each rung, rising; the last is the full evaluation. `error`: of all looks.

        A first rung of 12 prompts or more: 8 have 256 patterns of signs, too few to show an early look's small error.
        """
        if not points or len(set(points)) < len(points):
            raise BadSetting(f"A race needs points, each once; found {len(points)}, {len(set(points))} different.")
        if not rungs or list(rungs) != sorted(set(rungs)) or rungs[0] < 2:
            raise BadSetting(f"A race's rungs are rising numbers of prompts, 2 or more: [12, 24, 48]; found {rungs}.")
        self.rungs = tuple(rungs)
        self.alive: tuple[str, ...] = tuple(points)
        """Points that may still be the best, in the order given."""
        self.out: dict[str, int] = {}
        """Point to the number of the rung (from 0) that it was left behind at."""
        self.failed: set[str] = set()
        self.screened: tuple[str, ...] = ()
        """Points that a screening left out; nothing of theirs is in the race."""
        self.errors = look_errors(len(rungs), error)
        """What each look may spend."""
        self._points = tuple(points)
        self._rows: dict[str, list[float]] = {point: [] for point in points}
        self._judge = judge
        self._next = 0

    def ask(self) -> Rung | None:
        """The next rung; None when the last one is drawn or a single point is left."""
        if self._next:
            self._eliminate()
        if self._next == len(self.rungs) or not self.alive or (self._next and len(self.alive) == 1):
            return None
        start = self.rungs[self._next - 1] if self._next else 0
        self._next += 1
        return Rung(self._next - 1, start, self.rungs[self._next - 1], self.alive)

    def tell(self, point: str, scores: Sequence[float]) -> None:
        """Hear a point's scores on the rung's prompts, in their order; NaN for one that could not be scored."""
        wanted = self.rungs[self._next - 1] - len(self._rows[point])
        if point not in self.alive or len(scores) != wanted:
            raise BadSetting(f"{point}: {len(scores)} scores were told, the rung asked for {max(wanted, 0)}.")
        if any(math.isinf(score) for score in scores):
            raise BadSetting(f"{point}: an infinite score was told; give a number, or NaN for what was not scored.")
        self._rows[point] += map(float, scores)

    def fail(self, point: str) -> None:
        """A point that could not be drawn leaves the race."""
        self.failed.add(point)
        self.alive = tuple(one for one in self.alive if one != point)

    def screen(self, found: Screened) -> None:
        """Before the first rung: leave out what a screening has left behind."""
        self.screened = tuple(point for point in self.alive if point not in found.kept)
        self.alive = tuple(point for point in self.alive if point in found.kept)

    def rows(self, point: str) -> tuple[float, ...]:
        """All scores that a point has so far."""
        return tuple(self._rows[point])

    @property
    def spent(self) -> int:
        """Pictures drawn (one a prompt)."""
        return sum(map(len, self._rows.values()))

    @property
    def full(self) -> int:
        """Pictures that every point on every prompt would have cost."""
        return len(self._points) * self.rungs[-1]

    @property
    def text(self) -> str:
        """`7 of 25 points left; 412 pictures drawn, a full evaluation takes 1200: 34 %`."""
        left = f"{len(self.alive)} of {len(self._points)} points left"
        failed = f", {len(self.screened)} screened out" if self.screened else ""
        failed += f", {len(self.failed)} failed" if self.failed else ""
        share = self.spent / self.full
        return f"{left}{failed}; {self.spent} pictures drawn, a full evaluation takes {self.full}: {share:.0%}"

    def _eliminate(self) -> None:
        look = self._next - 1
        short = [point for point in self.alive if len(self._rows[point]) < self.rungs[look]]
        if short:
            raise BadSetting(f"The rung is not finished: nothing was told of {', '.join(short[:3])}.")
        if len(self.alive) < 2:
            return
        alive = [row for row, point in enumerate(self._points) if point in self.alive]
        kept = {self._points[row] for row in self._judge(self._scores(), alive, self.errors[look])}
        for point in self.alive:
            if point not in kept:
                self.out[point] = look
        self.alive = tuple(point for point in self.alive if point in kept)

    def _scores(self) -> Floats:
        """(K, P): what was told so far, NaN elsewhere."""
        scores = np.full((len(self._points), self.rungs[self._next - 1]), np.nan)
        for row, point in enumerate(self._points):
            scores[row, : len(self._rows[point])] = self._rows[point]
        return scores


class Screening:
    """Before a race: cheap pictures of all points (fewer sampler steps) tell which of them are worth whole ones.

    Cheap pictures are other pictures, so their word is checked: some points, spread over the cheap order from the worst
    to the best, are drawn whole on the same prompts, and Spearman's rank correlation of the two orders must reach
    `least`. Else the screening is abandoned and every point races. The whole pictures are the race's own first rung,
    so only those of points left behind are lost.

    >>> cheap = {"a": [0.0, 0.1, 0.0], "b": [0.5, 0.6, 0.6], "c": [0.9, 0.9, 1.0]}
    >>> screening = Screening(cheap, judge=lambda scores, alive, error: [2], controls=3)
    >>> for point, scores in cheap.items():
    ...     screening.tell(point, scores)
    >>> for point in screening.controls():
    ...     screening.check(point, [score / 2 for score in cheap[point]])
    >>> screening.decide().kept, screening.decide().rho
    (('c',), 1.0)
    """

    def __init__(
        self,
        points: Iterable[str],
        judge: Judge,
        *,
        controls: int = 8,
        least: float = 0.8,
        error: float = 0.05,
        higher_is_better: bool = True,
    ) -> None:
        """`controls`: points that are drawn whole to check the cheap order, 3 or more."""
        if controls < 3:
            raise BadSetting(f"A rank correlation of {controls} points says nothing; give controls=3 or more.")
        self._points, self._judge, self._count = tuple(points), judge, controls
        self._least, self._error, self._sign = least, error, 1 if higher_is_better else -1
        self._cheap: dict[str, Floats] = {}
        self._whole: dict[str, Floats] = {}

    def tell(self, point: str, scores: Sequence[float]) -> None:
        """Hear a point's cheap scores, one a prompt; NaN for one that could not be scored."""
        self._cheap[point] = np.asarray(scores, dtype=np.float64)

    def controls(self) -> tuple[str, ...]:
        """Points to draw whole on the same prompts, from the worst to the best: evenly spread over the cheap order."""
        scored = [point for point, scores in self._cheap.items() if not np.isnan(scores).all()]
        ranked = sorted(scored, key=lambda point: self._sign * float(np.nanmean(self._cheap[point])))
        places = np.linspace(0, len(ranked) - 1, min(self._count, len(ranked))).round().astype(int)
        return tuple(ranked[place] for place in dict.fromkeys(places.tolist()))

    def check(self, point: str, scores: Sequence[float]) -> None:
        """Hear a control's whole scores, on the prompts of the cheap ones."""
        self._whole[point] = np.asarray(scores, dtype=np.float64)

    def decide(self) -> Screened:
        """Which points race: all of them where fewer than 3 controls were drawn. Raises BadSetting if asked early."""
        missing = [point for point in self._points if point not in self._cheap]
        if missing:
            raise BadSetting(f"{len(missing)} points have no cheap scores: {', '.join(missing[:3])}.")
        if len(self._whole) < 3:  # they failed
            return Screened(self._points, float("nan"), float("nan"), float("nan"), abandoned=True)
        both = list(self._whole)
        rho, low, high = rank_correlation(
            np.stack([self._cheap[point] for point in both]), np.stack([self._whole[point] for point in both])
        )
        if not rho >= self._least:  # NaN, of points that are all alike, is no agreement
            return Screened(self._points, rho, low, high, abandoned=True)
        told = [row for row, point in enumerate(self._points) if not np.isnan(self._cheap[point]).all()]
        kept = self._judge(np.stack([self._cheap[point] for point in self._points]), told, self._error)
        return Screened(tuple(self._points[row] for row in sorted(kept)), rho, low, high, abandoned=False)


@dataclass(frozen=True)
class Screened:
    """What a screening found."""

    kept: tuple[str, ...]
    """The points that race, in the order given; all of them where it is abandoned."""
    rho: float
    """Spearman's rank correlation of the controls' cheap and whole means, with a 95 % interval over prompts."""
    low: float
    high: float
    abandoned: bool

    @property
    def text(self) -> str:
        """`rank correlation with whole pictures 0.95 [0.88, 0.99]; 9 points race`, or that it is abandoned."""
        told = f"rank correlation with whole pictures {self.rho:.2f} [{self.low:.2f}, {self.high:.2f}]"
        return f"{told}: too poor, all points race" if self.abandoned else f"{told}; {len(self.kept)} points race"


def rank_correlation(one: Floats, other: Floats, *, seed: int = 0, draws: int = 1000) -> tuple[float, float, float]:
    """Spearman's ρ of the means of K points scored twice on P prompts, (K, P) each, with its 95 % interval.

    Percentile bootstrap of prompts, the same for all points and both scores. Prompts that lack a score are left out.
    """
    keep = ~(np.isnan(one) | np.isnan(other)).any(0)
    one, other = one[:, keep], other[:, keep]
    n = one.shape[1]
    if n == 0:
        return float("nan"), float("nan"), float("nan")
    rng = np.random.Generator(np.random.Philox(key=random_seed(seed, "rank correlation", n)))
    weights = rng.multinomial(n, np.full(n, 1 / n), draws)
    found = np.array([_spearman(one @ row / n, other @ row / n) for row in (np.ones(n), *weights)])
    known = found[1:][~np.isnan(found[1:])]
    low, high = np.percentile(known, [2.5, 97.5]) if known.size else (np.nan, np.nan)
    return float(found[0]), float(low), float(high)


def _spearman(one: Floats, other: Floats) -> float:
    """scipy's Spearman ρ; NaN where either is constant. Means that differ by rounding alone share their rank."""
    ranked = [np.round(values / max(float(np.abs(values).max()), TINY), 9) for values in (one, other)]
    if any(np.ptp(values) == 0 for values in ranked):
        return float("nan")
    return float(spearmanr(*ranked).statistic)


def look_errors(looks: int, error: float = 0.05) -> tuple[float, ...]:
    """The error of every look: nine tenths of it for the last, the rest in equal parts for those before.

    >>> look_errors(2, 0.5)
    (0.05, 0.45)
    """
    return (*[0.1 * error / (looks - 1)] * (looks - 1), 0.9 * error) if looks > 1 else (error,)
