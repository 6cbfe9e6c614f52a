"""A journal that another process keeps: what a drawing process says is sent there, and done there in the same order.

    drawing    journal = Relayed(send, root)      with journal.run(...) as run: run.metrics(...)
    keeping    scribe = Scribe(journal)           scribe.hear(message), for every message

The drawing process needs no MLflow, whose import takes seconds, and does not wait for its database.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from ambergrade.track import process
from ambergrade.track.journal import Journal
from ambergrade.track.provenance import cuda
from ambergrade.track.run import Number, Run

_numbers = itertools.count()
"""Of this process's runs."""


@dataclass(frozen=True)
class Opened:
    """A run is asked for."""

    number: int
    name: str
    key: str
    kind: str
    above: int | tuple[str, str, str] | None
    """Its parent: a run of this process by number, or one that is kept anyway by id, name and key."""
    params: Mapping[str, Any]
    tags: Mapping[str, Any]


@dataclass(frozen=True)
class Said:
    """Something is told to an open run."""

    number: int
    method: str
    given: tuple[Any, ...] = ()


Message = Opened | Said


class Relayed(Journal):
    """The drawing side."""

    def __init__(self, send: Callable[[Message], None], root: Path) -> None:
        super().__init__(None, "", "", root)
        self._send = send

    def _begin(
        self,
        name: str,
        key: str,
        kind: str,
        parent: Run | None,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        start: float | None = None,
        end: float | None = None,
    ) -> Run:
        run = RelayedRun(self, name, key, self._send)
        above: int | tuple[str, str, str] | None = None
        if isinstance(parent, RelayedRun):
            above = parent.number
        elif parent is not None and parent.id:
            above = (parent.id, parent.name, parent.key)
        here = {**cuda(), **tags, **process.owner()}  # what only the process that computes can see
        self._send(Opened(run.number, name, key, kind, above, dict(params), here))
        return run


class RelayedRun(Run):
    """A run that only sends; it never learns whether it was finished before."""

    def __init__(self, journal: Journal, name: str, key: str, send: Callable[[Message], None]) -> None:
        super().__init__(journal, "", name, key, done=False, resumed=False)
        self.number = next(_numbers)
        self._send = send

    def metrics(self, values: Mapping[str, Number], step: int | None = None) -> None:
        self._say("metrics", dict(values), step)

    def params(self, values: Mapping[str, Any]) -> None:
        self._say("params", dict(values))

    def tags(self, values: Mapping[str, Any]) -> None:
        self._say("tags", dict(values))

    def note(self, markdown: str) -> None:
        self._say("note", markdown)

    def picture(self, key: str, picture: Image.Image | Path, step: int = 0) -> None:
        pixels = picture if isinstance(picture, Image.Image) else Image.open(picture)
        self._say("picture", key, pixels.copy(), step)  # the file may be gone when it is heard

    def text(self, text: str, file: str) -> None:
        self._say("text", text, file)

    def datasets(self, digests: Mapping[str, str], context: str = "input") -> None:
        self._say("datasets", dict(digests), context)

    def hit(self) -> None:
        self._say("hit")

    def end(self, status: str, reason: str = "", trace: str = "") -> None:
        self._say("end", status, reason, trace)

    def file(self, path: Path, folder: str = "") -> None:
        self._not_sent("file")

    def provenance(self, settings: Mapping[str, Any], overrides: Sequence[str] = ()) -> None:
        self._not_sent("provenance")

    def model(self, *given: Any, **named: Any) -> NoReturn:
        self._not_sent("model")

    def view(self, *given: Any, **named: Any) -> NoReturn:
        self._not_sent("view")

    def _say(self, method: str, *given: Any) -> None:
        self._send(Said(self.number, method, given))

    def _not_sent(self, method: str) -> NoReturn:
        raise TypeError(f"Run.{method} looks at files or answers: call it where the journal is kept.")


class Scribe:
    """The keeping side: does to its journal what one drawing process says."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._runs: dict[int, Run] = {}

    def hear(self, message: Message) -> None:
        """Do what a message says. Never raises for MLflow's sake."""
        if isinstance(message, Opened):
            about = (message.name, message.key, message.kind, self._parent(message.above))
            given = (message.params, message.tags)
            self._runs[message.number] = self._journal._begin(*about, *given)
            return
        run = self._runs.get(message.number)
        if run is None:  # a signal came while it was opened; it ends with its process
            return
        getattr(run, message.method)(*message.given)
        if message.method == "end":
            del self._runs[message.number]

    def lose(self) -> None:
        """The drawing process is gone: what it left open ends as KILLED."""
        for run in reversed(self._runs.values()):
            run.end("KILLED", "its process is gone")
        self._runs.clear()

    def _parent(self, above: int | tuple[str, str, str] | None) -> Run | None:
        if isinstance(above, tuple):
            return self._journal.attached(*above)
        return None if above is None else self._runs.get(above)
