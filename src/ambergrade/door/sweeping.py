"""Makes the sweep pipeline a command: one point without --multirun, a sweep with it, on any of Hydra's launchers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig

from ambergrade.chain.settings import Invocation, SweepSettings
from ambergrade.door.compose import read
from ambergrade.door.main import invocation, pipeline, plain_logs, prepare_compute
from ambergrade.door.sweeper import Request
from ambergrade.search.driver import Evaluator, Job
from ambergrade.search.folder import job_of

Alone = Callable[[SweepSettings, Invocation], object]


def sweeping(config_name: str) -> Callable[[Alone], Callable[[], None]]:
    """Decorate what the pipeline does with a single point into a command that sweeps as well."""

    def decorate(alone: Alone) -> Callable[[], None]:
        return pipeline(config_name)(SweepCommand(alone))

    return decorate


class SweepCommand:
    """The task of Hydra's jobs, and of our sweeper (door/sweeper.py: SweepTask)."""

    def __init__(self, alone: Alone) -> None:
        self._alone = alone
        functools.update_wrapper(self, alone)

    def __call__(self, settings: SweepSettings, asked: Invocation) -> object:
        """Score one point: in a launcher's job the one that its folder names, else the settings as they are."""
        place = Path(HydraConfig.get().runtime.output_dir)
        if not (place / "point.json").exists():
            return self._alone(settings, asked)
        from ambergrade.chain.points import score_below

        job, folder = job_of(place), place if job_of(place).block is None else place.parent
        return score_below(settings, asked, job, json.loads((folder.parent / "sweep.json").read_text()))

    def sweep(self, request: Request) -> None:
        """Run the sweep that a command line asks for."""
        plain_logs()
        prepare_compute(request.config)  # before numpy is imported

        @functools.lru_cache(maxsize=256)
        def composed(lines: tuple[str, ...]) -> SweepSettings:
            return read(SweepSettings, request.composed(lines))

        def settings_of(job: Job) -> SweepSettings:
            return composed(tuple(request.overrides(job)))

        first, *_ = [settings_of(job) for job in request.corners()]  # what is wrong is told here, once
        print("loading …", flush=True)
        from ambergrade.chain import sweep_command
        from ambergrade.chain.points import PointScorer
        from ambergrade.chain.sweep import SweepPlan

        def planned(scorer: PointScorer | None) -> SweepPlan:
            key = request.key(lambda job: scorer.task(settings_of(job), Job("", {})).identity) if scorer else ""
            return SweepPlan(
                key=key,
                folder=request.folder(key),
                search=request.search(),
                axes=request.axes.specs,
                label=request.axes.label,
                settings_of=settings_of,
                rungs=request.rungs,
                screened_by=", ".join(request.screen),
            )

        def launched(plan: SweepPlan) -> Evaluator | None:
            return request.launched(plan.folder)

        sweep_command.run(first, invocation(request.config), planned, launched)
