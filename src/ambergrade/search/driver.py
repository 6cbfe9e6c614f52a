"""Drives a search: asks it for points, has them evaluated, tells it their scores. Sweeps and races, resumed at will.

    swept = Driver(search, evaluate, label=label_of).sweep()

The driver knows points, scores and slots, nothing else. *Where* a point is evaluated is decided by an evaluator: in
this process (`in_process`), in a pool of worker processes (search/pool.py), through a launcher (door/launching.py).
"""

from __future__ import annotations

import math
import signal
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from ambergrade.errors import AmbergradeError
from ambergrade.search.load import Search
from ambergrade.search.points import Point

if TYPE_CHECKING:
    from ambergrade.search.racing import Judge, Race

T = TypeVar("T")

ENDED_BY_A_SIGNAL = (130, 143)
"""Exit codes of SIGINT and SIGTERM."""


@dataclass(frozen=True)
class Job:
    """One thing to evaluate: a point, whole, or on the prompts that a rung of a race adds."""

    label: str
    point: Point
    block: tuple[int, int] | None = None
    """Prompts from the first number to before the second; None: all of them."""
    cheap: bool = False
    """With cheap pictures, for a screening before a race."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    done: bool
    value: object = None
    """What the evaluation returned: a score, or a mapping with `score` and, for a race, `rows` (one a prompt)."""
    reason: str = ""
    """Why it failed, all of it."""
    trace: str = ""
    """The traceback of an error that is no user's mistake."""
    seconds: float = 0.0

    @property
    def score(self) -> float:
        """The number a search is told: NaN for a failure, or where the evaluation returned none."""
        value = self.value.get("score") if isinstance(self.value, Mapping) else self.value
        return float(value) if isinstance(value, int | float) and self.done else math.nan

    @property
    def rows(self) -> list[float]:
        """The scores prompt by prompt. Raises TypeError for an evaluation that returned none."""
        if not isinstance(self.value, Mapping):
            raise TypeError(f"A race needs scores prompt by prompt, and the evaluation returned {self.value!r}.")
        return list(self.value["rows"])

    @property
    def first_line(self) -> str:
        """The first line of the reason, for tables."""
        return (self.reason.strip().splitlines() or [""])[0]

    @staticmethod
    def of_error(error: BaseException, seconds: float = 0.0) -> Outcome:
        """The failure that an error is."""
        text = str(error).strip()
        reason = f"{type(error).__name__}: {text}" if text else type(error).__name__
        trace = "" if isinstance(error, AmbergradeError) else "".join(traceback.format_exception(error))
        return Outcome(False, None, reason, trace, seconds)


Evaluator = Callable[[Iterator[Job]], Iterator[tuple[Job, Outcome]]]
"""Takes a job whenever a slot is free and yields each as it ends, every job with an outcome.

What is taken next may depend on the outcomes yielded so far, so it takes no job before it can begin it.
"""


@dataclass(frozen=True)
class Trial:
    """A job that ended."""

    job: Job
    outcome: Outcome
    before: bool = False
    """An earlier command finished it."""


@dataclass(frozen=True)
class Swept:
    """What a sweep came to."""

    trials: tuple[Trial, ...]
    """The points in the order in which they were proposed; of a race each point's last rung."""
    best: tuple[Point, float] | None
    race: Race | None = None

    @property
    def done(self) -> list[Trial]:
        """The points with a score; of a race the ones that may still be the best."""
        done = [trial for trial in self.trials if trial.outcome.done]
        return done if self.race is None else [trial for trial in done if trial.job.label in self.race.alive]

    @property
    def failed(self) -> list[Trial]:
        return [trial for trial in self.trials if not trial.outcome.done]

    @property
    def failure_table(self) -> str:
        """Every failed point with the first line of its reason; empty without any."""
        if not self.failed:
            return ""
        width = max(len(trial.job.label) for trial in self.failed)
        lines = [f"  {trial.job.label:<{width}}  {trial.outcome.first_line}" for trial in self.failed]
        return "\n".join([f"{len(self.failed)} of {len(self.trials)} points failed:", *lines])


def in_process(evaluate: Callable[[Job], object]) -> Evaluator:
    """Evaluate the jobs one after the other in this process."""

    def evaluated(jobs: Iterator[Job]) -> Iterator[tuple[Job, Outcome]]:
        for job in jobs:
            yield job, attempt(evaluate, job)

    return evaluated


def attempt(evaluate: Callable[[T], object], work: T, passing: Collection[int] = ENDED_BY_A_SIGNAL) -> Outcome:
    """The outcome of an evaluation, whatever it raises. `passing`: exit codes by which the process does end."""
    start = time.monotonic()
    try:
        value = evaluate(work)
    except SystemExit as end:
        if end.code in passing:
            raise
        code = end.code if isinstance(end.code, int) else 1
        return Outcome.of_error(Ended(ending(code)), time.monotonic() - start)
    except Exception as error:  # whatever a point may raise: the others go on
        return Outcome.of_error(error, time.monotonic() - start)
    return Outcome(True, value, seconds=time.monotonic() - start)


class Ended(AmbergradeError):
    """The process of a point ended before the point did."""


def ending(code: int) -> str:
    """Say what an exit code means: `its process was ended by SIGKILL (out of memory?)`."""
    if code < 0 or code > 128:
        number = -code if code < 0 else code - 128
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return f"its process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"its process left with exit code {code}"


def _never(job: Job) -> Outcome | None:
    return None


@dataclass
class Driver:
    """Runs one search to its end. Every job has an outcome, a failed one too."""

    search: Search
    evaluate: Evaluator
    label: Callable[[Point], str]
    """Names a point for people."""
    recall: Callable[[Job], Outcome | None] = _never
    """Gives the outcome of a job whose result an earlier command recorded, if what it is made of is still the same."""
    past: Sequence[Point] = ()
    """Points that earlier commands proposed, in their order."""
    begin: Callable[[Job], None] = lambda job: None
    """Called before a job is evaluated."""
    hear: Callable[[Trial], None] = lambda trial: None
    """Called when a job has ended, or was found finished."""
    say: Callable[[str], None] = print
    trials: list[Trial] = field(default_factory=list, init=False)
    _order: dict[str, int] = field(default_factory=dict, init=False)
    """Label to when its point was proposed first."""
    _drawn: dict[tuple[str, tuple[int, int] | None, bool], Trial] = field(default_factory=dict, init=False)

    def sweep(self) -> Swept:
        """Evaluate every point that the search proposes, whole."""
        unfinished = []
        for point in self.past:
            job = Job(self.label(point), point)
            self._order.setdefault(job.label, len(self._order))
            outcome = self.recall(job)
            if outcome is None:
                unfinished.append(point)
            else:
                self.search.recall(point, outcome.score)
                self._note(Trial(job, outcome, before=True))
        for point in unfinished:  # after what is finished: searches want it so
            self.search.retry(point)
        if self.trials:
            self.say(f"  {len(self.trials)} of {len(self.search)} points finished before")
        for job, outcome in self.evaluate(self._asked()):
            self.search.tell(job.point, outcome.score)
            self._note(Trial(job, outcome))
        self.trials.sort(key=lambda trial: self._order[trial.job.label])  # whoever was quicker
        return Swept(tuple(self.trials), self.search.best)

    def race(self, rungs: Sequence[int], judge: Judge, *, screened_by: str = "") -> Swept:
        """Evaluate all points on a few prompts, and only those that may still be the best on more.

        `screened_by`: what makes pictures cheap, in words, for a screening before the race; empty: none.
        """
        from ambergrade.search.racing import Race  # numpy: a process chooses its kernels before that

        points = {self.label(point): point for point in iter(self.search.ask, None)}
        race = Race(list(points), rungs, judge)
        last: dict[str, Trial] = {}
        if screened_by:
            last |= self._screen(race, points, rungs[0], judge, screened_by)
        while rung := race.ask():
            jobs = [Job(label, points[label], (rung.start, rung.stop)) for label in rung.points]
            for trial in self._evaluated(jobs):
                last[trial.job.label] = trial
                if trial.outcome.done:
                    race.tell(trial.job.label, trial.outcome.rows)
                else:
                    race.fail(trial.job.label)
            self.say(f"  rung {rung.number + 1}, {rung.stop} prompts: {len(rung.points)} points drawn")
        for label, point in points.items():
            rows = [row for row in race.rows(label) if row == row]
            self.search.tell(point, sum(rows) / len(rows) if label in race.alive and rows else math.nan)
        self.trials = [last[label] for label in points if label in last]
        return Swept(tuple(self.trials), self.search.best, race)

    def _screen(
        self, race: Race, points: Mapping[str, Point], stop: int, judge: Judge, screened_by: str
    ) -> dict[str, Trial]:
        """Leave out what cheap pictures tell from the best, if their order can be trusted; give what failed of it."""
        from ambergrade.search.racing import Screening

        screening = Screening(points, judge, higher_is_better=self.search.higher_is_better)
        failed = {}
        for trial in self._evaluated([Job(label, point, (0, stop), cheap=True) for label, point in points.items()]):
            label = trial.job.label
            screening.tell(label, trial.outcome.rows if trial.outcome.done else [math.nan] * stop)
            if not trial.outcome.done:
                failed[label] = trial
                race.fail(label)
        for trial in self._evaluated([Job(label, points[label], (0, stop)) for label in screening.controls()]):
            if trial.outcome.done:
                screening.check(trial.job.label, trial.outcome.rows)
        found = screening.decide()
        race.screen(found)
        self.say(f"  screening by {screened_by}, {stop} prompts: {found.text}")
        return failed

    def _evaluated(self, jobs: Sequence[Job]) -> list[Trial]:
        """The trials of these jobs, in their order; what an earlier command finished is not evaluated again."""
        trials = {}
        for job in jobs:
            drawn = self._drawn.get((job.label, job.block, job.cheap))  # a screening's controls, on the first rung
            if drawn is None and (old := self.recall(job)) is not None:
                self.hear(drawn := Trial(job, old, before=True))
            if drawn is not None:
                trials[job.label] = drawn
        for job, outcome in self.evaluate(self._begun(job for job in jobs if job.label not in trials)):
            trials[job.label] = self._drawn[job.label, job.block, job.cheap] = Trial(job, outcome)
            self.hear(trials[job.label])
        return [trials[job.label] for job in jobs]

    def _asked(self) -> Iterator[Job]:
        return self._begun(Job(self.label(point), point) for point in iter(self.search.ask, None))

    def _begun(self, jobs: Iterable[Job]) -> Iterator[Job]:
        for job in jobs:
            self._order.setdefault(job.label, len(self._order))
            self.begin(job)
            yield job

    def _note(self, trial: Trial) -> None:
        self.trials.append(trial)
        self.hear(trial)
