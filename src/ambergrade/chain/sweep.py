"""Scores the points that a search proposes: whole or as a race, in this process, in a pool or through a launcher.

A finished point counts only while what it is made of, looked at now, is what its record says (`PointScorer.task`):
the sweep, its preview and its explanation of a new point all ask that one question.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import yaml

from ambergrade.chain.context import Context
from ambergrade.chain.point import LiveMerge, Scoring, label_of
from ambergrade.chain.points import PointScorer, PointWork, evaluate, value_of
from ambergrade.chain.settings import SweepSettings, Values
from ambergrade.errors import BadSetting
from ambergrade.identity import digest
from ambergrade.score.figures import Value
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import winner_set
from ambergrade.search.driver import Driver, Evaluator, Job, Outcome, Swept, Trial, in_process
from ambergrade.search.folder import SweepFolder
from ambergrade.search.load import Search, search
from ambergrade.search.points import Point
from ambergrade.search.pool import Pool
from ambergrade.search.racing import Floats

LONGEST = 30
"""Characters of a point's name before its numbers are rounded."""


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
    jobs: Mapping[str, Job] = field(default_factory=dict)
    """Label to the job that was done last."""
    race: str = ""
    """Of a race: what it spent."""


@dataclass(frozen=True)
class SweepPlan:
    """A search, and how a point that it proposes becomes settings."""

    key: str
    """Names the sweep by all that its points are made of."""
    folder: SweepFolder
    search: Search
    axes: Values
    """What is swept."""
    label: Callable[[Point], str]
    settings_of: Callable[[Job], SweepSettings]
    rungs: Sequence[int] = ()
    """Prompts after each rung of a race; empty: every point is scored whole."""
    screened_by: str = ""
    """What makes the pictures of a cheap job cheap, in words; empty: the race has no screening."""


def run_sweep(context: Context, settings: SweepSettings, merge: LiveMerge, scoring: Scoring) -> SweepResult:
    """Score every point of `settings.search`. `merge` and `scoring` are what this process has loaded already.

    Points that fail are told and left out. Raises BadSetting if all did.
    """
    scorer = PointScorer()
    scorer.hold(settings, merge, scoring)

    def settings_of(job: Job) -> SweepSettings:
        numbers = {name: float(value) for name, value in job.point.items()}
        return replace(settings, merge=replace(settings.merge, coefficients={**settings.merge.coefficients, **numbers}))

    chosen = search(**settings.search.parameters)
    made_of = scorer.task(settings_of(Job("", {})), Job("", {})).identity
    key = digest([made_of, {**settings.search.parameters, "trials": None}, settings.race])
    folder = SweepFolder(context.ledger.root / "sweeps" / key[:16])
    rungs = settings.race or ()
    plan = SweepPlan(key, folder, chosen, settings.search.values, label_of, settings_of, rungs)
    scorer.check_objective(settings)
    with folder.alone(), evaluator(context, plan, scorer, settings.compute.workers) as where:
        swept = drive(context, plan, scorer, where)
    if swept.failed:
        print(swept.failure_table, flush=True)
    if not swept.done:
        raise BadSetting(f"No point of the sweep could be scored: {swept.failed[0].outcome.reason}")
    return result_of(context, plan, swept)


@contextmanager
def evaluator(context: Context, plan: SweepPlan, scorer: PointScorer, workers: int) -> Iterator[Evaluator]:
    """Where points are scored: in this process for one worker, else in a pool."""
    if workers == 1:
        yield in_process(lambda job: scorer.score(context, plan.settings_of(job), job))
        return
    with pool(context, plan, workers) as made:
        yield made


def pool(context: Context, plan: SweepPlan, workers: int) -> Pool[PointWork]:
    """Worker processes that score the plan's points and journal them below the context's run."""
    above = context.parent.ref
    return Pool(evaluate, lambda job: PointWork(plan.settings_of(job), job, above), workers)


def drive(context: Context, plan: SweepPlan, scorer: PointScorer, where: Evaluator) -> Swept:
    """Score the plan's points and tell each; points that were scored while MLflow was down are journaled now."""
    kind = "rung" if plan.rungs else "point"
    journaled = context.journal.finished_keys(kind, context.parent) if context.parent.id else None

    def recall(job: Job) -> Outcome | None:
        if not plan.folder.was_begun(job):
            return None  # whoever scores it meets the record of another sweep
        settings = plan.settings_of(job)
        done = scorer.task(settings, job).find(context.ledger)
        if done is None:
            return None
        if journaled is not None and done.identity not in journaled:
            return Outcome(True, scorer.score(context, settings, job), seconds=done.seconds)
        return Outcome(True, value_of(settings, done), seconds=done.seconds)

    def hear(trial: Trial) -> None:
        if not trial.before or plan.folder.outcome(trial.job) is None:
            plan.folder.keep(trial.job, trial.outcome)
        if not trial.before:
            _tell(context, trial)

    driver = Driver(
        plan.search,
        where,
        plan.label,
        recall=recall,
        past=() if plan.rungs else plan.folder.past(),
        begin=plan.folder.begin,
        hear=hear,
        say=lambda text: print(text, flush=True),
    )
    if not plan.rungs:
        swept = driver.sweep()
    else:
        higher = plan.search.higher_is_better
        swept = driver.race(plan.rungs, lambda *given: _judge(*given, higher), screened_by=plan.screened_by)
    plan.folder.keep_failures(swept)
    return swept


def _judge(scores: Floats, alive: Sequence[int], error: float, higher_is_better: bool) -> tuple[int, ...]:
    """The points of a rung that are not significantly different from the best (search/racing.py: Judge)."""
    return winner_set(np.asarray(scores), higher_is_better=higher_is_better, error=error, alive=alive).members


def _tell(context: Context, trial: Trial) -> None:
    if not trial.outcome.done:
        print(f"  {trial.job.label}: {trial.outcome.first_line}", flush=True)
        return
    value = record_of(trial.outcome)
    block = f" {trial.job.block[0]}–{trial.job.block[1]}" if trial.job.block else ""
    context.tell(f"{trial.job.label}{block}", value["seconds"] if value["pictures"] else None, value["identity"])


def record_of(outcome: Outcome) -> Mapping[str, str]:
    ...


def result_of(context: Context, plan: SweepPlan, swept: Swept) -> SweepResult:
    ...
