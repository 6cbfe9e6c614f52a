"""What score sheets say: aggregates of one, paired differences of two, the winner set of many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ambergrade.errors import BadSetting, UnknownName
from ambergrade.nouns import Measurement
from ambergrade.score.scoring import metric_class
from ambergrade.score.sheet import ScoreSheet, refuse_unlike
from ambergrade.score.statistics import PairedDifference, mean_interval, paired_difference, prompt_means, winner_set


@dataclass(frozen=True)
class Winners:
    """The best point by one column, and the points that cannot be told from it."""

    column: str
    best: str
    members: tuple[str, ...]
    """In the order the points were given; `best` is among them."""
    behind: Mapping[str, Measurement]
    """Point to how far it lies behind the best, ≥ 0 is worse, with simultaneous 95 % limits."""


def aggregates(sheet: ScoreSheet, *, seed: int = 0) -> dict[str, Measurement]:
    """Every column's mean over prompts and every metric's set-level values, with 95 % intervals."""
    found = {
        column: mean_interval(
            prompt_means(values, sheet.prompt_ids), seed=seed, higher_is_better=sheet.higher_is_better[column]
        )
        for column, values in sheet.columns.items()
    }
    for name in sheet.fingerprints:
        found |= metric_class(name).aggregates(sheet, seed=seed)
    return found


def differences(sheet: ScoreSheet, baseline: ScoreSheet, *, seed: int = 0) -> dict[str, PairedDifference]:
    """`sheet - baseline` for every aggregate that both have, paired by prompt and seed.

    Raises BadInput for sheets of unlike pictures or scorers.
    """
    refuse_unlike(sheet, baseline)
    found = {
        column: paired_difference(
            prompt_means(values, sheet.prompt_ids),
            prompt_means(baseline.columns[column], baseline.prompt_ids),
            seed=seed,
            higher_is_better=sheet.higher_is_better[column],
        )
        for column, values in sheet.columns.items()
        if column in baseline.columns
    }
    for name in sheet.fingerprints:
        if name in baseline.fingerprints:
            found |= metric_class(name).differences(sheet, baseline, seed=seed)
    return found


def winners(sheets: Mapping[str, ScoreSheet], column: str, *, seed: int = 0) -> Winners:
    """The winner set among points by a per-picture column. Raises BadInput for unlike sheets."""
    if not sheets:
        raise BadSetting("A winner set needs at least one point.")
    names = list(sheets)
    first = sheets[names[0]]
    if column not in first.columns:
        raise UnknownName("score column", column, first.columns)
    for name in names[1:]:
        refuse_unlike(sheets[name], first)
    scores = np.stack([prompt_means(sheets[name].columns[column], sheets[name].prompt_ids) for name in names])
    found = winner_set(scores, seed=seed, higher_is_better=first.higher_is_better[column])
    behind = {
        name: Measurement(found.behind[k], found.low[k], found.high[k], found.n, higher_is_better=False)
        for k, name in enumerate(names)
    }
    return Winners(column, names[found.best], tuple(names[k] for k in found.members), behind)


def remarks(sheet: ScoreSheet) -> list[str]:
    """What a reader of the numbers must know: cut prompts, unscorable tags, too few pictures, gaps."""
    said = []
    for column, values in sheet.columns.items():
        missing = int(np.isnan(values).sum())
        if missing:
            said.append(f"{column}: {missing} of {sheet.n} pictures not scored (left out, not counted as zero).")
    for name in sheet.fingerprints:
        said += metric_class(name).remarks(sheet)
    return said
