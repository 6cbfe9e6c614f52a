"""Hydra's sweeper `ambergrade`: grid, Optuna's samplers and races, on any launcher, killed and continued at will.

    python pipelines/sweep.py --multirun coefficients.a=0.6,0.8,1.0 coefficients.b=0.25,0.5

With `keyed` the task is a `SweepTask` and runs the sweep itself, from the request that the sweeper makes of the command
line. Without, the sweeper behaves as Hydra's own does. The class that Hydra loads is in src/hydra_plugins.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from ambergrade.chain.settings import SearchSettings
from ambergrade.door.axes import Axes, Spec, read_axes
from ambergrade.door.launching import Launched, Recorded, end_workers_with_us
from ambergrade.errors import BadSetting
from ambergrade.identity import digest
from ambergrade.search.driver import Evaluator, Job
from ambergrade.search.folder import SweepFolder
from ambergrade.search.load import Search, search
from ambergrade.search.single import Single
from ambergrade.track import process
from ambergrade.typed import settings


@dataclass
class SweeperConf:
    """hydra/sweeper/ambergrade."""

    _target_: str = "hydra_plugins.ambergrade_sweeper._sweeper.AmbergradeSweeper"
    search: dict[str, Any] = field(default_factory=lambda: {"name": "grid"})
    """Keys of a yaml in conf/search; its `values` serve where the command line sweeps over nothing."""
    space: str = ""
    """Where the names of `values` live in the configuration."""
    rungs: list[int] | None = None
    """Prompts after each rung of a race; null evaluates every point whole."""
    screen: list[str] | None = None
    """Overrides that make pictures cheap, for a screening before a race: [sampler.steps=4]."""
    max_batch_size: int | None = None
    """Jobs handed to a launcher at once: its slots. null: all of a grid, one of a search that learns."""
    keyed: bool = False
    params: dict[str, str] | None = None


@dataclass(frozen=True)
class Request:
    """What a command line asks for: a search over axes, each point a configuration."""

    asked: SweeperConf
    chosen: SearchSettings
    config: DictConfig
    """The configuration without Hydra's own part, and without the swept values."""
    axes: Axes
    base: Path
    """Below which each sweep has its folder."""
    whole: Callable[[list[str]], DictConfig]
    """Composes overrides."""
    launcher: Launcher | None
    """None for Hydra's basic one in a keyed sweep: the task decides where points are evaluated."""

    @property
    def rungs(self) -> tuple[int, ...]:
        return tuple(self.asked.rungs or ())

    @property
    def screen(self) -> tuple[str, ...]:
        return tuple(self.asked.screen or ())

    @property
    def slots(self) -> int | None:
        """Jobs that a launcher gets at once; None: all there are."""
        return self.asked.max_batch_size or (1 if self.chosen.name != "grid" and not self.rungs else None)

    def search(self) -> Search:
        """The search, as one that nobody has asked yet."""
        if not self.axes.specs:
            return Single(objective=self.chosen.objective)
        space = f"{self.asked.space}." if self.asked.space else ""
        start = {f"{space}{name}": value for name, value in (self.chosen.start or {}).items()}
        known = start if start and set(start) == set(self.axes.specs) else None
        return search(**{**self.chosen.parameters, "values": self.axes.specs, "start": known})

    def composed(self, lines: Sequence[str]) -> DictConfig:
        """The configuration that overrides compose to."""
        return without_hydra(self.whole(list(lines)))

    def overrides(self, job: Job) -> list[str]:
        """A job as overrides."""
        return [*self.axes.overrides(job.point), *(self.screen if job.cheap else ())]

    def corners(self) -> list[Job]:
        """One point, and those that differ from it in a single listed value: together they hold every value."""
        return [Job("", point) for point in self.axes.corners()]

    def key(self, made_of: Callable[[Job], object]) -> str:
        """Name the sweep by its axes, its search (but for the total) and what its points are made of.

        `made_of`: what decides the result of a job, digests of files included. It is asked for the corners, since any
        listed value may name a file or an option that was edited.
        """
        what = {
            "made_of": [made_of(job) for job in self.corners()],
            "axes": self.axes.specs,
            "search": replace(self.chosen, values={}, start=None, trials=None),
            "rungs": self.rungs,
            "screen": self.screen,
        }
        return digest(what)

    def folder(self, key: str) -> SweepFolder:
        return SweepFolder(self.base / key[:16])

    def launched(self, folder: SweepFolder) -> Evaluator | None:
        """The evaluator of a launcher that was chosen."""
        return Launched(self.launcher, folder, self.overrides, self.slots) if self.launcher else None


@runtime_checkable
class SweepTask(Protocol):
    """What a keyed sweep runs."""

    def __call__(self, cfg: DictConfig) -> object:
        """Evaluate one point in a launcher's job, whose folder (HydraConfig's output_dir) says which job it is."""

    def sweep(self, request: Request) -> None:
        """Run the sweep."""


class SweeperBody(Sweeper):
    """Everything of the plugin but its place."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.asked = SweeperConf(**given)
        self.chosen = _search_settings(self.asked.search)
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None
        if self.asked.rungs and self.chosen.sampler not in (None, "qmc"):
            raise BadSetting(
                "A race compares points that are known beforehand.\nUse search=grid or search=qmc with it."
            )
        if self.asked.screen and not self.asked.rungs:
            raise BadSetting("A screening goes before a race.\nGive race=[12,24,40] as well, or leave screen out.")

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.config, self.hydra_context, self.loader = config, hydra_context, hydra_context.config_loader
        self.task = inspect.unwrap(task_function, stop=lambda task: isinstance(task, SweepTask))
        # A queue's jobs outlive the command on purpose; what they finish, the next command takes as it is.
        queued = "slurm" in str(OmegaConf.select(config, "hydra.runtime.choices.hydra/launcher", default=""))
        owner = None if queued else process.owner()
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context,
            task_function=Recorded(task_function, owner) if self.asked.keyed else task_function,
            config=config,
        )
        if self.asked.keyed and owner is not None:
            end_workers_with_us(self.launcher, owner)

    def sweep(self, arguments: list[str]) -> list[Sequence[JobReturn]]:
        """Evaluate every point; returns what the launcher returned, nothing for a keyed sweep."""
        request = self._request(arguments)
        if not self.asked.keyed:
            return self._launched_plainly(request)
        if not isinstance(self.task, SweepTask):
            raise TypeError(f"A keyed sweep needs a task with a method `sweep`, found {self.task!r}.")
        self.task.sweep(request)
        return []

    def _request(self, arguments: Sequence[str]) -> Request:
        assert self.config is not None
        asked = self.asked
        lines = [f"{key}={value}" for key, value in (asked.params or {}).items()] + list(arguments)
        overrides = OverridesParser.create(config_loader=self.loader).parse_overrides(lines)
        values: dict[str, Spec] = {
            name: dict(spec) if isinstance(spec, Mapping) else list(spec) for name, spec in self.chosen.values.items()
        }
        axes = read_axes(overrides, values, asked.space, listed_only=self.chosen.name == "grid")
        whole = [key for key in axes.specs if key.partition(".")[0] in ("search", "race")]
        if asked.keyed and whole:
            raise BadSetting(f"{whole[0]} belongs to the whole sweep, not to a point.\nGive it one value.")
        basic = str(self.config.hydra.launcher._target_).endswith(".BasicLauncher")
        return Request(
            asked=asked,
            chosen=self.chosen,
            config=without_hydra(self.config),
            axes=axes,
            base=Path(self.config.hydra.sweep.dir).absolute(),
            whole=self._composed,
            launcher=None if basic and asked.keyed else self.launcher,
        )

    def _composed(self, lines: list[str]) -> DictConfig:
        assert self.config is not None
        return self.loader.load_sweep_config(self.config, lines)

    def _launched_plainly(self, request: Request) -> list[Sequence[JobReturn]]:
        """As Hydra's own sweeper: batches of jobs, whose first error ends the sweep."""
        assert self.config is not None
        assert self.launcher is not None
        request.base.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, request.base / "multirun.yaml")
        chosen, returns, launched = request.search(), list[Sequence[JobReturn]](), 0
        points = iter(chosen.ask, None)
        while batch := list(islice(points, request.slots)):
            returned = self.launcher.launch([request.axes.overrides(p) for p in batch], initial_job_idx=launched)
            for point, job in zip(batch, returned, strict=True):
                value = job.return_value  # raises the job's error
                chosen.tell(point, float(value) if isinstance(value, int | float) else float("nan"))
            launched += len(batch)
            returns.append(returned)
        return returns


def _search_settings(given: Mapping[str, Any]) -> SearchSettings:
    """Read a search's yaml; one without values of its own leaves them to the command line."""
    values = OmegaConf.to_container(OmegaConf.create(dict(given)), throw_on_missing=False)
    plain = {"objective": "", **{str(key): value for key, value in values.items()}} if isinstance(values, dict) else {}
    own = plain.get("values")
    return settings(SearchSettings, {**plain, "values": {} if own in (None, "???") else own}, "search")


def without_hydra(config: DictConfig) -> DictConfig:
    """The part of a configuration that the task sees."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
