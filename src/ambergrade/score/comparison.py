"""What score sheets say: aggregates of one, paired differences of two, the winner set of many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ambergrade.errors import BadSetting, UnknownName
from ambergrade.nouns import Measurement
from ambergrade.score.scoring import metric_class
from ambergrade.score.sheet import ScoreSheet, refuse_unlike
from ambergrade.score.statistics import (
    PairedDifference,
    mean_interval,
    paired_difference,
    prompt_means,
    simultaneous_differences,
    winner_set,
)


@dataclass(frozen=True)
class Noise:
    """What one column's numbers do if nothing changes but the batch that pictures are drawn in."""

    typical: float
    """Mean |change| of a picture's number."""
    largest: float
    mean: PairedDifference
    """The difference of the means: an A/A row, which should be undecided and far below what is detectable."""


@dataclass(frozen=True)
class Winners:
    """The best point by one column, and the points not significantly different from it."""

    column: str
    best: str
    members: tuple[str, ...]
    """In the order the points were given; `best` is among them."""
    behind: Mapping[str, Measurement]
    """Point to how far it lies behind the best, ≥ 0 is worse, with simultaneous 95 % limits."""


_known: dict[tuple[str, int], dict[str, Measurement]] = {}
_MOST_KNOWN = 64
"""Sheets whose aggregates are remembered: record, journal and leaderboard each ask for them."""


def aggregates(sheet: ScoreSheet, *, seed: int = 0) -> dict[str, Measurement]:
    """Every column's mean over prompts and every metric's set-level values, with 95 % intervals."""
    key = (sheet.digest, seed)
    if key not in _known:
        found = _aggregates(sheet, seed)
        while len(_known) >= _MOST_KNOWN:
            _known.pop(next(iter(_known)), None)
        _known[key] = found
    return dict(_known[key])


def _aggregates(sheet: ScoreSheet, seed: int) -> dict[str, Measurement]:
    sheet = sheet.rows(sheet.sound)
    found = {
        column: mean_interval(
            prompt_means(values, sheet.prompt_ids), seed=seed, higher_is_better=sheet.higher_is_better[column]
        )
        for column, values in sheet.columns.items()
    }
    for name in sheet.fingerprints:
        found |= metric_class(name).aggregates(sheet, seed=seed)
    return found


def differences(
    sheet: ScoreSheet, baseline: ScoreSheet, *, seed: int = 0, other_batch: bool = False
) -> dict[str, PairedDifference]:
    """`sheet - baseline` for every aggregate that both have, paired by prompt and seed.

    A picture that is faulty in either is left out of both. Raises BadInput for sheets of unlike pictures or scorers;
    `other_batch` lets them be drawn in other batches.
    """
    refuse_unlike(sheet, baseline, other_batch=other_batch)
    sheet, baseline = _sound_together([sheet, baseline])
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


def family(
    sheets: Mapping[str, ScoreSheet], baseline: ScoreSheet, column: str, *, seed: int = 0
) -> dict[str, PairedDifference]:
    """Each point less the baseline in one per-picture column, with intervals and p that hold for all at once."""
    for sheet in sheets.values():
        refuse_unlike(sheet, baseline)
    if column not in baseline.columns:
        raise UnknownName("score column", column, baseline.columns)
    *points, base = _sound_together([*sheets.values(), baseline])
    means = np.stack([prompt_means(point.columns[column], point.prompt_ids) for point in points])
    own = prompt_means(base.columns[column], base.prompt_ids)
    found = simultaneous_differences(means, own, seed=seed, higher_is_better=baseline.higher_is_better[column])
    return dict(zip(sheets, found, strict=True))


def kernel_noise(sheet: ScoreSheet, again: ScoreSheet, *, seed: int = 0) -> dict[str, Noise]:
    """What drawing some of a sheet's pictures in another batch does to every column (facts 5.19).

    `again` holds pictures of the same model and prompts, scored by the same metrics. Raises BadInput where they are
    not of this sheet, or differ in more than the batch.
    """
    wanted = set(zip(again.prompt_ids, again.seeds, strict=True))
    some = sheet.rows(np.array([key in wanted for key in zip(sheet.prompt_ids, sheet.seeds, strict=True)]))
    some = replace(some, prompts_digest=again.prompts_digest)  # of fewer prompts
    moved = differences(again, some, seed=seed, other_batch=True)
    again, some = _sound_together([again, some])
    found = {}
    for column, values in again.columns.items():
        change = np.abs(values - some.columns[column])
        change = change[~np.isnan(change)]
        if change.size:
            found[column] = Noise(float(change.mean()), float(change.max()), moved[column])
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
    points = _sound_together([sheets[name] for name in names])
    scores = np.stack([prompt_means(point.columns[column], point.prompt_ids) for point in points])
    found = winner_set(scores, seed=seed, higher_is_better=first.higher_is_better[column])
    behind = {
        name: Measurement(found.behind[k], found.low[k], found.high[k], found.n, higher_is_better=False)
        for k, name in enumerate(names)
    }
    return Winners(column, names[found.best], tuple(names[k] for k in found.members), behind)


def by_prompt(sheets: Sequence[ScoreSheet], column: str) -> list[npt.NDArray[np.float64]]:
    """One row of prompt means a sheet, over every prompt that any of them has; NaN where a sheet lacks it."""
    sound = [sheet.rows(sheet.sound) for sheet in sheets]
    order = {key: place for place, key in enumerate(dict.fromkeys(key for sheet in sheets for key in sheet.prompt_ids))}
    rows = []
    for sheet in sound:
        row = np.full(len(order), np.nan)
        means = prompt_means(sheet.columns[column], sheet.prompt_ids)
        row[[order[key] for key in dict.fromkeys(sheet.prompt_ids)]] = means
        rows.append(row)
    return rows


def remarks(sheet: ScoreSheet) -> list[str]:
    """What a reader of the numbers must know: cut prompts, unscorable tags, too few pictures, gaps."""
    said = []
    if sheet.faults:
        told = ", ".join(f"{key} ({reason})" for key, reason in list(sheet.faults.items())[:8])
        more = ", …" if len(sheet.faults) > 8 else ""
        said.append(f"{len(sheet.faults)} of {sheet.n} pictures are faulty and in no number: {told}{more}.")
    if sheet.blank:
        told = ", ".join(sheet.blank[:8]) + (", …" if len(sheet.blank) > 8 else "")
        said.append(f"{len(sheet.blank)} of {sheet.n} pictures have one single colour (scored as they are): {told}.")
    sheet = sheet.rows(sheet.sound)
    for column, values in sheet.columns.items():
        missing = int(np.isnan(values).sum())
        if missing:
            said.append(f"{column}: {missing} of {sheet.n} pictures not scored (left out, not counted as zero).")
    for name in sheet.fingerprints:
        said += metric_class(name).remarks(sheet)
    return said


def _sound_together(sheets: Sequence[ScoreSheet]) -> list[ScoreSheet]:
    """Sheets of equal keys, less the pictures that are faulty in any of them."""
    keep = np.logical_and.reduce([sheet.sound for sheet in sheets])
    return [sheet.rows(keep) for sheet in sheets]
