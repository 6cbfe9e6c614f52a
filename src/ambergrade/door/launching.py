"""Evaluates a sweep's points through a Hydra launcher, on this machine or on others.

A job leaves its outcome in its own folder, so that a killed command loses only what it was drawing. A launcher that
ends because a worker died does not say which point it held: those that were being drawn are drawn again, alone, and who
dies alone has failed. Workers on this machine end with the command that started them; a queue's jobs outlive it on
purpose, and what they finish is taken as it is.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from ambergrade.door.following import follow
from ambergrade.search.driver import Job, Outcome, attempt
from ambergrade.search.folder import SweepFolder, read_outcome, write_outcome
from ambergrade.track import process

STARTED_AGAIN = (144, -1)
"""Exit codes by which submitit leaves a job that it starts again."""


@dataclass
class Launched:
    """An evaluator (search/driver.py): hands out as many jobs as there are slots, and waits for all of them."""

    launcher: Launcher
    folder: SweepFolder
    overrides: Callable[[Job], list[str]]
    slots: int | None
    """Jobs handed out at once; None: all there are."""
    say: Callable[[str], None] = print
    _launched: int = 0

    def __call__(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, Outcome]]:
        while batch := list(islice(jobs, self.slots)):
            yield from self._launch(batch)

    def _launch(self, jobs: Sequence[Job]) -> list[tuple[Job, Outcome]]:
        lines = [self._lines(job) for job in jobs]
        try:
            with _hearing_sigterm(self.launcher):
                returns = self.launcher.launch(lines, initial_job_idx=self._launched)
        except Exception as error:  # whatever a launcher raises when a worker of its own died
            return self._after_a_death(jobs, error)
        self._launched += len(jobs)
        return [(job, self.folder.outcome(job) or _lost(returned)) for job, returned in zip(jobs, returns, strict=True)]

    def _lines(self, job: Job) -> list[str]:
        place = self.folder.place(job).relative_to(self.folder.root)
        where = {"hydra.sweep.dir": str(self.folder.root), "hydra.sweep.subdir": str(place)}
        return self.overrides(job) + [f"{key}={quoted(value)}" for key, value in where.items()]

    def _after_a_death(self, jobs: Sequence[Job], error: Exception) -> list[tuple[Job, Outcome]]:
        for job in jobs:
            with claimed(self.folder.place(job)):  # some launchers give up while other jobs still draw
                pass
        ended = [(job, outcome) for job in jobs if (outcome := self.folder.outcome(job)) is not None]
        left = [job for job in jobs if self.folder.outcome(job) is None]
        self._launched += len(ended)
        if len(jobs) == 1 and left:
            return [(left[0], Outcome.of_error(error))]
        if left:
            self.say(f"  the launcher ended by {type(error).__name__}; {len(left)} points are drawn anew")
        begun = [job for job in left if _lock(self.folder.place(job)).read_text()]
        others = [job for job in left if job not in begun]
        half = 0 if begun else len(others) // 2  # a worker died before any point began: no telling which it would be
        for batch in [others[:half], others[half:], *([job] for job in begun)]:
            ended += self._launch(batch) if batch else []
        return ended


class Recorded:
    """A task that leaves its outcome in its job's folder; one process at a time draws a point."""

    def __init__(self, task: Callable[[DictConfig], object], owner: Mapping[str, str] | None) -> None:
        """`owner`: the process (`track.process.owner`) that a worker must not outlive."""
        self.task, self.owner = task, owner

    def __call__(self, cfg: DictConfig) -> object:
        if self.owner is not None:
            follow(self.owner)
        if os.environ.get("SUBMITIT_EXECUTOR") == "local":  # there submitit makes a job deaf to SIGTERM
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        place = Path(HydraConfig.get().runtime.output_dir)
        with claimed(place) as lock:
            outcome = read_outcome(place)
            if outcome is None or not outcome.done:  # else a job that outlived its command has drawn it meanwhile
                lock.truncate(0)
                lock.write(json.dumps(process.owner()))
                lock.flush()
                outcome = attempt(self.task, cfg, passing=STARTED_AGAIN)
                write_outcome(place, outcome)
            lock.truncate(0)
        return outcome.value


@contextmanager
def claimed(place: Path) -> Iterator[Any]:
    """Hold the lock of a point, which the kernel drops when the process dies; yields its file.

    While a point is drawn the file says by whom: what is left there was cut short.
    """
    place.mkdir(parents=True, exist_ok=True)
    with _lock(place).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def quoted(text: str) -> str:
    """A text as an override's value."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def end_workers_with_us(launcher: Launcher, owner: Mapping[str, str]) -> None:
    """Let joblib's workers follow from their first moment: one that never got a job would wait for five minutes."""
    settings = getattr(launcher, "joblib", None)
    if isinstance(settings, dict):
        settings |= {"initializer": follow, "initargs": (dict(owner),)}


@contextmanager
def _hearing_sigterm(launcher: Launcher) -> Iterator[None]:
    """Start Ray where it is the launcher, and take SIGTERM back from it.

    Its own handler aborts, so that runs stay open; and what ours raises it turns into an exit of another code.
    """
    if type(launcher).__name__ != "RayLauncher":
        yield
        return
    settings, ours = launcher.ray_cfg.init, signal.getsignal(signal.SIGTERM)  # type: ignore[attr-defined]
    settings.setdefault("object_store_memory", 75 << 20)  # bytes: Ray's least, as its launcher sets it
    ray = import_module("ray")
    if not ray.is_initialized():  # else the launcher starts it, and so its handler, later
        ray.init(**settings)
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        assert callable(ours)
        ours(number, frame)

    signal.signal(signal.SIGTERM, hear if callable(ours) else ours)
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        ray.shutdown()  # its workers go now, so that their runs can be closed
        if heard:
            raise process.Terminated(128 + heard[0]) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, ours)


def _lost(returned: JobReturn) -> Outcome:
    """The outcome of a job that ended before our task did."""
    try:
        return Outcome.of_error(RuntimeError(f"it left no outcome, but returned {returned.return_value!r}"))
    except Exception as error:  # whatever Hydra met
        return Outcome.of_error(error)


def _lock(place: Path) -> Path:
    return place / ".lock"
