"""Makes a lost MLflow database anew: from what it was told (`told`), and, where that is missing too, from the records.

Run ids are MLflow's to give, so a rebuilt run has a new one; its key, times, numbers, files, models and place in the
tree are the old ones. What MLflow has already is left alone: the same command again, after a kill, goes on.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlparse

from ambergrade.errors import BadInput, BadSetting
from ambergrade.nouns import Measurement
from ambergrade.store import Store, link_or_copy
from ambergrade.track import process, registry, told
from ambergrade.track.database import (
    MlflowClient,
    MlflowException,
    database_file,
    download_artifacts,
    entities,
    open_client,
    tracking_uri,
)
from ambergrade.track.journal import Journal
from ambergrade.track.run import METRICS_PER_CALL, PARAMS_PER_CALL, Run

T = TypeVar("T")
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
    files = [file for file in sorted(told.folder(root).glob("*.jsonl")) if file.stem != told.REGISTRY]
    every = {run.id: run for run in map(told.read_run, files) if run is not None}
    # one that a killed rebuild began stands for a run that is still told by its first lines
    runs = [run for run in every.values() if run.tags.get(MARK) not in every]
    _refuse_open(runs)
    done = Rebuilt()
    work = _Rebuilding(root, done, {run.tags[MARK]: run.id for run in runs if MARK in run.tags})
    try:
        for run in sorted(runs, key=lambda run: (run.start, run.id)):  # a parent starts before its children
            work.run(run)
        work.registry(told.folder(root) / f"{told.REGISTRY}.jsonl")
        work.records({run.tags["ag.key"] for run in runs})
    except MlflowException as error:
        raise BadInput(f"MLflow refused a part of the record: {str(error).splitlines()[0]}") from error
    return done


def _refuse_open(runs: Iterable[told.ToldRun]) -> None:
    for run in runs:
        here = run.tags.get("ag.host") == process.owner()["ag.host"]
        if run.status == "RUNNING" and here and not process.is_dead(run.tags):
            raise BadSetting(
                f"The run '{run.name}' is open in process {run.tags['ag.process'].split()[0]}.\n"
                "Let it end, or end it, before the database is made anew."
            )


class _Rebuilding:
    def __init__(self, root: Path, done: Rebuilt, ids: Mapping[str, str]) -> None:
        self.root = root
        self.done = done
        self._journals: dict[str, Journal] = {}
        self._ids = dict(ids)
        """Of runs: what they were called to what they are called."""

    def journal(self, experiment: str) -> Journal:
        if experiment not in self._journals:
            self._journals[experiment] = self._sound(Journal.open(self.root, experiment))
        return self._journals[experiment]

    def run(self, old: told.ToldRun) -> None:
        """One run with all that hangs on it."""
        journal = self.journal(old.experiment)
        client = self._client(journal)
        tags = dict(old.tags)
        for name in ("mlflow.parentRunId", "ag.origin"):
            if name in tags:
                tags[name] = self._ids.get(tags[name], tags[name])
        found = self._find(journal, tags)
        began = found is not None and found.info.status == "RUNNING" and MARK in found.data.tags  # and was killed
        if found is not None and not began:
            self._leave(old, found)
            return
        tags[MARK] = old.id
        if found is not None:
            made = found.info
            _lines(self.root, made.run_id).unlink(missing_ok=True)
        else:
            made = client.create_run(journal.experiment_id, start_time=old.start, tags=tags, run_name=old.name).info
        about = {"id": made.run_id, "name": old.name, "experiment": old.experiment, "start": old.start}
        journal.note(made.run_id, run={**about, "artifacts": made.artifact_uri}, tags=tags)
        run = Run(journal, made.run_id, old.name, tags["ag.key"], done=False, resumed=began)
        self._numbers(journal, old, made.run_id, began)
        for inputs in old.datasets:
            run.datasets(inputs["digests"], inputs["context"])
        self._files(run, client, old, made.artifact_uri)
        for model in old.models:
            self._model(run, model, _local(old.artifacts))
        for view in old.views:
            run.view(**view)
        self._sound(journal)
        self._ids[old.id] = made.run_id
        if old.status == "RUNNING" and not process.is_dead(old.tags):  # on another machine, which goes on or is reaped
            return
        status, end = ("KILLED", old.start) if old.status == "RUNNING" else (old.status, old.end)
        journal.note(made.run_id, status=status, end=end)
        client.set_terminated(made.run_id, status, end)
        self.done.runs += 1
        self._forget(old)

    def _find(self, journal: Journal, tags: Mapping[str, str]) -> entities.Run | None:
        """The run that MLflow has, by its key and its place in the tree."""
        names = ("ag.key", "ag.kind", "mlflow.parentRunId")
        condition = " and ".join(f"tags.\"{name}\" = '{tags[name]}'" for name in names if name in tags)
        return next(iter(journal.search(condition)), None)

    def _leave(self, old: told.ToldRun, found: entities.Run) -> None:
        self._ids[old.id] = found.info.run_id
        self.done.there += 1
        if found.data.tags.get(MARK) == old.id:
            self._forget(old)  # a kill came between its end and this

    def _numbers(self, journal: Journal, old: told.ToldRun, run_id: str, began: bool) -> None:
        """Settings and measurements, with their own times; those that a killed rebuild wrote are not written twice."""
        client = self._client(journal)
        known = set()
        for key in {key for key, *_ in old.metrics} if began else ():
            known |= {(key, point.step, point.timestamp) for point in client.get_metric_history(run_id, key)}
        for params in _parts(list(old.params.items()), PARAMS_PER_CALL):
            journal.note(run_id, params=dict(params))
            client.log_batch(run_id, params=[entities.Param(*pair) for pair in params])
        for rows in _parts(old.metrics, METRICS_PER_CALL):
            points = [entities.Metric(key, value, when, step) for key, value, step, when in rows]
            journal.note(run_id, **told.rows(metrics=points))
            news = [point for point in points if (point.key, point.step, point.timestamp) not in known]
            client.log_batch(run_id, metrics=news)

    def _files(self, run: Run, client: MlflowClient, old: told.ToldRun, place: str) -> None:
        """Link or send the run's files to their new place. A stage's pictures are in the store too, in one strip."""
        source, target = _local(old.artifacts), _local(place)
        with tempfile.TemporaryDirectory() as folder:
            if source is None:
                if not old.files:
                    return
                try:
                    source = Path(download_artifacts(old.artifacts, None, None, folder, client.tracking_uri))
                except MlflowException as error:
                    self.done.missing.append(f"files of {old.name}: {str(error).splitlines()[0]}")
                    return
            if not source.is_dir():
                if not old.files:
                    return
                strip = self._strip(run.key)
                more = "; its pictures are the store's" if strip else ""
                self.done.missing.append(f"{len(old.files)} files of {old.name}: {source} is gone{more}")
                if strip:
                    run.picture("pictures", strip)
                return
            run._journal.note(run.id, files=old.files)
            if target is None:
                client.log_artifacts(run.id, str(source))
            else:
                for file in sorted(path for path in source.rglob("*") if path.is_file()):
                    link_or_copy(file, target / file.relative_to(source))
            if (source / "images").is_dir():
                run.tags({"mlflow.loggedImages": "True"})

    def _strip(self, identity: str) -> Path | None:
        """The pictures that a stage's record names, if the store has them."""
        store = Store(self.root / "mlruns" / "store")
        for file in (self.root / "mlruns" / "records").glob(f"*/{identity}.json"):
            strip = json.loads(file.read_text())["files"].get("pictures")
            if strip and store.holds(strip):
                return store.path(strip)
        return None

    def _model(self, run: Run, model: Mapping[str, Any], files: Path | None) -> None:
        """Enter a model again; its checkpoint is where it was, or at least linked among the old model's files."""
        before = None if files is None else files.parents[1] / "models" / model["id"]
        linked = [] if before is None else sorted((before / "artifacts").glob("*.safetensors"))
        path = next((place for place in (Path(model["path"]), *linked) if place.is_file()), None)
        if path is None:
            self.done.missing.append(
                f"model {model['name']} of {run.name}: {model['path']} is gone, and so is its link"
            )
            return
        given = {key: value for key, value in model.items() if key not in ("id", "path", "metrics")}
        numbers = {key: Measurement(*m) if isinstance(m, list) else m for key, m in model["metrics"].items()}
        found = run.model(**given, path=path, metrics=numbers)
        self.done.models += 1
        if before is not None and found != model["id"] and path.stat().st_nlink > 1:  # never the only name of the bytes
            shutil.rmtree(before, ignore_errors=True)

    def registry(self, file: Path) -> None:
        """What gates decided, in the order of time; a model that carries what they said last is left alone."""
        events = told.lines(file) if file.is_file() else []
        for name in dict.fromkeys(event["model"] for event in events):
            mine = [event for event in events if event["model"] == name]
            journal = self.journal(mine[0]["experiment"])
            client = self._client(journal)
            last = registry.version(client, name, mine[-1]["digest"])
            if last is not None and registry.results(mine[-1]["gates"]).items() <= last.tags.items():
                continue
            for event in mine:
                judged = registry.version(client, name, event["digest"])
                if judged is None:
                    self.done.missing.append(f"gates of {name}: no version has the weights {event['digest'][:12]}")
                    continue
                for tag, value in event["tags"].items():
                    client.set_model_version_tag(name, str(judged.number), tag, value)
                for tag in registry.by_people(judged.tags).keys() - event["tags"].keys():  # taken back since
                    client.delete_model_version_tag(name, str(judged.number), tag)
                registry.decide(client, name, event["digest"], event["gates"])

    def records(self, known: set[str]) -> None:
        """Stages that MLflow was never told of (it was down, or the lines are gone), by their records alone."""
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
                record = json.loads(file.read_text())
                with journal.run(
                    _title(record), key=record["identity"], kind=record["stage"], parent=parent, params=_point(record)
                ) as run:
                    self.done.from_records += 1
                    run.metrics({"seconds": record["seconds"], **_numbers(record)})
                    run.datasets(record["inputs"])
                    strip = self._strip(record["identity"])
                    if strip:
                        run.picture("pictures", strip)
        self._sound(journal)

    def _forget(self, old: told.ToldRun) -> None:
        """Drop a local run's old lines and files, which are at their new place; a move to a server drops none."""
        journal, source = self.journal(old.experiment), _local(old.artifacts)
        if database_file(journal.uri) is None or source is None or source.parent.name != old.id:
            return
        _lines(self.root, old.id).unlink(missing_ok=True)
        shutil.rmtree(source.parent, ignore_errors=True)

    def _client(self, journal: Journal) -> MlflowClient:
        assert journal.client is not None
        return journal.client

    def _sound(self, journal: Journal) -> Journal:
        if journal.client is None:
            raise BadInput("The database is not whole.\n" + "\n".join(journal.troubles))
        self.done.missing += journal.troubles
        journal.troubles.clear()
        return journal


def _lines(root: Path, run_id: str) -> Path:
    return told.folder(root) / f"{run_id}.jsonl"


def _local(uri: str) -> Path | None:
    """The folder behind a `file:` URI or a plain path; None for a server's."""
    parts = urlparse(uri)
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") else None


def _parts(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


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
