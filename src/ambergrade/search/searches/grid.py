"""A full grid: every combination of the listed values, once, in a stated order."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from ambergrade.errors import BadSetting

Point = dict[str, float]


class Grid:
    """Proposes each point of the grid once (`ask`), hears scores (`tell`), knows the best so far.

    The order is the start point first, then the rows of the product as written: the last name runs fastest.
    A start point off the grid is proposed too.

    >>> grid = Grid({"a": [0.0, 0.8], "b": [0.0, 0.5]}, objective="tag_balance", start={"a": 0.8, "b": 0.5})
    >>> [tuple(point.values()) for point in grid.points]
    [(0.8, 0.5), (0.0, 0.0), (0.0, 0.5), (0.8, 0.0)]
    """

    def __init__(
        self,
        values: Mapping[str, Sequence[float]],
        *,
        objective: str,
        higher_is_better: bool = True,
        start: Mapping[str, float] | None = None,
    ) -> None:
        """Raise BadSetting for a name without values, a repeated value, or a start point with other names."""
        complaints = [f"{name} has no values" for name, listed in values.items() if not len(listed)]
        complaints += [f"{name} repeats a value" for name, listed in values.items() if len(set(listed)) < len(listed)]
        if not values:
            complaints.append("no names are listed")
        if start is not None and set(start) != set(values):
            complaints.append(f"the start point names {sorted(start)}, the grid {sorted(values)}")
        if complaints:
            raise BadSetting(f"A grid cannot be made: {'; '.join(complaints)}.\nList values like a: [0.4, 0.8, 1.2].")
        self.objective = objective
        self.higher_is_better = higher_is_better
        rows = [tuple(map(float, row)) for row in itertools.product(*values.values())]
        if start is not None:
            rows.insert(0, tuple(float(start[name]) for name in values))
        self.points: tuple[Point, ...] = tuple(dict(zip(values, row, strict=True)) for row in dict.fromkeys(rows))
        self._asked = 0
        self._scores: dict[int, float] = {}

    def __len__(self) -> int:
        return len(self.points)

    def ask(self) -> Point | None:
        """The next point; None when all were asked for."""
        if self._asked == len(self.points):
            return None
        self._asked += 1
        return dict(self.points[self._asked - 1])

    def tell(self, point: Mapping[str, float], score: float) -> None:
        """Hear a point's score. NaN says that it could not be scored; such a point is never the best."""
        if dict(point) not in self.points:
            raise BadSetting(f"{dict(point)} was never proposed by this grid of {len(self)} points.")
        self._scores[self.points.index(dict(point))] = float(score)

    @property
    def best(self) -> tuple[Point, float] | None:
        """The best scored point and its score, the earlier one among equals; None before the first score."""
        scored = {number: score for number, score in sorted(self._scores.items()) if score == score}
        if not scored:
            return None
        number = (max if self.higher_is_better else min)(scored, key=lambda n: scored[n])
        return dict(self.points[number]), scored[number]


Search = Grid  # the name under which every search module is found
