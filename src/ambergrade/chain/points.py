"""Scores the points of a sweep, in whatever process, and keeps in memory what the next point shares with the last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from ambergrade.chain.context import Context, Task, open_journal, torch_device, use_threads
from ambergrade.chain.dataset import draw_world
from ambergrade.chain.point import (
    POINT,
    RUNG,
    LiveMerge,
    LiveNetworks,
    Scoring,
    label_of,
    point_task,
    read_prompts,
    score_point,
)
from ambergrade.chain.point import open_checkpoint as open_anew
from ambergrade.chain.settings import Invocation, Suite, SweepSettings
from ambergrade.errors import MissingObject, UnknownName
from ambergrade.identity import digest
from ambergrade.merge.formula import Formula
from ambergrade.nouns import Checkpoint, PromptSet
from ambergrade.score.scoring import metric_class
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import prompt_means
from ambergrade.search.driver import Job, Outcome
from ambergrade.search.points import Point
from ambergrade.store import Finished, Ledger, find_file
from ambergrade.track.journal import Journal, JournalRef, Run, RunRef


@dataclass(frozen=True)
class Scored:
    """A scored point: what a search needs of it, and where its record is. Between processes it is a plain mapping."""

    score: float
    rows: list[float]
    """The objective prompt by prompt."""
    pictures: int
    """Drawn for it now: none where its record was there."""
    seconds: float
    """What drawing and scoring took when it was done."""
    kind: str
    """The stage's kind: `point`, or `rung` of a race."""
    identity: str

    @classmethod
    def of(cls, outcome: Outcome) -> Scored:
        """What a job's outcome holds."""
        assert isinstance(outcome.value, Mapping), outcome
        return cls(**outcome.value)

    def find(self, ledger: Ledger) -> Finished:
        """The record. Raises MissingObject where it is gone."""
        done = ledger.find(self.kind, self.identity, verify=True)
        if done is None:
            raise MissingObject(f"{self.kind} {self.identity[:12]}… is not in the record.\nRun the same command again.")
        return done


class PointScorer:
    """Scores points one after the other: one merge and one set of scorers lie in memory."""

    def __init__(self) -> None:
        self._merge: LiveMerge | None = None
        self._scoring: Scoring | None = None
        self._merge_key = self._suite_key = ""
        self._opened: dict[tuple[Path, str, int, int], Checkpoint] = {}

    def hold(self, settings: SweepSettings, merge: LiveMerge, scoring: Scoring) -> None:
        """Take over what the process has loaded already for these settings."""
        self._merge, self._scoring = merge, scoring
        self._merge_key, self._suite_key = _merge_key(settings), _suite_key(settings)

    def loaded(self, settings: SweepSettings) -> tuple[LiveMerge, Scoring]:
        """The merge and the scorers of these settings; they are read only where they are others than before."""
        if _merge_key(settings) != self._merge_key or self._merge is None:
            self._merge, self._merge_key = None, _merge_key(settings)  # one merge in memory
            self._merge = self._open(settings)
        if _suite_key(settings) != self._suite_key or self._scoring is None:
            self._scoring, self._suite_key = None, _suite_key(settings)
            self._scoring = Scoring(settings.sampler, settings.suite, torch_device(settings.compute))
        self._scoring = self._scoring.at(settings.sampler)
        return self._merge, self._scoring

    def task(self, settings: SweepSettings, job: Job) -> Task:
        """What a job's scores are made of, and so whether they are there."""
        merge, scoring = self.loaded(settings)
        prompts, among = _prompts(settings, job)
        return point_task(merge, scoring, settings.merge.coefficients, prompts, RUNG if job.block else POINT, among)

    def score(self, context: Context, settings: SweepSettings, job: Job) -> dict[str, object]:
        """Score a job's point, or find it scored, and journal it below the context's run."""
        merge, scoring = self.loaded(settings)
        prompts, among = _prompts(settings, job)
        done = score_point(
            replace(context, quiet=True),
            merge,
            scoring,
            settings.merge.coefficients,
            prompts,
            job.label if job.block is None else f"{job.label}, prompts {job.block[0]}–{job.block[1]}",
            stage=RUNG if job.block else POINT,
            among=among,
            kept=settings.sheet,
            params={key.rpartition(".")[2]: value for key, value in job.point.items()},
        )
        return value_of(settings, done)

    def _open(self, settings: SweepSettings) -> LiveMerge:
        named = Formula.parse(settings.merge.formula, settings.models).models
        models = {alias: self._checkpoint(settings.models[alias] or "", settings.family.name) for alias in named}
        return LiveMerge(settings.merge, models, LiveNetworks(settings.family, torch_device(settings.compute)))

    def _checkpoint(self, source: str, family: str) -> Checkpoint:
        path = find_file(source)
        about = path.stat()
        key = (path, family, about.st_mtime_ns, about.st_size)
        if key not in self._opened or path.is_dir():
            self._opened[key] = open_anew(path, family)
        return self._opened[key]


def value_of(settings: SweepSettings, done: Finished) -> dict[str, object]:
    """A scored point (`Scored`) as a plain mapping."""
    sheet = ScoreSheet.read(done.files["scores"])
    _check_column(settings.search.objective, sheet.columns)
    rows = prompt_means(sheet.columns[settings.search.objective], sheet.prompt_ids)
    score = math.nan if np.isnan(rows).all() else float(np.nanmean(rows))
    pictures = sheet.n if done.fresh else 0
    return asdict(Scored(score, [float(row) for row in rows], pictures, done.seconds, done.stage, done.identity))


def check_objective(suite: Suite, objective: str) -> None:
    """Raise UnknownName for an objective that no metric of the suite scores picture by picture; nothing is loaded."""
    metrics = suite.metrics.values()
    _check_column(
        objective, {name: True for one in metrics for name in metric_class(one.name).scores(**one.parameters)}
    )


def _check_column(objective: str, columns: Mapping[str, object]) -> None:
    if objective not in columns:
        raise UnknownName("search.objective", objective, columns, "These are scored picture by picture.")


def _prompts(settings: SweepSettings, job: Job) -> tuple[PromptSet, PromptSet | None]:
    """The prompts of a job; for a rung, those it adds, and all of them."""
    prompts = read_prompts(settings.prompts, "sweep")
    if job.block is None:
        return prompts, None
    return PromptSet(prompts.name, prompts.prompts[slice(*job.block)]), prompts


def _merge_key(settings: SweepSettings) -> str:
    merge = replace(settings.merge, coefficients={})
    return digest([merge, settings.models, settings.family, settings.compute.device])


def _suite_key(settings: SweepSettings) -> str:
    return digest([settings.suite, settings.compute.device])


# --- in whatever process ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PointWork:
    """A point to score, as it is sent to a worker process."""

    settings: SweepSettings
    job: Job
    above: RunRef
    """The run to journal below."""


def evaluate(work: PointWork) -> dict[str, object]:
    """Score a point in a worker of ours and journal it; what was loaded is kept for the next."""
    journal = _process().attached(work.above.journal)
    above = journal.attached(work.above.id, work.above.name, work.above.key)
    return _score(work.settings, work.job, journal, above)


def score_below(
    settings: SweepSettings, invocation: Invocation, job: Job, above: Mapping[str, str]
) -> dict[str, object]:
    """Score a point in a launcher's job and journal it below a run, whose id, name and key are given."""
    journal = _process().opened(settings, invocation)
    return _score(settings, job, journal, journal.attached(**above))


def score_alone(settings: SweepSettings, invocation: Invocation) -> dict[str, object]:
    """Score one point that belongs to no sweep."""
    check_objective(settings.suite, settings.search.objective)
    settings.check_files()
    draw_world(settings.data, settings.compute)
    point: Point = dict(settings.merge.coefficients)
    journal = _process().opened(settings, invocation)
    nobody = Run(journal, "", "", "", done=False, resumed=False)
    found = _score(settings, Job(label_of(point), point), journal, nobody)
    print(f"{settings.search.objective} {found['score']:.4f}")
    return found


def _score(settings: SweepSettings, job: Job, journal: Journal, above: Run) -> dict[str, object]:
    use_threads(settings.compute)
    return _process().scorer.score(Context(settings.root, journal, above, settings.compute), settings, job)


class _Process:
    """What a process that scores points keeps from one to the next."""

    def __init__(self) -> None:
        self.scorer = PointScorer()
        self._ref: JournalRef | None = None
        self._journal: Journal | None = None

    def attached(self, ref: JournalRef) -> Journal:
        if self._journal is None or ref != self._ref:
            self._ref, self._journal = ref, Journal.attach(ref)
        return self._journal

    def opened(self, settings: SweepSettings, invocation: Invocation) -> Journal:
        if self._journal is None:
            self._journal = open_journal(settings.root, settings.name, settings, invocation)
        return self._journal


@lru_cache(maxsize=1)
def _process() -> _Process:
    return _Process()
