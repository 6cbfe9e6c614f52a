"""Runs stages: each once per identity, kept in the ledger, journaled, and told in one line.

    DATASET = Stage("dataset", 3)                                   # declared once, in the module of the stage
    task = DATASET.task(settings={…what…}, inputs={"database": sha256})
    done = context.run(task, "captions and buckets", work, journal=journal)

A task says what a result is made of; `task.find(ledger)` answers whether it is there, for the run itself as for a
preview. What does not change a result (device, workers, paths) is in neither.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ambergrade.chain.portable import ENVIRONMENT, is_portable
from ambergrade.chain.settings import Compute, Invocation
from ambergrade.errors import BadSetting
from ambergrade.identity import canonical_json, digest
from ambergrade.store import Finished, Ledger, Outputs
from ambergrade.track.journal import Journal, Run
from ambergrade.track.secrets import Secrets

Work = Callable[[Path, Run], Outputs]
"""Computes a stage's outputs, given a scratch folder that survives a kill and the stage's run in the journal."""


@dataclass(frozen=True)
class Stage:
    """Declares a kind of work and the version of its numbers: raise it when results change."""

    kind: str
    version: int

    def task(self, settings: object, inputs: Mapping[str, str]) -> Task:
        """One piece of this work. `settings`: what decides the result. `inputs`: names to digests.

        A portable process keeps results of its own, since the same work gives other bits elsewhere.
        """
        kernels = {"kernels": digest(ENVIRONMENT)} if is_portable() else {}
        return Task(self, settings, {**inputs, **kernels})


@dataclass(frozen=True)
class Task:
    """One piece of work by what it is made of."""

    stage: Stage
    settings: object
    inputs: Mapping[str, str]

    @cached_property
    def identity(self) -> str:
        return Ledger.identity(self.stage.kind, self.stage.version, self.settings, self.inputs)

    def find(self, ledger: Ledger) -> Finished | None:
        """The finished result, or None where it is not recorded, or its bytes are gone or damaged."""
        return ledger.find(self.stage.kind, self.identity, verify=True)


def _journal_nothing(run: Run, done: Finished) -> None:
    """A stage that shows nothing but its digests."""


@dataclass(frozen=True)
class Context:
    """What every stage of one command shares: the folder of results, the journal, and the run above."""

    root: Path
    journal: Journal
    parent: Run
    compute: Compute
    quiet: bool = False
    """Print no line a stage: another process tells them."""
    started: float = field(default_factory=time.time)

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.root / "mlruns")

    @cached_property
    def device(self) -> str:
        return torch_device(self.compute)

    def below(self, run: Run) -> Context:
        """The same context with `run` as the parent of what comes."""
        return replace(self, parent=run)

    def run(
        self,
        task: Task,
        title: str,
        work: Work,
        *,
        journal: Callable[[Run, Finished], None] = _journal_nothing,
        params: Mapping[str, object] | None = None,
        line: str = "",
        journaled_as: str = "",
    ) -> Finished:
        """Do a task unless its record is there; journal it either way, and print a line (`line`, else the title).

        `journaled_as`: the kind of its run in MLflow, where that is not the stage's.
        """
        shown = journaled_as or task.stage.kind
        with self.journal.run(title, key=task.identity, kind=shown, parent=self.parent, params=params) as run:
            done = self.ledger.once(
                task.stage.kind,
                task.stage.version,
                task.settings,
                task.inputs,
                lambda scratch: work(scratch, run),
                verify=True,  # a file that was read before and has not changed since is not read again
            )
            new = done.fresh or self.ledger.finished_since(task.stage.kind, task.identity, self.started)
            if not run.done:
                if not new:
                    run.hit()
                run.datasets(task.inputs)
                journal(run, done)
        self.tell(line or title, done.seconds if new else None, done.identity)
        return done

    def tell(self, title: str, seconds: float | None, identity: str) -> None:
        """Print a stage's line; no seconds: it was finished before."""
        if not self.quiet:
            how = "  finished before" if seconds is None else f"{seconds:8.1f} s"
            print(f"  {title:<34}{how:<18}{identity[:12]}", flush=True)

    def close(self) -> None:
        """Print what could not be journaled."""
        for trouble in self.journal.troubles:
            print(f"not journaled: {trouble}")


def open_journal(root: Path, name: str, settings: object, invocation: Invocation) -> Journal:
    """Open the journal of a command; the secrets among its settings are masked in whatever is written there."""
    return Journal.open(root, name, secrets=Secrets.of(_plain(settings), invocation.secret))


def record_command(run: Run, settings: object, invocation: Invocation) -> None:
    """Keep on a run what made it: the resolved settings, the command's overrides, code, lock and hardware."""
    if not run.done:
        run.provenance(_plain(settings), invocation.overrides)


def _plain(settings: object) -> dict[str, object]:
    """Settings as plain values."""
    found: dict[str, object] = json.loads(canonical_json(settings))
    return found


def use_threads(compute: Compute) -> None:
    """Give torch `compute.threads` threads."""
    if compute.threads:
        import torch

        torch.set_num_threads(compute.threads)


def torch_device(compute: Compute) -> str:
    """The device for torch: `auto` is the first GPU if there is one, else the CPU. Raises BadSetting for a lost GPU."""
    import torch

    found = torch.cuda.is_available()
    if compute.device == "cuda" and not found:
        raise BadSetting("compute.device is cuda, and torch finds no GPU here.\nGive compute=cpu, or mend the driver.")
    if compute.device != "auto":
        return compute.device
    return "cuda" if found else "cpu"
