"""What searches share: a point, its name in a table, and which of the scored ones is best."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from decimal import Decimal

from ambergrade.errors import BadSetting
from ambergrade.identity import canonical_json

Value = float | str | bool
Point = dict[str, Value]


def key_of(point: Mapping[str, Value]) -> str:
    """The same text for the same point, in whatever order its names come.

    >>> key_of({"b": 0.5, "a": 1}) == key_of({"a": 1.0, "b": 0.5})
    True
    """
    return canonical_json({name: plain(value) for name, value in point.items()})


def plain(value: Value) -> Value:
    """Numbers as floats; texts and booleans as they are."""
    return value if isinstance(value, bool | str) else float(value)


def best_of(scored: Iterable[tuple[Point, float]], *, higher_is_better: bool) -> tuple[Point, float] | None:
    """The best scored point, the earlier one among equals; NaN (not scored) is passed over. None without any."""
    best: tuple[Point, float] | None = None
    for point, score in scored:
        better = best is None or (score > best[1] if higher_is_better else score < best[1])
        if score == score and better:
            best = (dict(point), score)
    return best


def decimal_range(start: float, stop: float, step: float) -> list[float]:
    """The numbers from `start` to before `stop`, each the one that its decimal digits spell.

    Raises BadSetting for a step of 0.

    >>> decimal_range(0.5, 0.9, 0.1)
    [0.5, 0.6, 0.7, 0.8]
    """
    first, last, by = (Decimal(repr(number)) for number in (start, stop, step))
    if not by:
        raise BadSetting(f"range({start},{stop},{step}) never ends: the step is 0.")
    count = max(0, int((last - first) / by) + 1)
    values = (first + by * number for number in range(count))
    return [float(value) for value in values if (value < last if by > 0 else value > last)]
