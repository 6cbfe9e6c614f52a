"""A full grid: every combination of the listed values, once, in a stated order."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from ambergrade.errors import BadSetting
from ambergrade.search.points import Point, Value, best_of, key_of, plain


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
        values: Mapping[str, Sequence[Value]],
        *,
        objective: str,
        higher_is_better: bool = True,
        start: Mapping[str, Value] | None = None,
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
        rows = [tuple(map(plain, row)) for row in itertools.product(*values.values())]
        if start is not None:
            rows.insert(0, tuple(plain(start[name]) for name in values))
        self._keep(tuple(dict(zip(values, row, strict=True)) for row in dict.fromkeys(rows)))

    def _keep(self, points: tuple[Point, ...]) -> None:
        self.points = points
        self._waiting = {key_of(point): point for point in self.points}
        self._known = dict(self._waiting)
        self._scores: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self.points)

    def ask(self) -> Point | None:
        """The next point; None when all were asked for."""
        if not self._waiting:
            return None
        return dict(self._waiting.pop(next(iter(self._waiting))))

    def tell(self, point: Mapping[str, Value], score: float) -> None:
        """Hear a point's score. NaN says that it could not be scored; such a point is never the best."""
        if key_of(point) not in self._known:
            raise BadSetting(f"{dict(point)} was never proposed by this grid of {len(self)} points.")
        self._scores[key_of(point)] = float(score)

    def recall(self, point: Mapping[str, Value], score: float) -> None:
        """Hear a point's score from the record: it is not asked for again. A point off the grid is passed over."""
        if self._waiting.pop(key_of(point), None):
            self.tell(point, score)

    def retry(self, point: Mapping[str, Value]) -> None:
        """A point of an earlier process that was not finished: it waits in its place already."""

    @property
    def best(self) -> tuple[Point, float] | None:
        """The best scored point and its score, the earlier one among equals; None before the first score."""
        scored = ((point, self._scores[key]) for key, point in self._known.items() if key in self._scores)
        return best_of(scored, higher_is_better=self.higher_is_better)


Search = Grid  # the name under which every search module is found
