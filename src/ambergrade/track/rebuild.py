"""Makes a lost MLflow database anew: from the lines of what it was told, and where those are missing, from the records.

Run ids are MLflow's to give, so a rebuilt run has a new one; its key, times, numbers, files, models and place in the
tree are the old ones. What MLflow has already is left alone, so the same command again, after a kill, goes on. Files
are linked or copied, never moved, and nothing outside the root is read as a run's file or changed: a copied root whose
lines name the old one is rebuilt from its own artifacts.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ambergrade.errors import BadInput, BadSetting
from ambergrade.nouns import Measurement
from ambergrade.store import Store, link_or_copy, read_json
from ambergrade.track import lines, process, registry
from ambergrade.track.database import (
    MlflowClient,
    MlflowException,
    artifact_root,
    download_artifacts,
    entities,
    open_client,
    tracking_uri,
)
from ambergrade.track.journal import Journal
from ambergrade.track.run import METRICS_PER_CALL, PARAMS_PER_CALL, Run, first_line, parts

MARK = "ag.rebuilt_from"
"""Tag of a rebuilt run: the id it had."""


@dataclass
class Rebuilt:
    """What was done."""

    runs: int = 0
    there: int = 0
    """Runs that MLflow had."""
    models: int = 0
    from_records: int = 0
    """Runs that only the stages' records knew."""
    missing: list[str] = field(default_factory=list)
    """What could not be had, one line each."""


def rebuild(root: Path) -> Rebuilt:
    """Tell MLflow everything that it was told before and does not have.

    Raises BadSetting while a run is open on this machine, BadInput where MLflow cannot be opened or stops answering.
    """
    files = [file for file in sorted(lines.folder(root).glob("*.jsonl")) if file.stem != lines.REGISTRY]
    every = {run.id: run for run in map(lines.read_run, files) if run is not None}
    made = [run for run in every.values() if run.tags.get(MARK) in every]  # by a rebuild; its first lines are there too
    done = [run for run in made if run.ended and lines.local_path(run.artifacts) is not None]
    left_out = {run.tags[MARK] for run in done} | {run.id for run in made if run not in done}
    runs = [run for run in every.values() if run.id not in left_out]
    _refuse_open(runs)
    work = _Rebuilding(root.resolve(), {run.tags[MARK]: run.id for run in runs if MARK in run.tags})
    work.begun = {run.id for run in made if not run.ended}
    try:
        for run in sorted(runs, key=lambda run: (run.start, run.id)):  # a parent starts before its children
            work.run(run)
        work.registry(lines.folder(root) / f"{lines.REGISTRY}.jsonl")
        work.records({run.tags["ag.key"] for run in runs})
    except MlflowException as error:
        raise BadInput(f"MLflow refused a part of the record: {first_line(error)}") from error
    return work.done


def _refuse_open(runs: Iterable[lines.RunLines]) -> None:
    for run in runs:
        here = run.tags.get("ag.host") == process.owner()["ag.host"]
        if run.status == "RUNNING" and here and not process.is_dead(run.tags):
            raise BadSetting(
                f"The run '{run.name}' is open in process {run.tags.get('ag.process', '?').split()[0]}.\n"
                "Let it end, or end it, before the database is made anew."
            )


class _Rebuilding:
    def __init__(self, root: Path, ids: Mapping[str, str]) -> None:
        self.root = root
        self.done = Rebuilt()
        self._journals: dict[str, Journal] = {}
        self._ids = dict(ids)
        """Old id to new one."""
        self.begun: set[str] = set()
        """Runs that a killed rebuild has begun."""

    def journal(self, experiment: str) -> Journal:
        if experiment not in self._journals:
            self._journals[experiment] = self._sound(Journal.open(self.root, experiment))
        return self._journals[experiment]

    def run(self, old: lines.RunLines) -> None:
        """Make one run with all that hangs on it; one that a killed rebuild began is thrown away first."""
        journal = self.journal(old.experiment)
        client = self._client(journal)
        tags = dict(old.tags)
        for name in ("mlflow.parentRunId", "ag.origin"):
            if name in tags:
                tags[name] = self._ids.get(tags[name], tags[name])
        for found in self._find(journal, tags):
            if found.info.run_id not in self.begun:
                self._ids[old.id] = found.info.run_id
                self.done.there += 1
                return
            client.delete_run(found.info.run_id)
        tags[MARK] = old.id
        made = client.create_run(journal.experiment_id, start_time=old.start, tags=tags, run_name=old.name).info
        about = {"id": made.run_id, "name": old.name, "experiment": old.experiment, "start": old.start}
        place = lines.relative_uri(made.artifact_uri, self.root)
        journal.note(made.run_id, run={**about, "artifacts": place}, tags=tags)
        run = Run(journal, made.run_id, old.name, tags["ag.key"], done=False, resumed=False)
        self._numbers(journal, old, made.run_id)
        for inputs in old.datasets:
            run.datasets(inputs["digests"], inputs["context"])
        self._files(run, client, old, made.artifact_uri)
        for model in old.models:
            self._model(run, model, old)
        for view in old.views:
            run.view(**view)
        run.flush()
        self._sound(journal)
        self._ids[old.id] = made.run_id
        if old.status == "RUNNING" and not process.is_dead(old.tags):  # on another machine, which goes on or is reaped
            return
        status, end = ("KILLED", old.start) if old.status == "RUNNING" else (old.status, old.end)
        client.set_terminated(made.run_id, status, end)
        journal.note(made.run_id, status=status, end=end)
        self.done.runs += 1
        if lines.local_path(made.artifact_uri) is not None:  # a move to a server leaves the local record as it is
            (lines.folder(self.root) / f"{old.id}.jsonl").unlink(missing_ok=True)

    def _find(self, journal: Journal, tags: Mapping[str, str]) -> list[entities.Run]:
        """Return the runs that MLflow has, by their key and their place in the tree."""
        names = ("ag.key", "ag.kind", "mlflow.parentRunId")
        condition = " and ".join(f"tags.\"{name}\" = '{tags[name]}'" for name in names if name in tags)
        return journal.search(condition)

    def _numbers(self, journal: Journal, old: lines.RunLines, run_id: str) -> None:
        """Log settings and measurements with their own times."""
        client = self._client(journal)
        for params in parts(list(old.params.items()), PARAMS_PER_CALL):
            journal.note(run_id, params=dict(params))
            client.log_batch(run_id, params=[entities.Param(*pair) for pair in params])
        for rows in parts(old.metrics, METRICS_PER_CALL):
            points = [entities.Metric(key, value, when, step) for key, value, step, when in rows]
            journal.note(run_id, **lines.batch(metrics=points))
            client.log_batch(run_id, metrics=points)

    def _folder(self, old: lines.RunLines) -> Path | None:
        """Return the folder of a run's files, below this root or beside its database; None for a server's.

        Earlier versions kept whole paths, and a copied root keeps those of the original: of such a path the last three
        parts count, `<experiment>/<run id>/artifacts`.
        """
        path = lines.local_path(old.artifacts)
        if path is None:
            return None
        if not path.is_absolute():
            return self.root / path
        base = lines.local_path(artifact_root(tracking_uri(self.root), self.root) or "")
        return (self.root / "mlruns" / "artifacts" if base is None else base).joinpath(*path.parts[-3:])

    def _inside(self, path: Path) -> bool:
        """Tell whether a path lies below this root or beside its database, links followed."""
        base = lines.local_path(artifact_root(tracking_uri(self.root), self.root) or "")
        return any(path.resolve().is_relative_to(place.resolve()) for place in (self.root, base) if place is not None)

    def _files(self, run: Run, client: MlflowClient, old: lines.RunLines, place: str) -> None:
        """Link or send the run's files to their new place. A stage's pictures are in the store too, in one strip."""
        source, target = self._folder(old), lines.local_path(place)
        with tempfile.TemporaryDirectory() as folder:
            if source is None:
                if not old.files:
                    return
                try:
                    source = Path(download_artifacts(old.artifacts, None, None, folder, client.tracking_uri))
                except MlflowException as error:
                    self.done.missing.append(f"files of {old.name}: {first_line(error)}")
                    return
            elif not source.is_dir() or not self._inside(source):
                if old.files:
                    self._without_files(run, old, source)
                return
            run.kept(old.files)
            if target is None:
                client.log_artifacts(run.id, str(source))
            else:
                for file in sorted(path for path in source.rglob("*") if path.is_file() and self._inside(path)):
                    link_or_copy(file, target / file.relative_to(source))
            if (source / "images").is_dir():
                run.tags({"mlflow.loggedImages": "True"})

    def _without_files(self, run: Run, old: lines.RunLines, source: Path) -> None:
        strip = self._strip(run.key)
        more = "; its pictures are the store's" if strip else ""
        self.done.missing.append(f"{len(old.files)} files of {old.name}: {source} is gone{more}")
        if strip:
            run.picture("pictures", strip)

    def _strip(self, identity: str) -> Path | None:
        """Return the pictures that a stage's record names, if the store has them."""
        store = Store(self.root / "mlruns" / "store")
        for file in (self.root / "mlruns" / "records").glob(f"*/{identity}.json"):
            strip = (read_json(file) or {"files": {}})["files"].get("pictures")
            if strip and store.holds(strip):
                return store.path(strip)
        return None

    def _model(self, run: Run, model: Mapping[str, Any], old: lines.RunLines) -> None:
        """Enter a model again; its checkpoint is where it was, or at least linked among the old model's files."""
        files, entered, source = self._folder(old), Path(model["path"]), Path(lines.local_path(old.artifacts) or "")
        if len(source.parents) > 5 and entered.is_relative_to(source.parents[4]):  # written by an earlier version
            entered = entered.relative_to(source.parents[4])
        found = (
            []
            if files is None
            else sorted((files.parents[1] / "models" / Path(model["id"]).name).rglob("*.safetensors"))
        )
        places = [self.root / entered, *found]
        path = next((file for file in places if file.is_file() and (entered.is_absolute() or self._inside(file))), None)
        if path is None:
            self.done.missing.append(f"model {model['name']} of {run.name}: {entered} is gone, and so is its link")
            return
        given = {key: value for key, value in model.items() if key not in ("id", "path", "metrics")}
        numbers = {key: Measurement(*m) if isinstance(m, list) else m for key, m in model["metrics"].items()}
        run.model(**given, path=path, metrics=numbers)
        self.done.models += 1

    def registry(self, file: Path) -> None:
        """Tell what gates decided, in the order of time; a model that carries what they said last is left alone."""
        events = lines.read(file) if file.is_file() else []
        for name in dict.fromkeys(event["model"] for event in events):
            mine = [event for event in events if event["model"] == name]
            client = self._client(self.journal(mine[0]["experiment"]))
            last = registry.version(client, name, mine[-1]["digest"], mine[-1].get("version"))
            if last is not None and registry.results(mine[-1]["gates"]).items() <= last.tags.items():
                continue
            for event in mine:
                judged = registry.version(client, name, event["digest"], event.get("version"))
                if judged is None:
                    self.done.missing.append(f"gates of {name}: no version has the weights {event['digest'][:12]}")
                    continue
                for tag, value in event["tags"].items():
                    client.set_model_version_tag(name, str(judged.number), tag, value)
                for tag in registry.by_people(judged.tags).keys() - event["tags"].keys():  # taken back since
                    client.delete_model_version_tag(name, str(judged.number), tag)
                registry.decide(client, name, event["digest"], event["gates"], judged.number)

    def records(self, known: set[str]) -> None:
        """Tell stages that MLflow never heard of (it was down, or the lines are gone), by their records alone."""
        files = sorted((self.root / "mlruns" / "records").glob("*/*.json"), key=lambda file: file.stat().st_mtime)
        client = open_client(tracking_uri(self.root))
        places = [found.experiment_id for found in client.search_experiments()]
        untold = []
        for file in files:
            if file.stem not in known:
                found = client.search_runs(places, f"tags.\"ag.key\" = '{file.stem}'", max_results=1)
                self.done.there += bool(found)
                untold += [] if found else [file]
        if not untold:
            return
        journal = self.journal("records")
        with journal.run("stages of the records", key="records", kind="records") as parent:
            for file in untold:
                record, end = read_json(file), file.stat().st_mtime
                if record is None:
                    self.done.missing.append(f"{file.name} is torn")
                    continue
                about = {"key": record["identity"], "kind": record["stage"], "params": _point(record)}
                times = {"start": end - record["seconds"], "end": end}
                with journal.run(_title(record), parent=parent, **about, **times) as run:
                    self.done.from_records += 1
                    run.metrics({"seconds": record["seconds"], **_numbers(record)})
                    run.datasets(record["inputs"])
                    strip = self._strip(record["identity"])
                    if strip:
                        run.picture("pictures", strip)
        self._sound(journal)

    def _client(self, journal: Journal) -> MlflowClient:
        assert journal.client is not None
        return journal.client

    def _sound(self, journal: Journal) -> Journal:
        if journal.client is None:
            raise BadInput("MLflow does not take the record.\n" + "\n".join(journal.troubles))
        self.done.missing += journal.troubles
        journal.troubles.clear()
        return journal


def _title(record: Mapping[str, Any]) -> str:
    point = _point(record)
    words = ", ".join(f"{name} {value:g}" for name, value in point.items() if isinstance(value, int | float))
    named = record["settings"].get("title", "") if isinstance(record["settings"], Mapping) else ""
    return words or named or f"{record['stage']} {record['identity'][:8]}"


def _point(record: Mapping[str, Any]) -> dict[str, Any]:
    settings = record["settings"]
    recipe = settings.get("recipe", settings) if isinstance(settings, Mapping) else {}
    return dict(recipe.get("coefficients") or {})


def _numbers(record: Mapping[str, Any]) -> dict[str, Measurement]:
    found = {}
    for metric, row in record["values"].get("aggregates", {}).items():
        value, low, high = (math.nan if row[name] is None else row[name] for name in ("value", "low", "high"))
        found[metric] = Measurement(value, low, high, row["n"], row["higher_is_better"])
    return found
