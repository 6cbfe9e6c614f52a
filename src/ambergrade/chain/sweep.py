"""Scores the points that a search proposes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ambergrade.chain.context import Context
from ambergrade.chain.point import LiveMerge, Scoring, label_of, read_prompts, score_point
from ambergrade.chain.settings import SweepSettings
from ambergrade.score.figures import Value
from ambergrade.score.sheet import ScoreSheet
from ambergrade.search.load import search


@dataclass(frozen=True)
class SweepResult:
    """What a sweep leaves: the points that were scored to the end, and why others were not."""

    points: Mapping[str, Mapping[str, Value]]
    """Label to axis to value."""
    sheets: Mapping[str, ScoreSheet]
    strips: Mapping[str, Path]
    """Label to the file with its first pictures, side by side."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Label to its whole reason."""
    left: Mapping[str, str] = field(default_factory=dict)
    """Of a race: label to when and how it fell behind."""


def run_sweep(context: Context, settings: SweepSettings, merge: LiveMerge, scoring: Scoring) -> SweepResult:
    """Score every point of `settings.search`. `merge` and `scoring` are what this process has loaded already."""
    chosen = search(**settings.search.parameters)
    prompts = read_prompts(settings.prompts, "sweep")
    points: dict[str, Mapping[str, Value]] = {}
    sheets: dict[str, ScoreSheet] = {}
    strips: dict[str, Path] = {}
    while point := chosen.ask():
        label = label_of(point)
        numbers = {name: float(value) for name, value in point.items()}
        line = f"point {len(points) + 1:2}/{len(chosen)}: {label}"
        done = score_point(context, merge, scoring, numbers, prompts, label, kept=settings.sheet, line=line)
        chosen.tell(point, done.values["aggregates"][chosen.objective]["value"])
        points[label], sheets[label] = numbers, ScoreSheet.read(done.files["scores"])
        strips[label] = done.files["pictures"]
    return SweepResult(points, sheets, strips)
