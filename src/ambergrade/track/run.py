"""One run of the journal: numbers with intervals, pictures, texts, models, and how it ended."""

from __future__ import annotations

import math
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from PIL import Image

from ambergrade.errors import AmbergradeError, BadSetting
from ambergrade.nouns import Measurement
from ambergrade.track import bulk, database, models, process, told
from ambergrade.track.database import locked
from ambergrade.track.provenance import provenance
from ambergrade.track.ui import VIEW_TAG, view_state

if TYPE_CHECKING:
    from ambergrade.track.database import MlflowClient, entities
    from ambergrade.track.journal import Journal

T = TypeVar("T")
Number = Measurement | float

LONGEST_PARAM = 6000  # characters; MLflow's limits
LONGEST_TAG = 8000
PARAMS_PER_CALL = 100
METRICS_PER_CALL = 1000
FLUSH_SECONDS = 2.0
"""Metrics wait this long at most; a kill loses no more."""


class Run:
    """A run that is open, or finished (`done`): then nothing that is asked of it does anything."""

    def __init__(self, journal: Journal, id: str, name: str, key: str, *, done: bool, resumed: bool) -> None:
        self.id = id
        """MLflow's run id; "" where MLflow could not be opened."""
        self.name = name
        self.key = key
        self.done = done
        """It was finished before; skip what is dear to prepare."""
        self.resumed = resumed
        self._journal = journal
        self._waiting: list[entities.Metric] = []
        self._flushed = time.monotonic()
        self._logged: dict[str, tuple[int, float]] = {}
        self._written: set[str] = set()
        """Keys of parameters and metrics that are in the database."""
        self._pictures: set[str] | None = None

    def metrics(self, values: Mapping[str, Number], step: int | None = None) -> None:
        """Log numbers; a Measurement `m` logs `m`, `m_lo`, `m_hi` (95 %) and `m_n`.

        What the run has already is passed over: steps up to its last one, or an equal number without a step. NaN is
        kept; infinity is refused with a warning.
        """
        if not self._is_open:
            return
        self._waiting += [point for point in self._points(values, step or 0) if self._is_news(point, step)]
        if len(self._waiting) >= METRICS_PER_CALL or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings. One of more than 6,000 characters becomes the file `params/<name>.txt` and a pointer to it."""
        if not self._is_open:
            return
        rows = []
        for key, value in values.items():
            name, text = _name(key), str(value)
            if len(text) > LONGEST_PARAM:
                file = f"params/{name.replace('/', '_')}.txt"
                self.text(text, file)
                text = f"{len(text)} characters, see {file}"
            rows.append(database.entities.Param(name, text))
        for start in range(0, len(rows), PARAMS_PER_CALL):
            self._batch("params", params=rows[start : start + PARAMS_PER_CALL])

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags; they can be searched for in the UI."""
        self._batch("tags", tags=[database.entities.RunTag(key, str(value)) for key, value in values.items()])

    def note(self, markdown: str) -> None:
        """The description on the run's page. What is too long is cut, says so, and is kept whole as note.md."""
        if len(markdown) > LONGEST_TAG:
            self.text(markdown, "note.md")
            ending = "\n\n… the whole text is in the artifact note.md"
            markdown = markdown[: LONGEST_TAG - len(ending)].rpartition("\n")[0] + ending
        self.tags({"mlflow.note.content": markdown})

    def picture(self, key: str, picture: Image.Image | Path, step: int = 0) -> None:
        """Log a picture under a key; the same key in several runs (or steps) is compared side by side in the UI."""
        if not self._is_open:
            return
        name = re.sub(r"[^\w\-./ ]", "_", key, flags=re.ASCII)
        if self._pictures is None:
            listed = self._do("its pictures", lambda client: client.list_artifacts(self.id, "images"))
            # <key>+step+<n>+timestamp+…; the small one is written last
            written = [Path(file.path).name for file in listed or [] if "+compressed" in file.path]
            self._pictures = {file.partition("+timestamp+")[0] for file in written} if self.resumed else set()
        place = f"{name.replace('/', '~')}+step+{step}"
        if place in self._pictures:
            return
        self._pictures.add(place)
        image = picture if isinstance(picture, Image.Image) else Image.open(picture)
        self._journal.note(self.id, files=[f"picture {key}, {step}"])
        self._do(f"picture {key}", lambda client: client.log_image(self.id, image, key=name, step=step))

    def file(self, path: Path, folder: str = "") -> None:
        """Keep a copy of a small file. Checkpoints go to `model`, which links: a copy would double gigabytes."""
        if path.suffix in {".safetensors", ".ckpt", ".pt", ".bin"}:
            raise BadSetting(f"{path.name} is a checkpoint, which is not copied to MLflow.\nLog it by run.model(...).")
        if self._is_open:
            self._journal.note(self.id, files=[f"{folder}/{path.name}" if folder else path.name])
        self._do(f"file {path.name}", lambda client: client.log_artifact(self.id, str(path), folder or None))

    def text(self, text: str, file: str) -> None:
        """Keep a text as a file, for example the resolved config as `config.yaml`."""
        if self._is_open:
            self._journal.note(self.id, files=[file])
        self._do(f"file {file}", lambda client: client.log_text(self.id, text, file))

    def datasets(self, digests: Mapping[str, str], context: str = "input") -> None:
        """Say what data went in, name to sha256. MLflow's digest column holds the first 32 hex, a tag all 64."""
        rows = []
        for name, sha256 in digests.items():
            data = database.entities.Dataset(name, sha256[:32], "ambergrade", f'{{"sha256": "{sha256}"}}')
            about = [
                database.entities.InputTag("mlflow.data.context", context),
                database.entities.InputTag("sha256", sha256),
            ]
            rows.append(database.entities.DatasetInput(data, about))
        if self._is_open and rows:
            self._journal.note(self.id, datasets=[{"digests": dict(digests), "context": context}])
            self._do(f"inputs of {self.name}", lambda client: client.log_inputs(self.id, datasets=rows))

    def provenance(self, settings: Mapping[str, Any], overrides: Sequence[str] = ()) -> None:
        """Keep what made this run and those below it, as files that its tags name.

        config.yaml (resolved), overrides.yaml (as typed), diff.patch (what git's commit lacks), requirements.lock,
        hardware.json.
        """
        if not self._is_open:
            return
        self.text(yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True), "config.yaml")
        self.text(yaml.safe_dump(list(overrides), allow_unicode=True), "overrides.yaml")
        for file, text in provenance(self._journal.root).files.items():
            self.text(text, file)

    def hit(self) -> None:
        """The work was done before, maybe below another parent: tag it, point there, and copy its last metrics."""
        if not self._is_open:
            return
        self.tags({"ag.cache": "hit"})
        condition = f"tags.\"ag.key\" = '{self.key}' and attributes.status = 'FINISHED'"
        for origin in self._do("the first run", lambda _: self._journal.search(condition)) or []:
            if origin.info.run_id != self.id:
                self.tags({"ag.origin": origin.info.run_id})
                self.metrics(origin.data.metrics)
                break

    def model(
        self,
        name: str,
        path: Path,
        digest: str,
        *,
        kind: str = "checkpoint",
        parents: Mapping[str, str] | None = None,
        registered_as: str = "",
        aliases: Sequence[str] = (),
        note: str = "",
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Number] | None = None,
    ) -> str:
        """Enter a checkpoint as a model that this run made, and return MLflow's model id ("" without MLflow).

        The file is hard-linked into the model's folder where the filesystem allows, never copied. `parents` maps names
        to digests of what it was made from; those that no run made are entered by digest. With `registered_as` it
        becomes a version of that registered model (once per model), `aliases` point to it and `note` (markdown)
        describes it.
        """
        models.check_aliases(aliases)
        journal = self._journal

        def enter(client: MlflowClient) -> str:
            place = (client, journal.experiment_id)
            about = {"uri": path.resolve().as_uri(), "bytes": path.stat().st_size, **(tags or {})}
            knobs = {_name(key): value for key, value in (params or {}).items()}
            with locked(journal.uri, journal.root):
                model = models.enter(*place, name, digest, kind=kind, run_id=self.id, tags=about, params=knobs)
                made_from = [models.enter(*place, *parent, kind="input").model_id for parent in (parents or {}).items()]
                models.link(path, name, model.artifact_location)
                models.connect(client, self.id, model.model_id, made_from)
                if not model.metrics:
                    client.log_batch(self.id, metrics=self._points(metrics or {}, model_id=model.model_id))
                if registered_as:
                    models.register(client, registered_as, model, self.id, aliases=aliases, note=note)
            return str(model.model_id)

        found = self._do(f"model {name}", enter) or ""
        if found:
            numbers = metrics or {}
            event = {
                "id": found,
                "name": name,
                "path": str(path.resolve()),
                "digest": digest,
                "kind": kind,
                "parents": dict(parents or {}),
                "registered_as": registered_as,
                "aliases": list(aliases),
                "note": note,
                "tags": dict(tags or {}),
                "params": dict(params or {}),
                "metrics": {key: astuple(m) if isinstance(m, Measurement) else m for key, m in numbers.items()},
            }
            journal.note(self.id, models=[event])
        return found

    def view(
        self,
        name: str,
        kind: str,
        *,
        order_by: str,
        ascending: bool = False,
        params: Sequence[str],
        metrics: Sequence[str],
    ) -> str:
        """Save a view of this run's children for the UI and return its key for `ui.deep_link(experiment, view=key)`.

        It lists the children of one kind, sorted by a metric, with the named parameters and metrics as columns.
        """
        key = _name(f"{name}-{self.id[:8]}").replace("/", "_")
        state = view_state(
            parent=self.id, kind=kind, order_by=order_by, ascending=ascending, params=params, metrics=metrics
        )
        columns = {"params": list(params), "metrics": list(metrics)}
        event = {"name": name, "kind": kind, "order_by": order_by, "ascending": ascending, **columns}
        if self._is_open:
            self._journal.note(self.id, views=[event])
        self._do(
            f"the view {name}",
            lambda client: client.set_experiment_tag(self._journal.experiment_id, VIEW_TAG + key, state),
        )
        return key

    def end(self, status: str, reason: str = "", trace: str = "") -> None:
        """Write what waits and close the run as FINISHED, FAILED or KILLED."""
        if not self._is_open:
            return
        self._flush()
        if reason:
            self.tags({"ag.reason": reason})
        if trace:
            self.text(trace, "error.txt")
        now = time.time_ns() // 1_000_000
        self._journal.note(self.id, status=status, end=now)
        self._do(f"the end of {self.name}", lambda client: client.set_terminated(self.id, status, now))

    @property
    def _is_open(self) -> bool:
        return bool(self.id) and not self.done and self._journal.client is not None

    def _do(self, what: str, action: Callable[[MlflowClient], T]) -> T | None:
        return self._journal.attempt(what, lambda: action(self._journal.client)) if self._is_open else None

    def _batch(self, what: str, **rows: Any) -> None:
        if self._is_open:
            self._journal.note(self.id, **told.rows(**rows))
        self._do(f"{what} of {self.name}", lambda client: self._write(client, **rows))

    def _write(
        self,
        client: MlflowClient,
        metrics: Sequence[entities.Metric] = (),
        params: Sequence[entities.Param] = (),
        tags: Sequence[entities.RunTag] = (),
    ) -> None:
        keys = {f"metric {metric.key}" for metric in metrics} | {f"param {param.key}" for param in params}
        new = not (self.resumed or tags or keys & self._written)
        if not (new and bulk.insert(client, self.id, metrics, params)):
            client.log_batch(self.id, metrics, params, tags)
        self._written |= keys

    def _points(
        self, values: Mapping[str, Number], step: int = 0, model_id: str | None = None
    ) -> list[entities.Metric]:
        flat: dict[str, float] = {}
        for key, value in values.items():
            name = _name(key)
            if isinstance(value, Measurement):
                flat |= {name: value.value, f"{name}_lo": value.low, f"{name}_hi": value.high, f"{name}_n": value.n}
            else:
                flat[name] = value
        infinite = [name for name, number in flat.items() if math.isinf(number)]
        if infinite:  # MLflow would store and show 1.8e308
            self._journal.tell(f"{self.name}: {', '.join(infinite)} is infinite and is not journaled.")
        now = time.time_ns() // 1_000_000
        return [
            database.entities.Metric(name, float(number), now, step, model_id or None)
            for name, number in flat.items()
            if name not in infinite
        ]

    def _is_news(self, point: entities.Metric, step: int | None) -> bool:
        if point.key not in self._logged:
            self._logged[point.key] = self._last_logged(point.key) if self.resumed else (-1, math.nan)
        last, value = self._logged[point.key]
        equal = point.value == value or (math.isnan(point.value) and math.isnan(value))
        news = last < 0 or (step > last if step is not None else not equal)
        if news:
            self._logged[point.key] = (point.step, point.value)
        return news

    def _last_logged(self, name: str) -> tuple[int, float]:
        history = self._do(f"history of {name}", lambda client: client.get_metric_history(self.id, name))
        last = max(history or [], key=lambda past: (past.step, past.timestamp), default=None)
        return (-1, math.nan) if last is None else (last.step, last.value)

    def _flush(self) -> None:
        rows, self._waiting = self._waiting, []
        self._flushed = time.monotonic()
        for start in range(0, len(rows), METRICS_PER_CALL):
            self._batch("metrics", metrics=rows[start : start + METRICS_PER_CALL])


def verdict(error: BaseException) -> tuple[str, str, str]:
    """How a run that ends by `error` is closed: status, reason, what to keep as error.txt."""
    if isinstance(error, process.Terminated):
        return "FAILED", "SIGTERM", ""
    if isinstance(error, KeyboardInterrupt):
        return "KILLED", "SIGINT", ""
    if isinstance(error, SystemExit) and not error.code:
        return "FINISHED", "", ""
    reason = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, AmbergradeError):
        return "FAILED", reason, str(error)
    return "FAILED", reason, "".join(traceback.format_exception(error))


def _name(key: str) -> str:
    """A key with what MLflow refuses replaced by `_`."""
    return re.sub(r"[^\w\-./: ]", "_", str(key))


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
