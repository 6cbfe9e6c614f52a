"""What became of a point, kept in its own folder by the job itself: a killed sweep loses only what it was drawing."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from ambergrade.errors import AmbergradeError
from ambergrade.search.points import Point
from ambergrade.store import write_json

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

    def recall(self) -> bool:
        """Take the outcome from the folder; True if the point is done. A failure is forgotten: it is tried again."""
        found = read(self.file)
        self.outcome = found
        return found is not None and found.status == "done"

    def fail(self, error: BaseException) -> None:
        """Note a failure that the job could not note itself."""
        self.outcome = Outcome("failed", None, told(error))
        write(self.file, self.outcome, error)


class Recorded:
    """A task that leaves its outcome in its job's folder."""

    def __init__(self, task: Callable[[DictConfig], Any]) -> None:
        self.task = task

    def __call__(self, cfg: DictConfig) -> Any:
        block = OmegaConf.select(cfg, BLOCK, default=None)
        file = Path(HydraConfig.get().runtime.output_dir) / _name(block)
        start = time.monotonic()
        try:
            value = self.task(cfg)
        except Exception as error:
            write(file, Outcome("failed", None, told(error), time.monotonic() - start), error)
            traceback.clear_frames(error.__traceback__)  # Hydra keeps the error, and with it a failed point's tensors
            raise
        write(file, Outcome("done", value, "", time.monotonic() - start))
        return value


def write(file: Path, outcome: Outcome, error: BaseException | None = None) -> None:
    trace = "".join(traceback.format_exception(error)) if error is not None else ""
    row = {"status": outcome.status, "value": outcome.value, "error": outcome.error, "seconds": outcome.seconds}
    write_json(file, {**row, "trace": "" if isinstance(error, AmbergradeError) else trace})


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


def _name(block: Sequence[int] | None) -> str:
    return "outcome.json" if block is None else f"outcome-{block[0]}-{block[1]}.json"
