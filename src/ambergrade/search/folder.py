"""The folder of a sweep: which points were proposed, and how each ended. Killed commands go on from it.

<sweep>/<point>/point.json                      what it is; written before it is evaluated
<sweep>/<point>/outcome.json                    how it ended; an error is told whole, with its traceback
<sweep>/<point>/prompts-12-24/{point,outcome}.json      the same of a race's rung
<sweep>/failures.txt                            every failed point with its whole reason
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ambergrade.identity import digest
from ambergrade.search.driver import Job, Outcome, Swept
from ambergrade.search.points import Point, plain
from ambergrade.store import read_json, write_json


@dataclass(frozen=True)
class SweepFolder:
    root: Path

    def place(self, job: Job) -> Path:
        """The folder of a job: the same point has the same, in whatever order its names come."""
        point = {name: plain(value) for name, value in job.point.items()}
        place = self.root / digest({"point": point, "cheap": True} if job.cheap else point)[:16]
        return place if job.block is None else place / f"prompts-{job.block[0]}-{job.block[1]}"

    def begin(self, job: Job) -> None:
        """Note that a job was proposed, and forget how it ended before."""
        place = self.place(job)
        (place / "outcome.json").unlink(missing_ok=True)
        if read_json(place / "point.json") is None:
            number = sum(1 for _ in self.root.glob("*/point.json"))
            row = {"number": number, "label": job.label, "point": job.point, "block": job.block, "cheap": job.cheap}
            write_json(place / "point.json", row)

    def was_begun(self, job: Job) -> bool:
        return read_json(self.place(job) / "point.json") is not None

    def past(self) -> list[Point]:
        """The points that were proposed whole, in their order."""
        rows = [read_json(file) for file in self.root.glob("*/point.json")]
        return [row["point"] for row in sorted(filter(None, rows), key=lambda row: row["number"])]

    def outcome(self, job: Job) -> Outcome | None:
        """How a job ended; None where it did not."""
        return read_outcome(self.place(job))

    def keep(self, job: Job, outcome: Outcome) -> None:
        """Note how a job ended, where its worker has not done so already: what is finished is written once."""
        if self.outcome(job) != outcome:
            write_outcome(self.place(job), outcome)

    def keep_failures(self, swept: Swept) -> None:
        """Write every failed point with its whole reason to failures.txt; none: no file."""
        file = self.root / "failures.txt"
        file.unlink(missing_ok=True)
        texts = [f"{trial.job.label}\n{trial.outcome.reason}\n{trial.outcome.trace}" for trial in swept.failed]
        if texts:
            file.write_text("\n".join(texts))

    @contextmanager
    def alone(self, say: Callable[[str], None] = print) -> Iterator[None]:
        """One command at a time draws a sweep; the kernel drops the lock when it dies."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / ".lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                say(f"  process {lock.read().strip()} draws this sweep now; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            lock.truncate(0)
            lock.write(f"{os.getpid()} on {socket.gethostname()}")
            lock.flush()
            yield


def job_of(place: Path) -> Job:
    """The job whose folder this is."""
    row = read_json(place / "point.json")
    block = row["block"]
    return Job(row["label"], row["point"], None if block is None else (block[0], block[1]), row["cheap"])


def write_outcome(place: Path, outcome: Outcome) -> None:
    write_json(place / "outcome.json", {**asdict(outcome), "status": "done" if outcome.done else "failed"})


def read_outcome(place: Path) -> Outcome | None:
    """The outcome of a job's folder; None where there is none."""
    row = read_json(place / "outcome.json")
    if row is None:
        return None
    return Outcome(row["done"], row["value"], row["reason"], row["trace"], row["seconds"])
