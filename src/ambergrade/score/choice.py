"""Choosing by several metrics: one declared primary, non-inferiority margins for the rest, and the Pareto front.

Never a mean of unlike scales: what it would weigh, nobody declared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ambergrade.errors import BadSetting, UnknownName
from ambergrade.nouns import Measurement
from ambergrade.score.comparison import aggregates, differences, winners
from ambergrade.score.sheet import ScoreSheet


@dataclass(frozen=True)
class Choice:
    """What is left to choose from, in the order the points were given."""

    front: tuple[str, ...]
    """Points that no other point beats in one metric without losing in another (by their means)."""
    eligible: tuple[str, ...]
    """Points shown to be no worse than the baseline by more than any margin."""
    failed: Mapping[str, tuple[str, ...]]
    """The other points, and the metrics whose margin they miss or cannot be shown to keep."""
    winners: tuple[str, ...]
    """The eligible points not significantly different from the best of them by the primary metric."""


def choose(
    sheets: Mapping[str, ScoreSheet],
    baseline: ScoreSheet,
    *,
    primary: str,
    margins: Mapping[str, float],
    seed: int = 0,
) -> Choice:
    """Judge points against a baseline on the same prompts and seeds.

    `margins`: metric to the largest loss that is still no loss, in its own unit and ≥ 0 (for lower-is-better metrics
    the largest rise). A point is eligible only if the 95 % interval of its paired difference lies within every margin.
    """
    wrong = [name for name, margin in margins.items() if margin < 0]
    if wrong:
        raise BadSetting(f"Margins are how much may be lost, so ≥ 0; look at {', '.join(wrong)}.")
    failed: dict[str, tuple[str, ...]] = {}
    for label, sheet in sheets.items():
        apart = differences(sheet, baseline, seed=seed)
        for name in margins:
            if name not in apart:
                raise UnknownName("metric", name, apart)
        loss = {n: -apart[n].low if apart[n].higher_is_better else apart[n].high for n in margins}
        missed = tuple(name for name, margin in margins.items() if not loss[name] <= margin)  # NaN misses too
        if missed:
            failed[label] = missed
    eligible = tuple(label for label in sheets if label not in failed)
    rows = {label: aggregates(sheet, seed=seed) for label, sheet in sheets.items()}
    best = winners({label: sheets[label] for label in eligible}, primary, seed=seed).members if eligible else ()
    return Choice(pareto_front(rows, [primary, *(n for n in margins if n != primary)]), eligible, failed, best)


def pareto_front(points: Mapping[str, Mapping[str, Measurement]], names: Sequence[str]) -> tuple[str, ...]:
    """Points that none dominates: as good in every named metric and better in one. NaN is worse than any number."""

    def worth(label: str) -> tuple[float, ...]:
        found = [points[label][name] for name in names]
        signed = [m.value if m.higher_is_better else -m.value for m in found]
        return tuple(float("-inf") if value != value else value for value in signed)

    value = {label: worth(label) for label in points}

    def dominated(label: str) -> bool:
        mine = value[label]
        return any(other != mine and all(a >= b for a, b in zip(other, mine, strict=True)) for other in value.values())

    return tuple(label for label in points if not dominated(label))
