"""Writes down what happens, in MLflow: runs, metrics with intervals, pictures, models and what they came from.

    journal = Journal.open(root, "gamma_tiny")
    with journal.run("gamma rev1", key=chain, kind="chain") as parent:
        with journal.run("a 0.8, b 0.5", key=point, kind="point", parent=parent, params={"a": 0.8}) as run:
            run.metrics({"clip_score": Measurement(0.31, 0.30, 0.32, 48)})

and in another process, below the same parent, whose `ref` is plain data:

    journal = Journal.attach(ref.journal)
    with journal.run("a 0.9, b 0.5", key=other, kind="point", parent=journal.attached(ref.id, ref.name, ref.key)): ...

A run has a key. Asked for again, a finished run is not written again, and an unfinished one (killed,
failed) is taken up where it stopped. The journal decides nothing: if MLflow cannot be opened or stops
answering, the work goes on without it, one warning says so, and the same command journals it later:
`finished_keys` says what MLflow has, `run(..., start=, end=)` enters the rest with its own times.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ambergrade.errors import BadInput
from ambergrade.track import database, lines, process, registry
from ambergrade.track.database import artifact_root, locked, open_client, tracking_uri
from ambergrade.track.provenance import provenance
from ambergrade.track.registry import Version
from ambergrade.track.run import JournalRef, Run, RunRef, first_line, now, verdict
from ambergrade.track.secrets import Secrets

if TYPE_CHECKING:
    from ambergrade.track.database import MlflowClient, entities

__all__ = ["Journal", "JournalRef", "Run", "RunRef"]

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
        secrets: Secrets | None = None,
    ) -> None:
        self.client = client
        self.uri = uri
        self.experiment_id = experiment_id
        self.root = root
        self.name = name
        """The experiment's name."""
        self.secrets = secrets or Secrets()
        """What is masked in all that is journaled."""
        self.troubles: list[str] = []
        """What could not be journaled, for the closing lines of a command; each was told when it happened."""
        self._keeps_lines = True
        self._depth = 0

    @classmethod
    def open(cls, root: Path, experiment: str, note: str = "", secrets: Secrets | None = None) -> Journal:
        """Open the experiment, making database and experiment where they are missing.

        The database is `<root>/mlruns/mlflow.db` with artifacts in `<root>/mlruns/artifacts`, unless
        `MLFLOW_TRACKING_URI` names another. Runs whose process died are closed as KILLED. `note` is
        markdown, shown on the experiment's page. Never raises for MLflow's sake.
        """
        journal = cls(None, tracking_uri(root), "", root.resolve(), experiment, secrets)
        journal._guard(f"opening {journal.uri}", lambda: journal._connect())
        journal.attempt(f"opening the experiment {experiment}", lambda client: journal._enter(client, note))
        return journal

    @classmethod
    def attach(cls, ref: JournalRef) -> Journal:
        """Open a journal that another process has opened; one that was closed there is closed here."""
        journal = cls(None, ref.uri, ref.experiment_id, ref.root, ref.name, ref.secrets)
        if ref.experiment_id:
            journal._guard(f"opening {ref.uri}", lambda: journal._connect())
        return journal

    @property
    def is_open(self) -> bool:
        """Whether what is told is journaled."""
        return self.client is not None

    @property
    def ref(self) -> JournalRef:
        """Plain data by which another process attaches to this journal."""
        experiment = self.experiment_id if self.client is not None else ""
        return JournalRef(self.uri, experiment, self.root, self.name, self.secrets)

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
        start: float | None = None,
        end: float | None = None,
    ) -> Iterator[Run]:
        """Open the run with this key below `parent`: a new one, an unfinished one again, or a finished one to look at.

        key: names what the run computes (a stage's identity); the same key is the same run.
        kind: what to filter by in the UI: chain, train, point, evaluation, release.
        start, end: seconds since the epoch, of work that was done before and is journaled only now.

        Leaving by an exception or by SIGTERM ends the run as FAILED, by SIGINT as KILLED.
        """
        with ExitStack() as stack:
            if self._depth == 0:
                stack.enter_context(process.sigterm_raises())
            self._depth += 1
            stack.callback(self._leave)
            if parent is not None:
                parent.flush()
            given = process.owner() | {tag: self.secrets.shown(tag, value) for tag, value in (tags or {}).items()}
            found = self.attempt(
                f"the run {name}", lambda client: self._take_up(client, name, key, kind, parent, given, start)
            )
            info, resumed = found or (None, False)
            done = info is not None and resumed and info.info.status == "FINISHED"
            run = Run(self, info.info.run_id if info else "", name, key, done=done, resumed=resumed, ended=end)
            run.params(params or {})
            run.flush()
            try:
                yield run
            except BaseException as error:
                run.end(*verdict(error))
                raise
            run.end("FINISHED")

    def attached(self, id: str, name: str, key: str) -> Run:
        """Return the open run of another process, to hang children below; its owner ends it."""
        return Run(self, id, name, key, done=False, resumed=True)

    def finished_keys(self, kind: str, parent: Run | None = None) -> frozenset[str]:
        """Return the keys of finished runs of a kind, by one question: work with another key is not journaled yet."""
        below = f" and tags.\"mlflow.parentRunId\" = '{parent.id}'" if parent is not None and parent.id else ""
        condition = f"attributes.status = 'FINISHED' and tags.\"ag.kind\" = '{kind}'{below}"
        found = self.attempt(f"the finished runs of {self.name}", lambda _: self.search(condition))
        return frozenset(run.data.tags.get("ag.key", "") for run in found or [])

    def attempt(self, what: str, action: Callable[[MlflowClient], T]) -> T | None:
        """Do something to MLflow; what fails is told, never raised."""
        client = self.client
        return None if client is None else self._guard(what, lambda: action(client))

    def version(self, name: str, digest: str) -> Version | None:
        """Return the latest version of a registered model with these weights."""
        return self.attempt(f"the versions of {name}", lambda client: registry.version(client, name, digest))

    def champion(self, name: str) -> Version | None:
        """Return the version of a registered model that the alias `champion` points to."""
        return self.attempt(f"the champion of {name}", lambda client: registry.champion(client, name))

    def rival(self, name: str, digest: str) -> Version | None:
        """Return the version that a candidate with these weights is measured against."""
        return self.attempt(f"the rival in {name}", lambda client: registry.rival(client, name, digest))

    def gated(self, name: str, digest: str, gates: Mapping[str, tuple[bool, str]]) -> str:
        """Write the gates' results on the version, move the alias `champion` by them, and return what became of it."""

        def decide(client: MlflowClient) -> str:
            with locked(self.uri, self.root):
                judged = registry.version(client, name, digest)
                people = {} if judged is None else registry.by_people(judged.tags)
                number = None if judged is None else judged.number
                event = {"model": name, "digest": digest, "version": number, "gates": gates, "tags": people}
                self.note(lines.REGISTRY, **event, experiment=self.name)
                return registry.decide(client, name, digest, gates)

        return self.attempt(f"the gates of {name}", decide) or "not journaled, so no champion"

    def note(self, name: str, **event: Any) -> None:
        """Keep a line of what MLflow is about to be told, for `pipelines/reindex.py`."""
        if self.client is None or not self._keeps_lines:
            return
        try:
            lines.append(self.root, name, {**event, "time": now()})
        except OSError as error:
            self._keeps_lines = False
            path = lines.folder(self.root)
            self.tell(f"{path} cannot be written: {error}. A lost database could not be made anew.")

    def search(self, condition: str) -> list[entities.Run]:
        """Return every run of the experiment that meets MLflow's search condition."""
        assert self.client is not None
        found: list[entities.Run] = []
        token = None
        while True:
            page = self.client.search_runs([self.experiment_id], condition, page_token=token)
            found += page
            token = page.token
            if not token:
                return found

    def tell(self, trouble: str, reminder: str = "") -> None:
        """Warn at once; for the closing lines of a command keep a reminder, or the whole where there is none."""
        log.warning(self.secrets.text(trouble))
        self.troubles.append(self.secrets.text(reminder or trouble))

    def _connect(self) -> None:
        self.client = open_client(self.uri)

    def _guard(self, what: str, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except database.failures() as error:
            if getattr(error, "error_code", "") in ONE_CALL:
                self.tell(f"MLflow refused {what}: {first_line(error)}")
            else:
                self._close(what, error)
        return None

    def _close(self, what: str, error: Exception) -> None:
        self.client = None
        known = isinstance(error, BadInput)
        trouble = str(error) if known else f"MLflow failed at {what}: {first_line(error)}\nMend {self.uri}."
        self.tell(
            f"{trouble}\nNOTHING MORE IS JOURNALED. The work goes on and its results are kept. Then run the same "
            "command again: it journals what is missing.",
            "MLflow failed on the way, as was told above",
        )

    def _enter(self, client: MlflowClient, note: str) -> None:
        """Find or make the experiment, and close the runs of dead processes."""
        with locked(self.uri, self.root):
            found = client.get_experiment_by_name(self.name)
            base = artifact_root(self.uri, self.root)
            place = None if base is None else f"{base}/{re.sub(r'[^A-Za-z0-9_-]', '_', self.name)}"
            if found is None:
                try:
                    self.experiment_id = client.create_experiment(self.name, artifact_location=place)
                except database.MlflowException as error:  # a command on another machine, on the same server
                    found = client.get_experiment_by_name(self.name)
                    if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                        raise
            if found is not None:
                self._refuse_copy(found.artifact_location, place)
                self.experiment_id = found.experiment_id
                if found.lifecycle_stage == "deleted":
                    client.restore_experiment(found.experiment_id)
        if note and (found is None or found.tags.get("mlflow.note.content") != note):
            client.set_experiment_tag(self.experiment_id, "mlflow.note.content", self.secrets.text(note))
        for run in self.search("attributes.status = 'RUNNING'"):
            if process.is_dead(run.data.tags):
                reason, ended = "its process is gone", now()
                self.note(run.info.run_id, status="KILLED", end=ended, tags={"ag.reason": reason})
                client.set_tag(run.info.run_id, "ag.reason", reason)
                client.set_terminated(run.info.run_id, "KILLED", ended)

    def _refuse_copy(self, kept: str, here: str | None) -> None:
        """Raise BadInput for a database that was copied with its root: its files would go to the original."""
        there, own = lines.local_path(kept), lines.local_path(here or "none:")
        if there is None or own is None or there.parts[-2:] != own.parts[-2:] or there.resolve() == own.resolve():
            return
        file = database.database_file(self.uri)
        if file is not None:
            raise BadInput(
                f"{file} was copied or moved: its files lie at {there}. "
                f"Move it away and make it anew for this root: ambergrade reindex root={self.root}"
            )

    def _take_up(
        self,
        client: MlflowClient,
        name: str,
        key: str,
        kind: str,
        parent: Run | None,
        tags: Mapping[str, str],
        start: float | None,
    ) -> tuple[entities.Run, bool]:
        """Find the run or make it; return it and whether it was there before. `tags`: its owner among them."""
        assert "'" not in key, key
        lineage = {"mlflow.parentRunId": parent.id} if parent and parent.id else {}
        wanted = {"ag.key": key, "ag.kind": kind, **lineage}
        with locked(self.uri, self.root):  # two commands at once must not make two of a run
            # One condition, because each costs a join.
            found = [
                run for run in self.search(f"tags.\"ag.key\" = '{key}'") if wanted.items() <= run.data.tags.items()
            ]
            if not found:
                every = {"ag.cache": "miss", **provenance(self.root).tags, **wanted, **tags}
                started = now() if start is None else int(1000 * start)
                title = self.secrets.text(name)
                made = client.create_run(self.experiment_id, start_time=started, tags=every, run_name=title)
                place = lines.relative_uri(made.info.artifact_uri, self.root)
                about = {"id": made.info.run_id, "name": title, "experiment": self.name, "start": started}
                self.note(made.info.run_id, run={**about, "artifacts": place}, tags=every)
                return made, False
        run = found[0]
        if run.info.status != "FINISHED":
            self.note(run.info.run_id, status="RUNNING", tags=tags, untag=["ag.reason"])
            client.update_run(run.info.run_id, status="RUNNING")
            client.log_batch(run.info.run_id, tags=[database.entities.RunTag(*pair) for pair in tags.items()])
            if "ag.reason" in run.data.tags:
                client.delete_tag(run.info.run_id, "ag.reason")
        return run, True

    def _leave(self) -> None:
        self._depth -= 1
