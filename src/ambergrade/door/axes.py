"""Reads the overrides of a sweep: which are swept, over what, and how a point is written as overrides again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep, Transformer

from ambergrade.errors import BadSetting
from ambergrade.identity import random_seed
from ambergrade.search.points import Value, decimal_range

Spec = list[Value] | dict[str, Any]
"""An axis as a search takes it: its values, or a range {low, high} with step or log."""


@dataclass(frozen=True)
class Axes:
    """The axes of a sweep and its fixed overrides, in the order they were written."""

    fixed: Mapping[str, str]
    """Override key to value, the same for every point."""
    specs: Mapping[str, Spec]
    """Override key to its values."""
    order: Sequence[str]
    """Keys of both, as written."""
    added: Mapping[str, str] = field(default_factory=dict)
    """Keys as they are written, where that is `+key` or `++key`."""
    whole: frozenset[str] = frozenset()
    """Ranges of whole numbers."""
    texts: Mapping[str, Mapping[Value, str]] = field(default_factory=dict)
    """How a listed value was spelled."""

    def overrides(self, point: Mapping[str, Value]) -> list[str]:
        """A point as the overrides of its job."""
        texts = {**self.fixed, **{key: self._text(key, point[key]) for key in self.specs}}
        return [f"{self.added.get(key, key)}={texts[key]}" for key in self.order]

    def label(self, point: Mapping[str, Value]) -> str:
        """`a 0.8, b 0.5`: the last part of each key and its value."""
        named = [f"{key.rpartition('.')[2]} {self._text(key, point[key])}" for key in self.specs]
        return ", ".join(named) or "the point"

    def corners(self) -> list[dict[str, Value]]:
        """One point, and those that differ from it in a single listed value: together they hold every value."""
        first = {key: spec["low"] if isinstance(spec, dict) else spec[0] for key, spec in self.specs.items()}
        others = [(key, value) for key, spec in self.specs.items() if isinstance(spec, list) for value in spec[1:]]
        return [first, *({**first, key: value} for key, value in others)]

    def _text(self, key: str, value: Value) -> str:
        spelled = self.texts.get(key, {})
        if value in spelled:
            return spelled[value]
        return str(int(value)) if key in self.whole else repr(value) if isinstance(value, float) else str(value)


def read_axes(overrides: Sequence[Override], values: Mapping[str, Spec], space: str, *, listed_only: bool) -> Axes:
    """The axes of parsed overrides; where none sweeps, `values` of the search's yaml, their names below `space`.

    Raises:
        BadSetting: an interval where the search walks lists only (a grid).
    """
    fixed: dict[str, str] = {}
    specs: dict[str, Spec] = {}
    texts: dict[str, dict[Value, str]] = {}
    whole: set[str] = set()
    added: dict[str, str] = {}
    for override in overrides:
        key = override.get_key_element().lstrip("+")
        added[key] = override.get_key_element()
        for earlier in (fixed, specs, texts):  # the last one holds, as in Hydra
            earlier.pop(key, None)
        whole.discard(key)
        if not override.is_sweep_override():
            fixed[key] = override.get_value_element_as_str()
        elif override.is_discrete_sweep():
            listed = listed_values(override)
            texts[key] = dict(reversed(listed))  # of equal values the first spelling holds
            specs[key] = list(dict.fromkeys(value for value, _ in listed))
        else:
            specs[key], is_whole = _interval(key, override, listed_only)
            whole |= {key} if is_whole else set()
    order = list(added)
    if not specs:
        specs = {f"{space}.{name}" if space else name: spec for name, spec in values.items()}
        order = [key for key in order if key not in specs] + list(specs)
        fixed = {key: value for key, value in fixed.items() if key not in specs}
    return Axes(fixed, specs, list(dict.fromkeys(order)), added, frozenset(whole), texts)


def listed_values(override: Override) -> list[tuple[Value, str]]:
    """Every value of a list, range, choice or glob with its spelling; numbers as the floats that they equal."""
    sweep = override.value()
    if isinstance(sweep, ChoiceSweep):
        raw: list[Any] = list(sweep.list)
    elif isinstance(sweep, RangeSweep):
        ends = (sweep.start or 0, sweep.stop or 0, sweep.step)
        ints = [end for end in ends if isinstance(end, int)]
        raw = list(range(*ints)) if len(ints) == 3 else list(decimal_range(*ends))
    else:  # a glob
        raw = list(override.sweep_iterator())
        if not raw and override.config_loader is not None:
            known = ", ".join(override.config_loader.get_group_options(override.key_or_group))
            raise BadSetting(f"{override.input_line} matches nothing.\nOptions of {override.key_or_group}: {known}.")
    if isinstance(sweep, ChoiceSweep | RangeSweep) and sweep.shuffle:
        raw.sort(key=lambda value: random_seed(0, "shuffle", Transformer.str(value)))
    return [(_number(value, text), text) for value, text in zip(raw, map(Transformer.str, raw), strict=True)]


def _number(value: object, text: str) -> Value:
    """The float that a number equals; what is no number, or more exact than a float, as it is spelled."""
    if isinstance(value, int | float) and not isinstance(value, bool) and float(value) == value:
        return float(value)
    return text


def _interval(key: str, override: Override, listed_only: bool) -> tuple[Spec, bool]:
    """The range, and whether it is one of whole numbers."""
    interval = override.value()
    assert isinstance(interval, IntervalSweep), (key, interval)
    if listed_only:
        raise BadSetting(
            f"{override.input_line}: a grid walks lists, an interval has no end of values.\n"
            f"Write {key}=range(…) or a list, or choose a search that samples: search=tpe."
        )
    assert interval.start is not None
    assert interval.end is not None
    spec: dict[str, Any] = {"low": float(interval.start), "high": float(interval.end)}
    if "log" in interval.tags:
        spec["log"] = True
    ints = isinstance(interval.start, int) and isinstance(interval.end, int)  # int(interval(…))
    whole = "int" in interval.tags or ints
    return (spec if not whole or spec.get("log") else {**spec, "step": 1.0}), whole
