"""Racing: all points start on a few shared prompts, and only those that may still be the best are drawn further.

Maron & Moore's Hoeffding races (1994) and Birattari's F-Race (2002), with simultaneous paired intervals as the test.
A rung adds prompts to those drawn before: nothing is drawn twice, and a finalist ends with the full evaluation's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ambergrade.errors import BadSetting

Floats = npt.NDArray[np.float64]
Judge = Callable[[Floats], Sequence[int]]
"""Scores (K points, P prompts), paired by column, to the rows that cannot be told from the best."""


@dataclass(frozen=True)
class Rung:
    """What to draw next: every listed point on the prompts from `start` to before `stop`."""

    number: int
    start: int
    stop: int
    points: tuple[str, ...]


class Race:
    """Ask for a rung, tell every point's scores on it (or that it failed), and ask again until None.

    >>> race = Race(["near", "far"], [4, 8], judge=lambda scores: [int(scores.mean(1).argmax())])
    >>> rung = race.ask()
    >>> (rung.start, rung.stop, rung.points)
    (0, 4, ('near', 'far'))
    >>> race.tell("near", [1.0, 1, 1, 1]); race.tell("far", [0.0, 0, 0, 0])
    >>> race.ask() is None, race.alive, race.spent, race.full
    (True, ('near',), 8, 16)
    """

    def __init__(self, points: Sequence[str], rungs: Sequence[int], judge: Judge) -> None:
        """`rungs` are prompts in all after each rung, rising; the last is the full evaluation."""
        if not points or len(set(points)) < len(points):
            raise BadSetting(f"A race needs points, each once; found {len(points)}, {len(set(points))} different.")
        if not rungs or list(rungs) != sorted(set(rungs)) or rungs[0] < 2:
            raise BadSetting(f"A race's rungs are rising numbers of prompts, 2 or more: [8, 24, 48]; found {rungs}.")
        self.rungs = tuple(rungs)
        self.alive: tuple[str, ...] = tuple(points)
        """Points that may still be the best, in the order given."""
        self.out: dict[str, int] = {}
        """Point to the number of the rung (from 0) that it was left behind at."""
        self.failed: set[str] = set()
        self._count = len(points)
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
        self._rows[point] += map(float, scores)

    def fail(self, point: str) -> None:
        """A point that could not be drawn leaves the race."""
        self.failed.add(point)
        self.alive = tuple(one for one in self.alive if one != point)

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
        return self._count * self.rungs[-1]

    @property
    def text(self) -> str:
        """`7 of 25 points left; 412 pictures drawn, a full evaluation takes 1200: 34 %`."""
        left = f"{len(self.alive)} of {self._count} points left"
        failed = f", {len(self.failed)} failed" if self.failed else ""
        share = self.spent / self.full
        return f"{left}{failed}; {self.spent} pictures drawn, a full evaluation takes {self.full}: {share:.0%}"

    def _eliminate(self) -> None:
        kept = [self.alive[number] for number in sorted(self._judged())]
        for point in self.alive:
            if point not in kept:
                self.out[point] = self._next - 1
        self.alive = tuple(kept)

    def _judged(self) -> Sequence[int]:
        short = [point for point in self.alive if len(self._rows[point]) < self.rungs[max(self._next - 1, 0)]]
        if short:
            raise BadSetting(f"The rung is not finished: nothing was told of {', '.join(short[:3])}.")
        if len(self.alive) < 2:
            return range(len(self.alive))
        return list(self._judge(np.array([self._rows[point] for point in self.alive])))
