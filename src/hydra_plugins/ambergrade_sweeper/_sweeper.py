"""Hydra's sweeper `ambergrade`: grid, Optuna's samplers and racing, on any launcher, killed and continued at will.

    python pipelines/sweep.py --multirun coefficients.a=0.6,0.8,1.0 coefficients.b=0.25,0.5

With `keyed` every point has a folder named by what it is, `<hydra.sweep.dir>/<sweep>/<point>`, where its job leaves its
outcome; the same command takes up what is there, tries failures again, and draws the rest; given twice at once, the
second waits for the first. Without, it behaves as Hydra's own sweeper does.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ambergrade.errors import AmbergradeError, BadSetting
from ambergrade.identity import digest
from ambergrade.search.load import Search, search
from ambergrade.search.racing import Race, Screening
from ambergrade.store import write_json
from hydra_plugins.ambergrade_sweeper import _apart, _lifeline, _reports
from hydra_plugins.ambergrade_sweeper._hooks import Hooks, Sweep
from hydra_plugins.ambergrade_sweeper._outcomes import Outcome, Recorded, Trial, failure_table, told
from hydra_plugins.ambergrade_sweeper._plan import Plan, point_key, read_plan
from hydra_plugins.ambergrade_sweeper._single import Single


@dataclass
class AmbergradeSweeperConf:
    _target_: str = "hydra_plugins.ambergrade_sweeper._sweeper.AmbergradeSweeper"
    search: dict[str, Any] = field(default_factory=lambda: {"name": "grid"})
    """Keys of a yaml in conf/search; its `values` serve where the command line sweeps over nothing."""
    space: str = ""
    """Where the names of `values` live in the configuration."""
    rungs: list[int] | None = None
    """Prompts after each rung of a race; null draws every point whole."""
    screen: list[str] | None = None
    """Overrides that make pictures cheap, for a screening before a race: [sampler.steps=4]."""
    max_batch_size: int | None = None
    """Jobs handed to the launcher at once: its slots. null: all of a grid, one of a search that learns."""
    keyed: bool = False
    apart: bool = True
    """Keyed points of the basic launcher run in a process of their own, which they share while it lives."""
    where: list[str] = field(default_factory=list)
    """Settings that change no result, so not which sweep this is."""
    params: dict[str, str] | None = None


ConfigStore.instance().store(
    group="hydra/sweeper", name="ambergrade", node=AmbergradeSweeperConf, provider="ambergrade"
)


class SweepFailed(AmbergradeError):
    """Some points failed; the others are kept."""


class AmbergradeSweeper(Sweeper):
    def __init__(
        self,
        search: dict[str, Any],
        space: str = "",
        rungs: list[int] | None = None,
        screen: list[str] | None = None,
        max_batch_size: int | None = None,
        keyed: bool = False,
        apart: bool = True,
        where: Sequence[str] = (),
        params: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.settings, self.space, self.rungs = dict(search), space, list(rungs or [])
        self.max_batch_size, self.keyed, self.where, self.params = max_batch_size, keyed, tuple(where), params or {}
        self.apart, self.screen = apart, list(screen or [])
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        self._returns: list[Sequence[JobReturn]] = []
        self._launched = 0
        self._worker: _apart.Worker | None = None
        if self.rungs and self.settings.get("sampler", "qmc") != "qmc":
            raise BadSetting(
                "A race compares points that are known beforehand.\nUse search=grid or search=qmc with it."
            )

        if self.screen and not self.rungs:
            raise BadSetting("A screening goes before a race.\nGive race=[12,24,40] as well, or leave screen out.")

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context = config, hydra_context
        self.hooks: Hooks | None = task_function.sweep() if hasattr(task_function, "sweep") else None
        self.task = self._recorded(task_function) if self.keyed else task_function
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=self.task, config=config
        )
        if isinstance(self.task, Recorded) and self.task.owner:
            _lifeline.hand_to(self.launcher, self.task.owner)

    def _recorded(self, task: TaskFunction) -> Recorded:
        assert self.config is not None
        # A queue's jobs outlive the command on purpose; what they finish, the next command takes as it is.
        queued = "slurm" in str(OmegaConf.select(self.config, "hydra.runtime.choices.hydra/launcher", default=""))
        return Recorded(task, None if queued else _lifeline.owner())

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Draw every point; returns the launched batches. Raises SweepFailed at the end if any point failed."""
        assert self.config is not None
        task = self._task_config()
        previews = self.hooks is not None and self.hooks.previews(task)
        self._reporting: Sweep | None = None
        if not previews and self.keyed and self.apart and isinstance(self.launcher, BasicLauncher):
            self._start_worker()  # its imports take as long as what is done here until the first point
        try:
            return self._swept(arguments, task, previews)
        finally:
            if self._worker is not None:
                self._worker.close()

    def _swept(self, arguments: list[str], task: DictConfig, previews: bool) -> list[Sequence[JobReturn]]:
        assert self.config is not None
        sweep = self._reporting = self._sweep(arguments)
        if self.hooks and previews:
            trials = [self._trial(sweep, point) for point in self._asked(sweep.search)]
            self.hooks.preview(sweep, [(trial, self._composed(trial)) for trial in trials])
            return []
        with self._alone(sweep.folder) if self.keyed else nullcontext():
            sweep.folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(self.config, sweep.folder / "multirun.yaml")
            with self.hooks.opens(task, sweep) if self.hooks else nullcontext() as sweep.around:
                self._draw_all(task, sweep)
        return self._returns

    def _draw_all(self, task: DictConfig, sweep: Sweep) -> None:
        if self.rungs:
            self._race(sweep)
        else:
            self._search(sweep)
        sweep.worker = self._worker
        if self.hooks:
            self.hooks.closes(task, sweep)
        table = failure_table(sweep.trials)
        if table:
            print(f"\n{table}", flush=True)
            raise SweepFailed(f"{table.splitlines()[0]} see above.\nRun the same command again to go on with them.")

    @contextmanager
    def _alone(self, folder: Path) -> Iterator[None]:
        """One command at a time draws a sweep; the kernel drops the lock when it dies."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                print(f"  process {lock.read().strip()} draws this sweep now; waiting for it", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            lock.truncate(0)
            lock.write(f"{os.getpid()} on {_lifeline.owner()['ag.host']}")
            lock.flush()
            yield

    # --- what to draw ----------------------------------------------------------------------------------------

    def _sweep(self, arguments: Sequence[str]) -> Sweep:
        assert self.config is not None
        loader = self._loader
        lines = [f"{key}={value}" for key, value in self.params.items()] + list(arguments)
        overrides = OverridesParser.create(config_loader=loader).parse_overrides(lines)
        settings = {key: value for key, value in self.settings.items() if key not in ("values", "start")}
        settings.setdefault("objective", "")
        grid = settings.get("name") == "grid"
        given = self.settings.get("values") or {}
        plan = read_plan(overrides, {} if given == "???" else given, self.space, listed_only=grid)
        whole = [key for key in plan.axes if key.partition(".")[0] in ("search", "race")]
        if self.keyed and whole:
            raise BadSetting(f"{whole[0]} belongs to the whole sweep, not to a point.\nGive it one value.")
        if grid:  # nothing is swept: one job, as Hydra does it
            plan = plan if plan.axes else Plan(plan.fixed, {}, plan.order)
        values = {key: plan.spec(key) for key in plan.axes}
        made = search(**settings, values=values, start=self._start(plan)) if values else Single()
        what = {
            "config": self._what(self.config),
            "axes": values,
            "search": {key: value for key, value in settings.items() if key != "trials"},
            "rungs": self.rungs,
            **({"screen": self.screen} if self.screen else {}),
        }
        if self.hooks and self.keyed:
            what["inputs"] = self.hooks.inputs(self._task_config())
        if self.keyed and (options := self._options(plan)):
            what["options"] = options
        key = digest(what)
        folder = Path(self.config.hydra.sweep.dir).absolute()
        return Sweep(key, folder / key[:16] if self.keyed else folder, made, plan, composed=self._composed)

    def _what(self, config: DictConfig) -> dict[str, Any]:
        """The settings that decide results, as they are written."""
        whole = OmegaConf.to_container(config, resolve=False)
        assert isinstance(whole, dict)
        return {str(key): value for key, value in whole.items() if key not in ("hydra", "search", *self.where)}

    def _options(self, plan: Plan) -> dict[str, Any]:
        """What the swept options of config groups hold: a file that was edited since makes other points."""
        assert self.config is not None
        loader, found = self._loader, {}
        for key in (key for key in plan.axes if loader.get_group_options(key)):
            for text in plan.texts.get(key, {}).values():
                config = loader.load_sweep_config(self.config, [f"{key}={text}"])
                files = self.hooks.inputs(config) if self.hooks else {}
                found[f"{key}={text}"] = {"config": self._what(config), "inputs": files}
        return found

    def _task_config(self) -> DictConfig:
        assert self.config is not None
        return OmegaConf.masked_copy(self.config, [str(key) for key in self.config if key != "hydra"])

    def _start(self, plan: Plan) -> dict[str, Any] | None:
        """The search's start point by override keys, where the sweep holds all of its names and no others."""
        given = self.settings.get("start") or {}
        start = {f"{self.space}.{name}" if self.space else name: value for name, value in given.items()}
        return start if start and set(start) == set(plan.axes) else None

    def _asked(self, made: Search) -> list[dict[str, Any]]:
        return list(iter(made.ask, None))

    def _trial(
        self, sweep: Sweep, point: dict[str, Any], block: tuple[int, int] | None = None, cheaper: Sequence[str] = ()
    ) -> Trial:
        overrides, label = sweep.plan.overrides(point), sweep.plan.label(point) or "the point"
        folder = sweep.folder / point_key([*sweep.plan.swept(point), *cheaper])
        return Trial(label, dict(point), [*overrides, *cheaper], folder, block)

    def _composed(self, trial: Trial) -> DictConfig:
        whole = self._whole(trial.lines)
        return OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])

    @property
    def _loader(self) -> ConfigLoader:
        assert self.hydra_context is not None
        return self.hydra_context.config_loader

    def _whole(self, lines: list[str]) -> DictConfig:
        assert self.config is not None
        return self._loader.load_sweep_config(self.config, lines)

    # --- drawing ---------------------------------------------------------------------------------------------

    def _search(self, sweep: Sweep) -> None:
        """Ask, draw, tell, until the search has no more; what an earlier command finished is told first."""
        if self.keyed:
            self._recall(sweep)
        learns = self.settings.get("name") != "grid"
        slots = self.max_batch_size or (1 if learns else len(sweep.search))
        while batch := [trial for trial in (self._next(sweep) for _ in range(slots)) if trial]:
            self._draw(batch)
            for trial in batch:
                assert trial.outcome is not None, trial.label
                sweep.search.tell(trial.point, trial.outcome.score)

    def _next(self, sweep: Sweep) -> Trial | None:
        point = sweep.search.ask()
        if point is None:
            return None
        trial = self._trial(sweep, point)
        sweep.trials.append(trial)
        return trial

    def _recall(self, sweep: Sweep) -> None:
        """Points of earlier commands: the search hears of them in the order they were proposed in."""
        past = [(trial, self._recalled(trial)) for trial in self._past(sweep)]
        for trial, finished in past:
            if finished:
                before = trial.outcome
                assert before is not None
                trial.before = True
                sweep.search.recall(trial.point, before.score)
                sweep.trials.append(trial)
        for trial, finished in past:
            if not finished:
                sweep.search.retry(trial.point)
        if sweep.trials:
            print(f"  {len(sweep.trials)} of {len(sweep.search)} points finished before", flush=True)

    def _recalled(self, trial: Trial) -> bool:
        if not trial.recall():
            return False
        assert trial.outcome is not None
        return self.hooks is None or self.hooks.holds(self._task_config(), trial.outcome.value)

    def _past(self, sweep: Sweep) -> Iterator[Trial]:
        files = sorted(sweep.folder.glob("*/point.json"), key=lambda file: json.loads(file.read_text())["number"])
        for file in files:
            yield self._trial(sweep, json.loads(file.read_text())["point"])

    def _race(self, sweep: Sweep) -> None:
        """Rung by rung; a job draws only the prompts that the rung adds."""
        if self.hooks is None or not self.keyed:
            raise BadSetting("A race needs a pipeline that scores per prompt.\nUse python pipelines/sweep.py.")
        points = {sweep.plan.label(point): point for point in self._asked(sweep.search)}
        higher, hooks = sweep.search.higher_is_better, self.hooks
        race = sweep.race = Race(
            list(points), self.rungs, lambda scores, alive, error: hooks.judge(scores, alive, error, higher)
        )
        last: dict[str, Trial] = self._screened(sweep, points, race) if self.screen else {}
        while rung := race.ask():
            trials = [self._trial(sweep, points[label], (rung.start, rung.stop)) for label in rung.points]
            self._draw_new(trials)
            for trial in trials:
                last[trial.label] = trial
                assert trial.outcome is not None, trial.label
                if trial.outcome.status == "done":
                    race.tell(trial.label, trial.outcome.value["rows"])
                else:
                    race.fail(trial.label)
            print(f"  rung {rung.number + 1}, {rung.stop} prompts: {len(rung.points)} points drawn", flush=True)
        for label, point in points.items():
            rows = race.rows(label)
            sweep.search.tell(point, float(np.nanmean(rows)) if label in race.alive and rows else float("nan"))
        sweep.trials += last.values()

    def _screened(self, sweep: Sweep, points: Mapping[str, dict[str, Any]], race: Race) -> dict[str, Trial]:
        """Leave the points out of the race that cheap pictures tell from the best, if their order can be trusted.

        Gives the points whose cheap pictures failed.
        """
        assert self.hooks is not None
        hooks, higher, block = self.hooks, sweep.search.higher_is_better, (0, self.rungs[0])
        screening = Screening(
            points, lambda scores, alive, error: hooks.judge(scores, alive, error, higher), higher_is_better=higher
        )
        cheap = [self._trial(sweep, point, block, self.screen) for point in points.values()]
        self._draw_new(cheap)
        failed = {trial.label: trial for trial in cheap if trial.outcome and trial.outcome.status != "done"}
        for trial in cheap:
            outcome = None if trial.label in failed else trial.outcome
            screening.tell(trial.label, outcome.value["rows"] if outcome else [float("nan")] * block[1])
        for label in failed:
            race.fail(label)
        whole = [self._trial(sweep, points[label], block) for label in screening.controls()]
        self._draw_new(whole)
        for trial in whole:
            if trial.outcome is not None and trial.outcome.status == "done":
                screening.check(trial.label, trial.outcome.value["rows"])
        found = screening.decide()
        race.screen(found)
        print(f"  screening by {', '.join(self.screen)}, {block[1]} prompts: {found.text}", flush=True)
        return failed

    def _draw_new(self, trials: Sequence[Trial]) -> None:
        """Draw those of a race's trials that no earlier command finished."""
        for trial in trials:
            trial.before = self._recalled(trial)
        self._draw([trial for trial in trials if not trial.before], self.max_batch_size)

    def _draw(self, trials: Sequence[Trial], most: int | None = None) -> None:
        for start in range(0, len(trials), most or max(len(trials), 1)):
            self._launch(list(trials[start : start + (most or len(trials))]))

    def _launch(self, trials: list[Trial]) -> None:
        """One batch, each with an outcome at the end."""
        assert self.launcher is not None
        if self.keyed:
            self._prepare(trials)
        if isinstance(self.task, Recorded) and self.apart and isinstance(self.launcher, BasicLauncher):
            self._launch_apart(trials)
            return
        try:
            with _lifeline.hears_sigterm(self.launcher):
                returns = self.launcher.launch([self._job(trial) for trial in trials], initial_job_idx=self._launched)
        except Exception as error:
            if not self.keyed:
                raise
            self._after_a_death(trials, error)
            return
        self._launched += len(trials)
        self._returns.append(returns)
        for trial, ended in zip(trials, returns, strict=True):
            value = ended._return_value
            done = ended.status == JobStatus.COMPLETED
            trial.outcome = Outcome("done", value) if done else Outcome("failed", None, _told(value))
            if not done and not self.keyed:
                _ = ended.return_value  # raises it, as Hydra's own sweeper does

    def _after_a_death(self, trials: list[Trial], error: Exception) -> None:
        """The launcher gave up because a job's process died, and does not say whose: those it may have been, alone."""
        for trial in trials:
            trial.wait()  # some launchers give up while other jobs still draw
            trial.recall()
        left = [trial for trial in trials if trial.outcome is None]
        self._launched += len(trials) - len(left)
        if not left:
            return
        if len(trials) == 1:
            trials[0].fail(error)
            return
        print(f"  the launcher ended by {type(error).__name__}; {len(left)} points are drawn anew", flush=True)
        begun = [trial for trial in left if trial.was_begun]
        others = [trial for trial in left if trial not in begun]
        half = 0 if begun else len(others) // 2  # a worker died before any point began: no telling which it would be
        for batch in [others[:half], others[half:], *([trial] for trial in begun)]:
            if batch:
                self._launch(batch)

    def _start_worker(self) -> None:
        assert self.config is not None
        assert self.hydra_context is not None
        assert isinstance(self.task, Recorded)
        self.task.apart = True
        self._worker = _apart.Worker(self.hydra_context, self.task, self.config, self._hear)

    def _hear(self, message: Any) -> None:
        if isinstance(message, _reports.Told):
            write_json(message.file, message.row)
        elif self.hooks is not None:
            assert self._reporting is not None
            self.hooks.hears(self._reporting, message)

    def _launch_apart(self, trials: list[Trial]) -> None:
        """A point whose process ends under it has failed; those after it get a new process."""
        left = trials
        while left:
            if self._worker is None:
                self._start_worker()
            assert self._worker is not None
            code = self._worker.run(self._composed_jobs(left), len(left), self._launched)
            if code is not None:
                self._worker = None
                if hasattr(self.hooks, "hears"):
                    self._hear(None)
            for trial in left:
                trial.recall()
            self._launched += sum(1 for trial in left if trial.outcome)
            left = [trial for trial in left if trial.outcome is None]
            if left:
                ended = _apart.Ended(code or 0)
                print(f"  {left[0].label}: {ended}; {len(left) - 1} points go on", flush=True)
                left.pop(0).fail(ended)
                self._launched += 1

    def _composed_jobs(self, trials: Sequence[Trial]) -> Iterator[_apart.Job]:
        for trial in trials:
            lines = self._job(trial)
            try:
                whole = self._whole(lines)
            except (HydraException, OmegaConfBaseException) as error:
                trial.fail(error)
                continue
            yield lines, whole

    def _prepare(self, trials: Sequence[Trial]) -> None:
        """Folders that say which point they are; an outcome that no longer counts goes."""
        for trial in trials:
            about = trial.folder / "point.json"
            if not self._recalled(trial):
                trial.file.unlink(missing_ok=True)
            trial.outcome = None
            if not about.exists():
                number = sum(1 for _ in trial.folder.parent.glob("*/point.json"))
                row = {"number": number, "label": trial.label, "point": trial.point, "overrides": trial.overrides}
                write_json(about, row)

    def _job(self, trial: Trial) -> list[str]:
        if not self.keyed:
            return trial.lines
        place = {"hydra.sweep.dir": str(trial.folder.parent), "hydra.sweep.subdir": trial.folder.name}
        return trial.lines + [f"{key}={_quoted(value)}" for key, value in place.items()]


def _told(error: Any) -> str:
    return told(error) if isinstance(error, BaseException) else str(error)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
