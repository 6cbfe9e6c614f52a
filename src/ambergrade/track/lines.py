"""Keeps what MLflow was told as lines of JSON beside the records; a lost database is made anew from them.

<root>/mlruns/records/journal/<run id>.jsonl     the first line opens the run, each further line adds to it
<root>/mlruns/records/journal/registry.jsonl     what gates decided about registered models

A line is written before MLflow hears of it and is one write, so a kill leaves whole lines. Paths below the root are
relative to it, so that a root can be moved and copied. Files (pictures, texts) are not in here: they lie among the
artifacts, which a lost database does not take along.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

if TYPE_CHECKING:
    from ambergrade.track.database import entities

REGISTRY = "registry"


def folder(root: Path) -> Path:
    """Return the folder that holds the lines of a root."""
    return root / "mlruns" / "records" / "journal"


def append(root: Path, name: str, event: Mapping[str, Any]) -> None:
    """Add a line to a run's file, or to the registry's. Raises OSError, also where only a part could be written."""
    line = json.dumps(event, default=str).encode() + b"\n"  # ASCII: no character can break a line or the encoding
    path = folder(root) / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":  # a full disk cut the last line
            line = b"\n" + line
        if os.write(file, line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(file)


def read(file: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a file; what a full disk cut short is left out."""
    found = []
    for line in file.read_bytes().split(b"\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            found.append(event)
    return found


def batch(
    metrics: Iterable[entities.Metric] = (), params: Mapping[str, str] | None = None, tags: Any = None
) -> dict[str, Any]:
    """Return measurements as (key, value or null for NaN, step, milliseconds), parameters and tags as one event."""
    rows = [(m.key, None if math.isnan(m.value) else m.value, m.step, m.timestamp) for m in metrics]
    event = {"metrics": rows, "params": dict(params or {}), "tags": dict(tags or {})}
    return {name: value for name, value in event.items() if value}


def relative(path: Path, root: Path) -> str:
    """Return a path as a line holds it: relative to the root where it lies below it."""
    whole = path.resolve()
    return str(whole.relative_to(root.resolve()) if whole.is_relative_to(root.resolve()) else whole)


def relative_uri(uri: str, root: Path) -> str:
    """Return the place of a run's files as a line holds it; a server's address stays as it is."""
    path = local_path(uri)
    return uri if path is None else relative(path, root)


def local_path(uri: str) -> Path | None:
    """Return the folder behind a `file:` address or a plain path; None for a server's."""
    parts = urlparse(uri)
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") else None


@dataclass
class RunLines:
    """A run as its lines tell it."""

    id: str
    name: str
    experiment: str
    start: int
    """Milliseconds since the epoch, as all times here."""
    artifacts: str
    """Folder of its files, relative to the root; a server's address; or, from earlier versions, a `file:` address."""
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)
    """Key, value, step, time."""
    datasets: list[dict[str, Any]] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    views: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    """Names of its artifacts, without their content."""
    status: str = "RUNNING"
    end: int | None = None
    ended: bool = False
    """It has ended once, and may be open again."""


def read_run(file: Path) -> RunLines | None:
    """Return a run from its file; None where the first line is not whole or not this file's."""
    opened, *more = read(file) or [{}]
    if not isinstance(opened.get("run"), dict) or opened["run"].get("id") != file.stem:
        return None
    if not re.fullmatch(r"[\w-]+", file.stem) or "ag.key" not in opened.get("tags", {}):
        return None
    run = RunLines(**opened["run"], tags=dict(opened["tags"]))
    for event in more:
        run.tags |= event.get("tags", {})
        for tag in event.get("untag", ()):
            run.tags.pop(tag, None)
        run.params |= event.get("params", {})
        rows = event.get("metrics", ())
        run.metrics += [(key, math.nan if value is None else value, step, when) for key, value, step, when in rows]
        for kind in ("datasets", "models", "views", "files"):
            getattr(run, kind).extend(event.get(kind, ()))
        if "status" in event:
            run.status, run.end = event["status"], event.get("end")
            run.ended |= run.status != "RUNNING"
    return run
