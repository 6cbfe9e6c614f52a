"""Scores the points that a search proposes: whole or as a race, in this process, in a pool or through a launcher.

A finished point counts only while what it is made of, looked at now, is what its record says (`PointScorer.task`):
the sweep, its preview and its explanation of a new point all ask that one question.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ambergrade.chain.context import Context
from ambergrade.chain.point import LiveMerge, Scoring, label_of
from ambergrade.chain.points import PointScorer, PointWork, Scored, check_objective, evaluate, value_of
from ambergrade.chain.review import Shown
from ambergrade.chain.settings import SweepSettings, Values
from ambergrade.errors import BadSetting, MissingObject
from ambergrade.identity import digest
from ambergrade.release.facts import Origin
from ambergrade.score.figures import Value
from ambergrade.score.review import Review
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import winner_set
from ambergrade.search.driver import Driver, Evaluator, Job, Outcome, Swept, Trial, in_process
from ambergrade.search.folder import SweepFolder
from ambergrade.search.load import Search, search
from ambergrade.search.points import Point
from ambergrade.search.pool import Pool
from ambergrade.search.racing import Floats, Judge, Race
from ambergrade.store import read_json, write_json
from ambergrade.track.journal import Journal
from ambergrade.typed import plain
from ambergrade.typed import settings as typed_settings

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
    """In a race, label to when and how it fell behind."""
    early: Mapping[str, tuple[Mapping[str, Value], ScoreSheet]] = field(default_factory=dict)
    """Values and sheet of every point that left a race after it was drawn on some prompts."""
    jobs: Mapping[str, Job] = field(default_factory=dict)
    """Label to the job that was done last."""
    race: str = ""
    """In a race, what it spent."""
    folder: Path = Path()
    """The sweep's own folder."""
    settings: Mapping[str, SweepSettings] = field(default_factory=dict)
    """Label to the settings that it was scored with."""


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
    check_objective(settings.suite, settings.search.objective)
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
        known = plan.folder.outcome(trial.job)
        if not (
            trial.before and known and known.done and Scored.of(known).identity == Scored.of(trial.outcome).identity
        ):
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
        swept = driver.race(plan.rungs, _judge(plan.search.higher_is_better), screened_by=plan.screened_by)
    plan.folder.keep_failures(swept)
    if swept.failed and context.parent.id:
        Journal.open(context.root, context.journal.name)  # closes the runs of workers that died
    return swept


def _judge(higher_is_better: bool) -> Judge:
    """Tells the points of a rung that are not significantly different from the best."""

    def members(scores: Floats, alive: Sequence[int], error: float) -> tuple[int, ...]:
        return winner_set(scores, higher_is_better=higher_is_better, error=error, alive=alive).members

    return members


def _tell(context: Context, trial: Trial) -> None:
    if not trial.outcome.done:
        print(f"  {trial.job.label}: {trial.outcome.first_line}", flush=True)
        return
    scored = Scored.of(trial.outcome)
    block = f", prompts {trial.job.block[0]}–{trial.job.block[1]}" if trial.job.block else ""
    context.tell(f"{trial.job.label}{block}", scored.seconds if scored.pictures else None, scored.identity)


def result_of(context: Context, plan: SweepPlan, swept: Swept) -> SweepResult:
    """The points with their sheets and pictures, by names that can be read."""
    trials = _named(swept.done)
    first = {label: _rungs(plan, swept, trial)[0].find(context.ledger) for label, trial in trials.items()}
    return SweepResult(
        points={label: _values(trial.job.point) for label, trial in trials.items()},
        sheets={label: _sheet(context, plan, swept, trial) for label, trial in trials.items()},
        strips={label: done.files["pictures"] for label, done in first.items()},
        failures={trial.job.label: f"{trial.outcome.reason}\n{trial.outcome.trace}".strip() for trial in swept.failed},
        early={
            trial.job.label: (_values(trial.job.point), _sheet(context, plan, swept, trial))
            for trial in swept.trials
            if swept.race is not None and trial.job.label in swept.race.out and trial.outcome.done
        },
        left=_left(swept.race) if swept.race is not None else {},
        jobs={label: trial.job for label, trial in trials.items()},
        race=swept.race.text if swept.race is not None else "",
        folder=plan.folder.root,
        settings={label: plan.settings_of(trial.job) for label, trial in trials.items()},
    )


def reviewed(result: SweepResult, *, title: str, objective: str, columns: Sequence[str]) -> Review:
    """The winner set and the leaderboard. Raises BadInput for points that cannot be paired."""
    review = Review.of(
        result.sheets, result.points, title=title, objective=objective, columns=columns, early=result.early
    )
    if not result.race:
        return review
    # A race's looks held all points at once; a verdict among its finalists alone would leave out fewer.
    return replace(review, found=replace(review.found, members=tuple(result.points)))


@dataclass(frozen=True)
class Best:
    """What a finished sweep found, as its folder keeps it in best.json."""

    label: str
    settings: SweepSettings
    """Holds the sweep's settings at the best point."""
    members: tuple[Mapping[str, float], ...]
    """Coefficients of the points that are not significantly different from it; empty where more than they was swept."""
    heat_map: Path | None = None
    key: str = ""
    """Finds the run in MLflow that shows the sweep."""
    origins: Mapping[str, Origin] = field(default_factory=dict)
    """Where its models come from, as far as the command that swept was told."""


def keep_best(result: SweepResult, shown: Shown, key: str, origins: Mapping[str, Origin] | None = None) -> None:
    """Write best.json into the sweep's folder: what a release of the sweep, or a vote on it, starts from.

    key: of the run in MLflow that shows the sweep.
    """
    members = [result.settings[label] for label in shown.review.found.members]
    best = result.settings[shown.best]
    names = [name for name in best.merge.coefficients if name in result.points[shown.best]]
    whole = len(names) == len(result.points[shown.best])
    points = [{name: one.merge.coefficients[name] for name in names} for one in members] if whole else []
    found = Best(shown.best, best, tuple(points), shown.pictures.get("heat map"), key, origins or {})
    write_json(result.folder / "best.json", plain(found))


def read_best(folder: Path) -> Best:
    """Read what a finished sweep found. Raises MissingObject where no sweep has finished in the folder."""
    values = read_json(folder / "best.json")
    if not isinstance(values, dict):
        raise MissingObject(
            f"{folder} holds no best.json: it is no sweep's folder, or the sweep is not finished.\n"
            "Name a folder of mlruns/sweeps; the sweep's command, given again, finishes it."
        )
    return typed_settings(Best, values, str(folder / "best.json"))


def _rungs(plan: SweepPlan, swept: Swept, trial: Trial) -> list[Scored]:
    """What was scored of a point, rung by rung."""
    if swept.race is None:
        return [Scored.of(trial.outcome)]
    blocks = zip((0, *swept.race.rungs), swept.race.rungs, strict=False)
    outcomes = [plan.folder.outcome(replace(trial.job, block=block)) for block in blocks]
    return [Scored.of(outcome) for outcome in outcomes if outcome is not None and outcome.done]


def _sheet(context: Context, plan: SweepPlan, swept: Swept, trial: Trial) -> ScoreSheet:
    """A point's sheet; of a race the rungs' sheets joined.

    Without the sampler: what is not swept is equal by construction, and a sweep over samplers compares unlike ones.
    """
    found = [scored.find(context.ledger).files["scores"] for scored in _rungs(plan, swept, trial)]
    return replace(joined([ScoreSheet.read(file) for file in found]), sampler={})


def joined(sheets: Sequence[ScoreSheet]) -> ScoreSheet:
    """Sheets of different prompts by the same scorers as one."""
    first = sheets[0]
    if len(sheets) == 1:
        return first
    return replace(
        first,
        prompt_ids=tuple(one for sheet in sheets for one in sheet.prompt_ids),
        seeds=tuple(one for sheet in sheets for one in sheet.seeds),
        columns={name: np.concatenate([sheet.columns[name] for sheet in sheets]) for name in first.columns},
        features={name: np.concatenate([sheet.features[name] for sheet in sheets]) for name in first.features},
        prompts_digest=digest([sheet.prompts_digest for sheet in sheets]),
        faults={key: reason for sheet in sheets for key, reason in sheet.faults.items()},
        blank=tuple(key for sheet in sheets for key in sheet.blank),
    )


def _left(race: Race) -> dict[str, str]:
    """When each point fell behind, and its mean until then."""
    told = {}
    for label, rung in race.out.items():
        mean = float(np.nanmean(race.rows(label)))
        told[label] = f"after {race.rungs[rung]} prompts, with a mean of {mean:.3f} on them"
    return told | dict.fromkeys(race.screened, "by cheap pictures, before the race")


def _named(trials: Sequence[Trial]) -> dict[str, Trial]:
    """Trials by their names; sampled numbers rounded to be read, unless that makes two alike."""
    whole = {trial.job.label: trial for trial in trials}
    if all(len(label) <= LONGEST for label in whole):
        return whole
    rounded = {
        ", ".join(f"{name} {_short(value)}" for name, value in _values(trial.job.point).items()): trial
        for trial in trials
    }
    return rounded if len(rounded) == len(whole) else whole


def _short(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _values(point: Point) -> dict[str, Value]:
    """A point by the last part of each key, the whole where two end alike; numbers as numbers."""
    short = [key.rpartition(".")[2] for key in point]
    named = {name if short.count(name) == 1 else key: point[key] for key, name in zip(point, short, strict=True)}
    return {name: value if isinstance(value, float) else str(value) for name, value in named.items()}
