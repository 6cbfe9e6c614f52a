"""What became of a point, kept in its own folder by the job itself: a killed sweep loses only what it was drawing."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ambergrade.errors import AmbergradeError
from ambergrade.search.points import Point
from ambergrade.store import write_json
from hydra_plugins.ambergrade_sweeper import _lifeline, _reports

ENDED_BY_A_SIGNAL = (130, 143)
"""Exit codes of SIGINT and SIGTERM."""
STARTED_AGAIN = (144, -1)
"""Exit codes by which submitit leaves a job that it starts again."""
BLOCK = "block"
"""Setting by which a racing sweep tells a job which prompts to draw: [start, stop]."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    status: str
    """`done` or `failed`."""
    value: Any = None
    """What the task returned: a score, or a mapping with `score` and, for races, `rows`."""
    error: str = ""
    """Its first line; the traceback is in the file."""
    seconds: float = 0.0

    @property
    def score(self) -> float:
        """The number a search hears: NaN for a failure, or where the task returned none."""
        value = self.value.get("score") if isinstance(self.value, Mapping) else self.value
        return float(value) if isinstance(value, int | float) and self.status == "done" else float("nan")


@dataclass
class Trial:
    """One point of a sweep."""

    label: str
    point: Point
    overrides: list[str]
    folder: Path
    block: tuple[int, int] | None = None
    outcome: Outcome | None = None
    before: bool = False
    """It was finished by an earlier command."""
    tags: dict[str, Any] = field(default_factory=dict)

    @property
    def lines(self) -> list[str]:
        """The overrides of the job."""
        return self.overrides + ([f"{BLOCK}=[{self.block[0]},{self.block[1]}]"] if self.block else [])

    @property
    def file(self) -> Path:
        return self.folder / _name(self.block)

    @property
    def was_begun(self) -> bool:
        """Whether a job began to draw it and never came to an end."""
        lock = _lock_of(self.file)
        return lock.exists() and lock.stat().st_size > 0

    def wait(self) -> None:
        """Until no job draws it any more."""
        with claimed(self.file):
            pass

    def recall(self) -> bool:
        """Take the outcome from the folder; True if the point is done. A failure is forgotten: it is tried again."""
        found = read(self.file)
        self.outcome = found
        return found is not None and found.status == "done"

    def fail(self, error: BaseException) -> None:
        """Note a failure that the job could not note itself."""
        self.outcome = Outcome("failed", None, told(error))
        write(self.file, self.outcome, error)


class Left(RuntimeError):
    """A point ended its process; the launcher hears an ordinary error, and the others go on."""

    def __init__(self, code: object) -> None:
        super().__init__(ending(code if isinstance(code, int) else 1))


class Recorded:
    """A task that leaves its outcome in its job's folder. One process at a time draws a point.

    What a job that outlived its command has finished is taken as it is: a point is drawn by whoever comes first.
    """

    def __init__(self, task: Callable[[DictConfig], Any], owner: Mapping[str, str] | None = None) -> None:
        """`owner`: the process (`_lifeline.owner`) that a worker must not outlive."""
        self.task, self.owner = task, owner
        self.apart = False
        """The process is ours: asked to end, it ends, and its next point is drawn by another."""

    def __call__(self, cfg: DictConfig) -> Any:
        if self.owner is not None:
            _lifeline.follow(self.owner)
        if os.environ.get("SUBMITIT_EXECUTOR") == "local":  # there submitit makes a job deaf to SIGTERM
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        file = Path(HydraConfig.get().runtime.output_dir) / _name(OmegaConf.select(cfg, BLOCK, default=None))
        with claimed(file) as lock:
            found = read(file)
            if found is None or found.status != "done":
                found = self._drawn(cfg, file, lock)
            lock.truncate(0)
        return found.value

    def _drawn(self, cfg: DictConfig, file: Path, lock: Any) -> Outcome:
        lock.truncate(0)
        lock.write(json.dumps(_lifeline.owner()))
        lock.flush()
        start = time.monotonic()
        try:
            value = self.task(cfg)
        except (Exception, SystemExit) as error:
            code = error.code if isinstance(error, SystemExit) else None
            if code in STARTED_AGAIN or (self.apart and code in ENDED_BY_A_SIGNAL):
                raise
            failure = Left(code) if isinstance(error, SystemExit) else error
            _leave(file, Outcome("failed", None, told(failure), time.monotonic() - start), failure)
            lock.truncate(0)
            traceback.clear_frames(error.__traceback__)  # Hydra keeps the error, and with it a failed point's tensors
            raise failure from failure.__cause__
        outcome = Outcome("done", value, "", time.monotonic() - start)
        _leave(file, outcome)
        return outcome


@contextmanager
def claimed(file: Path) -> Iterator[Any]:
    """Hold the lock beside a point's outcome, which the kernel drops when the process dies; yields its file.

    While a point is drawn the file says by whom: what is left there was cut short.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with _lock_of(file).open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def ending(code: int) -> str:
    """What an exit code says: `its process was ended by SIGKILL (out of memory?)`."""
    if code < 0 or code > 128:
        number = -code if code < 0 else code - 128
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return f"its process was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    return f"its process left with exit code {code}"


def write(file: Path, outcome: Outcome, error: BaseException | None = None) -> None:
    write_json(file, _row(outcome, error))


def _leave(file: Path, outcome: Outcome, error: BaseException | None = None) -> None:
    """Write the outcome, or have it written by the process that journals the point: never before the journal."""
    if _reports.send is None:
        write(file, outcome, error)
    else:
        _reports.send(_reports.Told(file, _row(outcome, error)))


def _row(outcome: Outcome, error: BaseException | None) -> dict[str, Any]:
    trace = "".join(traceback.format_exception(error)) if error is not None else ""
    row = {"status": outcome.status, "value": outcome.value, "error": outcome.error, "seconds": outcome.seconds}
    return {**row, "trace": "" if isinstance(error, AmbergradeError) else trace}


def read(file: Path) -> Outcome | None:
    """The outcome in a file that `write` wrote whole; None where there is none."""
    if not file.exists():
        return None
    row = json.loads(file.read_text())
    return Outcome(row["status"], row["value"], row["error"], row["seconds"])


def told(error: BaseException) -> str:
    """`BadInput: first line`."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def failure_table(trials: Sequence[Trial]) -> str:
    """Every failed point with its error, one a line; empty without any."""
    failed = [trial for trial in trials if trial.outcome is not None and trial.outcome.status == "failed"]
    if not failed:
        return ""
    width = max(len(trial.label) for trial in failed)
    lines = [f"  {trial.label:<{width}}  {trial.outcome.error}" for trial in failed if trial.outcome]
    return "\n".join([f"{len(failed)} of {len(trials)} points failed:", *lines])


def _lock_of(file: Path) -> Path:
    return file.with_name(f".{file.name}.lock")


def _name(block: Sequence[int] | None) -> str:
    return "outcome.json" if block is None else f"outcome-{block[0]}-{block[1]}.json"
