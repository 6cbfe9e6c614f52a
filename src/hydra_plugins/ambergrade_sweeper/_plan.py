"""What a command line sweeps over: its overrides as axes of a search, and a search's point as overrides again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override

from ambergrade.errors import BadSetting
from ambergrade.identity import digest
from ambergrade.search.points import Value

Spec = list[Any] | dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """The axes of a sweep, in the order they were written."""

    fixed: Mapping[str, str]
    """Override key to value, as given on the command line and the same for every point."""
    axes: Mapping[str, Spec]
    """Override key to its values: texts or numbers, or a range."""
    order: Sequence[str]
    """Keys of both, as written."""
    texts: Mapping[str, Mapping[Value, str]] = field(default_factory=dict)
    """How a listed value was spelled."""

    def overrides(self, point: Mapping[str, Value]) -> list[str]:
        """A point as the overrides of its job."""
        return [f"{key}={self.fixed[key] if key in self.fixed else self._text(key, point[key])}" for key in self.order]

    def swept(self, point: Mapping[str, Value]) -> list[str]:
        """The overrides that tell a point from the others of its sweep."""
        return [f"{key}={self._text(key, point[key])}" for key in self.axes]

    def label(self, point: Mapping[str, Value]) -> str:
        """`a 0.8, b 0.5`: the last part of each key and its value."""
        return ", ".join(f"{key.rpartition('.')[2]} {self._text(key, point[key])}" for key in self.axes)

    def _text(self, key: str, value: Value) -> str:
        spelled = self.texts.get(key, {})
        if value in spelled:
            return spelled[value]
        axis = self.axes[key]
        whole = isinstance(axis, dict) and axis.get("whole")
        return str(int(value)) if whole else repr(value) if isinstance(value, float) else str(value)

    def spec(self, key: str) -> Spec:
        """The axis as a search takes it."""
        axis = self.axes[key]
        return {name: axis[name] for name in axis if name != "whole"} if isinstance(axis, dict) else axis


def read_plan(overrides: Sequence[Override], values: Mapping[str, Spec], space: str, *, listed_only: bool) -> Plan:
    """The plan of parsed overrides; where none sweeps, `values` of the search's yaml, their names below `space`.

    Raises:
        BadSetting: an interval where the search walks lists only (a grid).
    """
    fixed: dict[str, str] = {}
    axes: dict[str, Spec] = {}
    texts: dict[str, dict[Value, str]] = {}
    for override in overrides:
        key = override.get_key_element()
        for earlier in (fixed, axes, texts):  # the last one holds, as in Hydra
            earlier.pop(key, None)
        if not override.is_sweep_override():
            fixed[key] = override.get_value_element_as_str()
        elif override.is_discrete_sweep():
            spelled = list(dict.fromkeys(override.sweep_string_iterator()))
            numbers = None if listed_only else _numbers(spelled)
            axes[key] = list(numbers if numbers is not None else spelled)
            texts[key] = dict(zip(axes[key], spelled, strict=True))
        else:
            axes[key] = _interval(key, override, listed_only)
    order = [override.get_key_element() for override in overrides]
    if not axes:
        axes = {f"{space}.{name}" if space else name: spec for name, spec in values.items()}
        order = [key for key in order if key not in axes] + list(axes)
        fixed = {key: value for key, value in fixed.items() if key not in axes}
    return Plan(fixed, axes, list(dict.fromkeys(order)), texts)


def point_key(overrides: Sequence[str]) -> str:
    """The name of a point's folder: the same overrides in any order give the same."""
    return digest(sorted(overrides))[:16]


def _numbers(texts: Sequence[str]) -> list[float] | None:
    try:
        return [float(text) for text in texts]
    except ValueError:
        return None


def _interval(key: str, override: Override, listed_only: bool) -> Spec:
    interval = override.value()
    assert isinstance(interval, IntervalSweep), (key, interval)
    if listed_only:
        raise BadSetting(
            f"{override.input_line}: a grid walks lists, an interval has no end of values.\n"
            f"Write {key}=range(…) or a list, or choose a search that samples: search=tpe."
        )
    assert interval.start is not None
    assert interval.end is not None
    axis: dict[str, Any] = {"low": float(interval.start), "high": float(interval.end)}
    if "log" in interval.tags:
        axis["log"] = True
    if "int" in interval.tags or (
        isinstance(interval.start, int) and isinstance(interval.end, int)
    ):  # int(interval(…))
        axis |= {"whole": True} if axis.get("log") else {"whole": True, "step": 1.0}
    return axis
