"""Draws and scores a release's pictures again, and holds the numbers against those that the release names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ambergrade.errors import BadInput
from ambergrade.family.load import family
from ambergrade.generate import stream
from ambergrade.nouns import PromptSet, SamplerSettings
from ambergrade.release.facts import ReleaseFacts
from ambergrade.release.sums import inside
from ambergrade.score.comparison import aggregates
from ambergrade.score.scoring import load_metric, score
from ambergrade.score.sheet import ScoreSheet, refuse_unlike

MOST_STEPS, MOST_SIDE, MOST_PICTURES = 1000, 4096, 20_000
"""What a release may ask this machine to draw."""


def rescored(folder: Path, facts: ReleaseFacts) -> tuple[list[str], str]:
    """Score a release again; return the numbers outside of their intervals, a line each, and the outcome in words.

    Every scorer is loaded from where the release says it lies; those that lie where no stranger comes are left out, and
    named. Raises BadInput where nothing can be scored again, or where prompts or scorers are not those of the release.
    """
    evaluation = facts.evaluation
    _refuse_endless(evaluation.sampler)
    known = {
        name: scorer.settings
        for name, scorer in evaluation.scorers.items()
        if scorer.settings is not None and not _names_a_place(scorer.settings)
    }
    if not known:
        raise BadInput("None of the release's scorers can be loaded here: it names no place of theirs.")
    prompts = PromptSet.read(inside(folder, "prompts.jsonl"), evaluation.prompts.name)
    if len(prompts.prompts) > MOST_PICTURES:
        raise BadInput(f"The release asks for {len(prompts.prompts):,} pictures: more than {MOST_PICTURES:,}.")
    recorded = ScoreSheet.read(inside(folder, evaluation.sheets[evaluation.released]))
    networks = family(facts.family).networks.load(folder / facts.file, folder / "config", device="cpu")
    metrics = [load_metric(name, **{**settings, "device": "cpu"}) for name, settings in known.items()]
    drawn = stream.pictures(networks, prompts, evaluation.sampler, progress="draw again")
    sheet = score(drawn, prompts, metrics, sampler=evaluation.sampler)
    refuse_unlike(sheet, recorded)
    outside, compared = [], 0
    for name, found in aggregates(sheet).items():
        said = evaluation.scores.get(name, {}).get(evaluation.released)
        if said is None or said.low is None or said.high is None or math.isnan(found.value):
            continue
        compared += 1
        if not said.low <= found.value <= said.high:
            outside.append(f"{name} is {found.value:.4f} here, outside of [{said.low:.4f}, {said.high:.4f}]")
    equal = _equal_rows(sheet, recorded)
    if not compared and equal < sheet.n:
        raise BadInput(
            "No number of the release has an interval, since it has too few prompts, and only "
            f"{equal:,} of {sheet.n:,} pictures score the same here."
        )
    left = sorted(evaluation.scorers.keys() - known.keys())
    told = f"{compared} numbers lie within their intervals; " if compared else ""
    told += f"{equal:,} of {sheet.n:,} pictures score the same to the last bit"
    return outside, told + (f"; not scored again: {', '.join(left)}" if left else "")


def _names_a_place(settings: Mapping[str, object]) -> bool:
    """Say whether a setting is a path on this machine: what a stranger's release names there is not opened."""
    texts = [value for value in settings.values() if isinstance(value, str)]
    return any(Path(text).exists() or text.startswith(("/", "~", ".")) or "\\" in text for text in texts)


def _refuse_endless(sampler: SamplerSettings) -> None:
    sizes = (sampler.width, sampler.height)
    if not (
        0 < sampler.steps <= MOST_STEPS and all(0 < side <= MOST_SIDE for side in sizes) and 0 < sampler.batch <= 64
    ):
        raise BadInput(
            f"The release asks for pictures of {sizes[0]:,} × {sizes[1]:,} px in {sampler.steps:,} steps, "
            f"{sampler.batch:,} at a time: that is not drawn."
        )


def _equal_rows(sheet: ScoreSheet, recorded: ScoreSheet) -> int:
    """Count the pictures that score the same to the last bit, as they do on a processor of the same kind."""
    equal = np.ones(sheet.n, bool)
    for name, values in sheet.columns.items():
        if name in recorded.columns:
            equal &= (values == recorded.columns[name]) | (np.isnan(values) & np.isnan(recorded.columns[name]))
    return int(np.count_nonzero(equal))
