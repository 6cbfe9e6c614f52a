"""Computes a release's numbers from its score sheets: for the build, and again for whoever checks it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ambergrade.errors import BadInput
from ambergrade.nouns import Measurement
from ambergrade.release.facts import Evaluation, Score
from ambergrade.score.comparison import aggregates, differences
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import PairedDifference

Numbers = Mapping[str, Mapping[str, Score]]
"""Metric to model to number."""


def numbers(sheets: Mapping[str, ScoreSheet]) -> tuple[Numbers, Numbers]:
    """Return every aggregate of every sheet, and the first sheet's paired differences to each of the others.

    Intervals are resampled with fixed seeds, so equal sheets give equal numbers. Raises BadInput for sheets of other
    prompts, seeds, samplers or scorers than the first.
    """
    released, *others = sheets
    scores = _by_metric({label: aggregates(sheet) for label, sheet in sheets.items()})
    apart = {label: measured(differences(sheets[released], sheets[label])) for label in others}
    return scores, _by_metric(apart)


def recomputed(folder: Path, evaluation: Evaluation) -> Evaluation:
    """Return a release's evaluation with the numbers that the score sheets in its folder give.

    Raises BadInput for a sheet that is missing, that is no score sheet, or that cannot be paired.
    """
    sheets = {}
    for label, name in evaluation.sheets.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
            raise BadInput(f"The score sheet of {label}, {name[:80]}, is not in the release.")
        sheets[label] = ScoreSheet.read(file)
    scores, apart = numbers(sheets)
    return replace(evaluation, scores=scores, differences=apart)


def unequal(evaluation: Evaluation, folder: Path) -> list[str]:
    """Name the numbers of an evaluation that its score sheets do not give, as `scores.fid.beta7: 17.1, not 17.13`."""
    again, found = recomputed(folder, evaluation), []
    for kind in ("scores", "differences"):
        said, given = getattr(evaluation, kind), getattr(again, kind)
        for metric in sorted({*said, *given}):
            ours, theirs = given.get(metric, {}), said.get(metric, {})
            found += [
                f"{kind}.{metric}.{model}: {_told(theirs.get(model))}, and the sheets give {_told(ours.get(model))}"
                for model in sorted({*ours, *theirs})
                if not _equal(ours.get(model), theirs.get(model))
            ]
    return found


def _equal(one: Score | None, other: Score | None) -> bool:
    """Say whether two numbers are one: other processors add in another order, which moves the last few digits."""
    if one is None or other is None or (one.n, one.higher_is_better) != (other.n, other.higher_is_better):
        return one is other
    pairs = [(one.value, other.value), (one.low, other.low), (one.high, other.high)]
    return all(a is b if a is None or b is None else math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) for a, b in pairs)


def _told(score: Score | None) -> str:
    return "nothing" if score is None else f"{score.value} [{score.low}, {score.high}], n {score.n}"


def measured(apart: Mapping[str, PairedDifference]) -> dict[str, Measurement]:
    """Return paired differences as the numbers that gates take."""
    return {m: Measurement(d.value, d.low, d.high, d.n, d.higher_is_better) for m, d in apart.items()}


def _by_metric(found: Mapping[str, Mapping[str, Measurement]]) -> Numbers:
    metrics = sorted({metric for row in found.values() for metric in row})  # a sheet that was read has another order
    return {
        metric: {label: Score.of(row[metric]) for label, row in found.items() if metric in row} for metric in metrics
    }
