"""Searches that learn from what they hear: Optuna's samplers behind ask and tell (pip install optuna cmaes scipy).

Optuna keeps its study in memory here; what a killed search knew comes back by `recall`, from the sweep's own record:
TPE, GP and QMC as if they had heard it themselves, CMA-ES as a warm start (Nomura et al. 2021), NSGA-II as generations
in the order told.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ambergrade.errors import BadSetting, UnknownName
from ambergrade.identity import random_seed
from ambergrade.search.points import Point, Value, best_of, key_of, plain

try:
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.trial import Trial, TrialState, create_trial
except ImportError as error:  # an extra
    raise BadSetting(f"This search needs Optuna: {error}.\nInstall it: pip install optuna cmaes scipy") from error

optuna.logging.set_verbosity(optuna.logging.WARNING)

Space = Mapping[str, Sequence[Value] | Mapping[str, Any]]

Past = list[optuna.trial.FrozenTrial]
SAMPLERS: dict[str, Callable[[int, Past], optuna.samplers.BaseSampler]] = {
    # a point that is still being scored counts as a poor one, so that the points of one batch differ
    "tpe": lambda seed, past: optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True),
    "cmaes": lambda seed, past: _evolution_strategy(seed, past),
    "gp": lambda seed, past: optuna.samplers.GPSampler(seed=seed),
    "nsga2": lambda seed, past: optuna.samplers.NSGAIISampler(seed=seed, population_size=POPULATION),
    "qmc": lambda seed, past: _quasi_random(seed),
}
TENTH = 10
"""So many scored points have a best tenth."""
POPULATION = 10
"""NSGA-II's: the trials of one generation."""
ATTEMPTS = 20
"""So often a sampler is asked for a point that is new; then one is drawn at random."""


class Optuna:
    """Proposes `trials` different points in all, learning from the scores; fewer where the space holds fewer.

    A coefficient's values are a list, or `{low: 0, high: 2}` with `step` or `log: true`. Numbers of a range are rounded
    to six digits, which is what tables and labels show. The same (seed, scores heard in the same order) proposes the
    same points; a search that recalled n points goes on with the seed (seed, n), so a resumed one repeats none.
    """

    def __init__(
        self,
        values: Space,
        *,
        sampler: str,
        trials: int,
        objective: str,
        higher_is_better: bool = True,
        start: Mapping[str, Value] | None = None,
        seed: int = 0,
    ) -> None:
        """Raise BadSetting or UnknownName with every complaint about values, start, sampler and trials."""
        if sampler not in SAMPLERS:
            raise UnknownName("sampler", sampler, SAMPLERS)
        self.axes = {name: Axis(name, given) for name, given in values.items()}
        if trials < 1 or not values:
            raise BadSetting(f"A search needs at least one trial and one name: {trials} trials of {sorted(values)}.")
        if start is not None and set(start) != set(values):
            raise BadSetting(f"The start point names {sorted(start)}, the values {sorted(values)}.")
        self.objective, self.higher_is_better = objective, higher_is_better
        self.trials = int(min(trials, math.prod(axis.size for axis in self.axes.values())))
        self._sampler, self._seed = sampler, seed
        self._start = dict(start) if start is not None else None
        self._scores: dict[str, tuple[Point, float]] = {}
        self._open: dict[str, Trial] = {}
        self._seen: set[str] = set()
        self._made: optuna.Study | None = None
        self._past: Past = []
        self._again: dict[str, Point] = {}

    def __len__(self) -> int:
        return self.trials

    def ask(self) -> Point | None:
        """A point that was not proposed before; None when the total is reached."""
        if len(self._seen) >= self.trials:
            return None
        trial, point = self._fresh()
        self._seen.add(key_of(point))
        self._open[key_of(point)] = trial
        return point

    def tell(self, point: Mapping[str, Value], score: float) -> None:
        """Hear a point's score; NaN says that it failed, and the sampler learns nothing from it."""
        trial = self._open.pop(key_of(point), None)
        if trial is None:
            raise BadSetting(f"{dict(point)} is not waiting for a score in this search.")
        self._tell(trial, score)
        self._scores[key_of(point)] = (dict(point), float(score))

    def recall(self, point: Mapping[str, Value], score: float) -> None:
        """Hear of a point of an earlier process; one that lies outside the space is passed over."""
        if self._made is not None:
            raise BadSetting("Past points are recalled before the first is asked for.")
        if not self._is_inside(point) or key_of(point) in self._seen:
            return
        self._seen.add(key_of(point))
        self._scores[key_of(point)] = (dict(point), float(score))
        self._past.append(self._frozen(point, score))

    def retry(self, point: Mapping[str, Value]) -> None:
        """Hear of a point that an earlier process asked for and did not finish: it is asked for first."""
        if self._made is not None:
            raise BadSetting("Past points are retried before the first is asked for.")
        if self._is_inside(point) and key_of(point) not in self._seen:
            self._again[key_of(point)] = dict(point)

    @property
    def best(self) -> tuple[Point, float] | None:
        """The best scored point so far, the earlier one among equals."""
        return best_of(self._scores.values(), higher_is_better=self.higher_is_better)

    def _is_inside(self, point: Mapping[str, Value]) -> bool:
        return set(point) == set(self.axes) and all(self.axes[name].holds(value) for name, value in point.items())

    @property
    def _study(self) -> optuna.Study:
        if self._made is None:
            seed = random_seed(self._seed, "search", self._sampler, len(self._past)) % 2**31
            sampler = SAMPLERS[self._sampler](seed, self._past)
            self._made = optuna.create_study(
                sampler=sampler, direction="maximize" if self.higher_is_better else "minimize"
            )
            if isinstance(sampler, optuna.samplers.NSGAIISampler):
                self._replay(self._made, sampler)
            else:
                self._made.add_trials(self._past)
            for point in (*self._again.values(), *([self._start] if self._start is not None else [])):
                self._made.enqueue_trial({name: self.axes[name].inward(value) for name, value in point.items()})
        return self._made

    def _replay(self, study: optuna.Study, sampler: optuna.samplers.NSGAIISampler) -> None:
        """Ask for and tell the past points again: only what was asked for has a generation, and so can be a parent."""
        for past in self._past:
            study.enqueue_trial(past.params)
            again = study.ask(past.distributions)
            sampler.get_trial_generation(study, study.trials[again.number])
            study.tell(again, past.value, state=past.state)

    def _fresh(self) -> tuple[Trial, Point]:
        space = {name: axis.distribution for name, axis in self.axes.items()}
        for attempt in range(ATTEMPTS + 1):
            if attempt == ATTEMPTS:
                self._study.enqueue_trial(self._random())
            trial = self._study.ask(space)
            point = {name: axis.outward(trial.params[name]) for name, axis in self.axes.items()}
            if key_of(point) not in self._seen:
                return trial, point
            past = self._scores.get(key_of(point))
            self._tell(trial, past[1] if past else math.nan)  # what it costs is known: no slot is spent on it
        raise AssertionError((self._sampler, len(self._seen), self.trials))

    def _random(self) -> dict[str, Any]:
        """A point that was not seen, uniform over the space, keyed by how many were."""
        for attempt in range(10_000):
            rng = np.random.default_rng(random_seed(self._seed, "a new point", len(self._seen), attempt))
            inward = {name: axis.inward(axis.at(float(rng.random()))) for name, axis in self.axes.items()}
            point = {name: axis.outward(inward[name]) for name, axis in self.axes.items()}
            if key_of(point) not in self._seen:
                return inward
        raise BadSetting(f"No new point was found after {len(self._seen)} of {self.trials}. Ask for fewer trials.")

    def _tell(self, trial: Trial, score: float) -> None:
        if math.isfinite(score):
            self._study.tell(trial, score)
        else:
            self._study.tell(trial, state=TrialState.FAIL)

    def _frozen(self, point: Mapping[str, Value], score: float) -> optuna.trial.FrozenTrial:
        scored = math.isfinite(score)
        return create_trial(
            state=TrialState.COMPLETE if scored else TrialState.FAIL,
            value=score if scored else None,
            params={name: self.axes[name].inward(value) for name, value in point.items()},
            distributions={name: axis.distribution for name, axis in self.axes.items()},
        )


class Axis:
    """One name's values, as users write them (outward) and as Optuna counts them (inward)."""

    def __init__(self, name: str, given: Sequence[Value] | Mapping[str, Any]) -> None:
        self.listed: list[Value] = []
        if isinstance(given, Mapping):
            self.distribution: BaseDistribution = self._range(name, given)
            return
        self.listed = [plain(value) for value in given]
        if not self.listed or len(set(self.listed)) < len(self.listed):
            raise BadSetting(f"{name} needs values, each once; found {list(given)}.")
        if all(isinstance(value, float) for value in self.listed):
            self.listed = sorted(self.listed)
            self.distribution = IntDistribution(0, len(self.listed) - 1)  # numbers have an order: let samplers use it
        else:
            self.distribution = CategoricalDistribution(list(range(len(self.listed))))

    @staticmethod
    def _range(name: str, given: Mapping[str, Any]) -> FloatDistribution:
        unknown = set(given) - {"low", "high", "step", "log"}
        if unknown or not {"low", "high"} <= set(given) or not float(given["low"]) < float(given["high"]):
            raise BadSetting(f"{name}: write low and high, low the smaller, and step or log; found {dict(given)}.")
        step, log = given.get("step"), bool(given.get("log", False))
        if (step is not None and (log or step <= 0)) or (log and given["low"] <= 0):
            raise BadSetting(f"{name}: log needs low above 0 and no step, step must be above 0; found {dict(given)}.")
        return FloatDistribution(float(given["low"]), float(given["high"]), step=step, log=log)

    @property
    def size(self) -> float:
        """How many values there are; infinite for a range without a step."""
        if self.listed:
            return len(self.listed)
        assert isinstance(self.distribution, FloatDistribution)
        step = self.distribution.step
        return math.inf if step is None else round((self.distribution.high - self.distribution.low) / step) + 1

    def at(self, share: float) -> Value:
        """The value at this share (0 to 1) of the axis."""
        if self.listed:
            return self.listed[int(share * len(self.listed))]
        low, high = self.distribution.low, self.distribution.high  # type: ignore[attr-defined]
        if self.distribution.log:  # type: ignore[attr-defined]
            return self.outward(low * (high / low) ** share)
        step = self.distribution.step  # type: ignore[attr-defined]
        return self.outward(low + (high - low) * share if step is None else low + step * int(share * self.size))

    def inward(self, value: Value) -> Any:
        return self.listed.index(plain(value)) if self.listed else float(value)

    def outward(self, value: Any) -> Value:
        return self.listed[value] if self.listed else float(f"{value:.6g}")

    def holds(self, value: Value) -> bool:
        if self.listed:
            return plain(value) in self.listed
        low, high = self.distribution.low, self.distribution.high  # type: ignore[attr-defined]
        return isinstance(plain(value), float) and low <= float(value) <= high


def _evolution_strategy(seed: int, past: Past) -> optuna.samplers.BaseSampler:
    """Its distribution lives in the trials it made itself; from others' it can start where the best tenth lies."""
    scored = [trial for trial in past if trial.state == TrialState.COMPLETE]
    axes = [axis for trial in past for axis in trial.distributions.values()]
    warm = len(scored) >= TENTH and not any(isinstance(axis, CategoricalDistribution) for axis in axes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.CmaEsSampler(seed=seed, source_trials=scored if warm else None)


def _quasi_random(seed: int) -> optuna.samplers.BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # its interface may change; we pin
        return optuna.samplers.QMCSampler(seed=seed, scramble=True)


Search = Optuna  # the name under which every search module is found
