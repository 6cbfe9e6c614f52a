"""What MLflow was told, kept beside the records: one file of JSON lines a run, from which a lost database is rebuilt.

<root>/mlruns/records/journal/<run id>.jsonl     the first line opens the run, each further line adds to it
<root>/mlruns/records/journal/registry.jsonl     what gates decided about registered models

A line is written before MLflow hears of it and is one write, so a kill leaves whole lines. Files (pictures, texts) are
not in here: they lie among the artifacts, which a lost database does not take along.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REGISTRY = "registry"


def folder(root: Path) -> Path:
    """Where the lines of a root lie."""
    return root / "mlruns" / "records" / "journal"


def append(root: Path, name: str, event: Mapping[str, Any]) -> None:
    """Add a line to a run's file, or to the registry's. Raises OSError."""
    line = json.dumps(event, ensure_ascii=False, default=str) + "\n"
    place = folder(root) / f"{name}.jsonl"
    try:
        file = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except FileNotFoundError:
        place.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(place, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a file; one that a full disk cut short is left out."""
    found = []
    for line in file.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def rows(metrics: Any = (), params: Any = (), tags: Any = ()) -> dict[str, Any]:
    """MLflow's entities as a line holds them: (key, value or null for NaN, step, milliseconds), and mappings."""
    event: dict[str, Any] = {}
    if metrics:
        told = [(m.key, None if math.isnan(m.value) else m.value, m.step, m.timestamp) for m in metrics]
        event["metrics"] = told
    if params:
        event["params"] = {param.key: param.value for param in params}
    if tags:
        event["tags"] = {tag.key: tag.value for tag in tags}
    return event


@dataclass
class ToldRun:
    """A run as its lines tell it."""

    id: str
    name: str
    experiment: str
    start: int
    """Milliseconds since the epoch, as all times here."""
    artifacts: str
    """URI of its files."""
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: list[tuple[str, float, int, int]] = field(default_factory=list)
    """Key, value, step, time."""
    datasets: list[dict[str, Any]] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    views: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    """Names of its artifacts; the artifacts themselves are not told."""
    status: str = "RUNNING"
    end: int | None = None

    @property
    def parent(self) -> str:
        """Id of the run above it; "" for none."""
        return self.tags.get("mlflow.parentRunId", "")


def read_run(file: Path) -> ToldRun | None:
    """A run from its file; None where even the first line is not whole."""
    opened, *more = lines(file) or [{}]
    if "run" not in opened:
        return None
    run = ToldRun(**opened["run"], tags=dict(opened["tags"]))
    for event in more:
        run.tags |= event.get("tags", {})
        for tag in event.get("untag", ()):
            run.tags.pop(tag, None)
        run.params |= event.get("params", {})
        told = event.get("metrics", ())
        run.metrics += [(key, math.nan if value is None else value, step, when) for key, value, step, when in told]
        for kind in ("datasets", "models", "views", "files"):
            getattr(run, kind).extend(event.get(kind, ()))
        if "status" in event:
            run.status, run.end = event["status"], event.get("end")
    return run
