"""Writes down what happens, in MLflow: runs, metrics with intervals, pictures, models and what they came from.

    journal = Journal.open(root, "gamma_tiny")
    with journal.run("gamma rev1", key=chain, kind="chain") as parent:
        with journal.run("a 0.8, b 0.5", key=point, kind="point", parent=parent, params={"a": 0.8}) as run:
            run.metrics({"clip_score": Measurement(0.31, 0.30, 0.32, 48)})

A run has a key. Asked for again, a finished run is not written again, and an unfinished one (killed,
failed) is taken up where it stopped. The journal decides nothing: if MLflow cannot be opened or stops
answering, the work goes on without it, one warning says so, and the same command journals it later.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ambergrade.track import bulk, database, process, registry, told
from ambergrade.track.database import artifact_root, locked, open_client, tracking_uri
from ambergrade.track.provenance import provenance
from ambergrade.track.registry import Version
from ambergrade.track.run import Run, first_line, verdict

if TYPE_CHECKING:
    from ambergrade.track.database import MlflowClient, entities

__all__ = ["Journal", "Run"]

log = logging.getLogger(__name__)

T = TypeVar("T")

ONE_CALL = {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"}
"""MLflow's error codes that concern one call only; with any other the journal closes."""


class Journal:
    """One MLflow experiment. Made by `Journal.open`; does nothing where MLflow could not be opened."""

    def __init__(
        self,
        client: MlflowClient | None,
        uri: str,
        experiment_id: str,
        root: Path,
        name: str = "",
        *,
        notes: bool = True,
    ) -> None:
        self.client = client
        self.uri = uri
        self.experiment_id = experiment_id
        self.root = root
        self.name = name
        """Of the experiment."""
        self._notes = notes
        self.troubles: list[str] = []
        """What could not be journaled, for the closing lines of a pipeline."""
        self._depth = 0

    @classmethod
    def open(cls, root: Path, experiment: str, note: str = "") -> Journal:
        """Open the experiment, making database and experiment where they are missing.

        The database is `<root>/mlruns/mlflow.db` with artifacts in `<root>/mlruns/artifacts`, unless
        `MLFLOW_TRACKING_URI` names another. Runs whose process died are closed as KILLED. `note` is
        markdown, shown on the experiment's page. Never raises for MLflow's sake.
        """
        from alembic.util.exc import CommandError
        from sqlalchemy.exc import SQLAlchemyError

        uri = tracking_uri(root)
        journal = cls(None, uri, "", root.resolve(), experiment)
        try:
            journal.client = open_client(uri)
        except (database.MlflowException, OSError, SQLAlchemyError, CommandError) as error:
            journal._close(f"opening {uri}", error)
        journal.attempt(f"opening the experiment {experiment}", lambda: journal._enter(experiment, note))
        return journal

    @contextmanager
    def run(
        self,
        name: str,
        *,
        key: str,
        kind: str,
        parent: Run | None = None,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> Iterator[Run]:
        """Open the run with this key below `parent`: a new one, an unfinished one again, or a finished one to look at.

        key: names what the run computes (a stage's identity); the same key is the same run.
        kind: what to filter by in the UI: chain, train, point, evaluation, release.

        Leaving by an exception or by SIGTERM ends the run as FAILED, by SIGINT as KILLED.
        """
        with ExitStack() as stack:
            if self._depth == 0:
                stack.enter_context(process.sigterm_raises())
            self._depth += 1
            stack.callback(self._leave)
            run = self._find_or_create(name, key, kind, parent, params or {}, tags or {})
            try:
                yield run
            except BaseException as error:
                run.end(*verdict(error))
                raise
            run.end("FINISHED")

    def attached(self, id: str, name: str, key: str) -> Run:
        """The open run of another process, to hang children below; its owner ends it."""
        return Run(self, id, name, key, done=False, resumed=True)

    def attempt(self, what: str, action: Callable[[], T]) -> T | None:
        """Do something to MLflow; what fails is told, never raised."""
        if self.client is None:
            return None
        from sqlalchemy.exc import SQLAlchemyError

        try:
            return action()
        except database.MlflowException as error:
            if error.error_code in ONE_CALL:
                self.tell(f"MLflow refused {what}: {first_line(error)}")
            else:
                self._close(what, error)
        except (OSError, SQLAlchemyError) as error:
            self._close(what, error)
        return None

    def version(self, name: str, digest: str) -> Version | None:
        """The version of a registered model with these weights."""
        return self.attempt(f"the versions of {name}", lambda: registry.version(self._client, name, digest))

    def champion(self, name: str) -> Version | None:
        """The version of a registered model that the alias `champion` points to."""
        return self.attempt(f"the champion of {name}", lambda: registry.champion(self._client, name))

    def rival(self, name: str, digest: str) -> Version | None:
        """The version that a candidate with these weights is measured against."""
        return self.attempt(f"the rival in {name}", lambda: registry.rival(self._client, name, digest))

    def gated(self, name: str, digest: str, gates: Mapping[str, tuple[bool, str]]) -> str:
        """Write what the gates said on the version, and move the alias `champion` by it; returns what became of it."""

        def decide() -> str:
            with locked(self.uri, self.root):
                judged = registry.version(self._client, name, digest)
                people = {} if judged is None else registry.by_people(judged.tags)
                self.note(told.REGISTRY, model=name, digest=digest, gates=gates, tags=people, experiment=self.name)
                return registry.decide(self._client, name, digest, gates)

        return self.attempt(f"the gates of {name}", decide) or "not journaled, so no champion"

    def note(self, name: str, **event: Any) -> None:
        """Keep what MLflow is about to be told, for `pipelines/reindex.py`."""
        if self.client is None or not self._notes:
            return
        try:
            told.append(self.root, name, {**event, "time": time.time_ns() // 1_000_000})
        except OSError as error:
            self._notes = False
            self.tell(f"{told.folder(self.root)} cannot be written: {error}. A lost database could not be rebuilt.")

    @property
    def _client(self) -> MlflowClient:
        assert self.client is not None
        return self.client

    def _enter(self, experiment: str, note: str) -> None:
        client = self._client
        with locked(self.uri, self.root):
            found = client.get_experiment_by_name(experiment)
            if found is None:
                base = artifact_root(self.uri, self.root)
                place = None if base is None else f"{base}/{re.sub(r'[^A-Za-z0-9_-]', '_', experiment)}"
                try:
                    self.experiment_id = client.create_experiment(experiment, artifact_location=place)
                except database.MlflowException as error:  # a command on another machine, on the same server
                    found = client.get_experiment_by_name(experiment)
                    if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                        raise
            if found is not None:
                self.experiment_id = found.experiment_id
                if found.lifecycle_stage == "deleted":
                    client.restore_experiment(found.experiment_id)
        if note and (found is None or found.tags.get("mlflow.note.content") != note):
            client.set_experiment_tag(self.experiment_id, "mlflow.note.content", note)
        for run in self.search("attributes.status = 'RUNNING'"):
            if process.is_dead(run.data.tags):
                now = time.time_ns() // 1_000_000
                reason = "its process is gone"
                self.note(run.info.run_id, status="KILLED", end=now, tags={"ag.reason": reason})
                client.set_tag(run.info.run_id, "ag.reason", reason)
                client.set_terminated(run.info.run_id, "KILLED", now)

    def search(self, condition: str) -> list[entities.Run]:
        """Every run of the experiment that meets MLflow's search condition."""
        found: list[entities.Run] = []
        token = None
        while True:
            page = self._client.search_runs([self.experiment_id], condition, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def _find_or_create(
        self,
        name: str,
        key: str,
        kind: str,
        parent: Run | None,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        owner: Mapping[str, str] | None = None,
    ) -> Run:
        """`owner`: the process that the run ends with, where that is another."""
        whose = dict(owner or process.owner())
        found = self.attempt(f"the run {name}", lambda: self._take_up(name, key, kind, parent, {**tags, **whose}))
        if found is None:
            return Run(self, "", name, key, done=False, resumed=False)
        info, resumed = found
        run = Run(self, info.info.run_id, name, key, done=resumed and info.info.status == "FINISHED", resumed=resumed)
        run.params(params)
        return run

    def _take_up(
        self, name: str, key: str, kind: str, parent: Run | None, tags: Mapping[str, Any]
    ) -> tuple[entities.Run, bool]:
        """The run and whether it was there before."""
        client = self._client
        assert "'" not in key, key
        lineage = {"mlflow.parentRunId": parent.id} if parent and parent.id else {}
        wanted = {"ag.key": key, "ag.kind": kind, **lineage}
        given = {tag: str(value) for tag, value in tags.items()}  # the owner among them
        with locked(self.uri, self.root):  # two commands at once must not make two of a run
            found = [run for run in self._keyed(key) if wanted.items() <= run.data.tags.items()]
            if not found:
                every = {"ag.cache": "miss", **provenance(self.root).tags, **wanted, **given}
                start = time.time_ns() // 1_000_000
                made = client.create_run(self.experiment_id, start_time=start, tags=every, run_name=name)
                id, files = made.info.run_id, made.info.artifact_uri
                about = {"id": id, "name": name, "experiment": self.name, "start": start, "artifacts": files}
                self.note(id, run=about, tags=every)
                return made, False
        run = found[0]
        if run.info.status != "FINISHED":
            self.note(run.info.run_id, status="RUNNING", tags=given, untag=["ag.reason"])
            client.update_run(run.info.run_id, status="RUNNING")
            client.log_batch(run.info.run_id, tags=[database.entities.RunTag(*pair) for pair in given.items()])
            if "ag.reason" in run.data.tags:
                client.delete_tag(run.info.run_id, "ag.reason")
        return run, True

    def _keyed(self, key: str) -> list[entities.Run]:
        """Every run with this key."""
        ids = bulk.runs_of(self._client, self.experiment_id, key)
        if ids is None:
            return self.search(f"tags.\"ag.key\" = '{key}'")  # one condition: each costs a join
        return [self._client.get_run(id) for id in ids]

    def _leave(self) -> None:
        self._depth -= 1

    def _close(self, what: str, error: Exception) -> None:
        self.client = None
        self.tell(
            f"MLflow failed at {what}: {first_line(error)}\nNOTHING MORE IS JOURNALED. The work goes on and its "
            f"results are kept. Mend {self.uri} and run the same command again: it journals what is missing."
        )

    def tell(self, trouble: str) -> None:
        """Warn now, and keep it for the closing lines."""
        self.troubles.append(trouble)
        log.warning(trouble)
