"""One run of the journal: numbers with intervals, pictures, texts, models, and how it ended."""

from __future__ import annotations

import math
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from PIL import Image

from ambergrade.errors import AmbergradeError, BadSetting
from ambergrade.nouns import Measurement
from ambergrade.pictures import open_picture
from ambergrade.track import database, lines, models, process
from ambergrade.track.database import locked
from ambergrade.track.provenance import provenance
from ambergrade.track.secrets import Secrets
from ambergrade.track.ui import VIEW_TAG, view_state

if TYPE_CHECKING:
    from ambergrade.track.database import MlflowClient, entities
    from ambergrade.track.journal import Journal

T = TypeVar("T")
Number = Measurement | float

LONGEST_NAME = 250  # characters; MLflow's limits
LONGEST_PARAM = 6000
LONGEST_TAG = 8000
PARAMS_PER_CALL = 100
METRICS_PER_CALL = 1000 - PARAMS_PER_CALL  # beside a call's tags
FLUSH_SECONDS = 2.0
"""Metrics and tags wait about this long at most, for others to be written with them; a kill loses no more."""


@dataclass(frozen=True)
class JournalRef:
    """Names an open journal in plain data that can be pickled, for `Journal.attach` in another process."""

    uri: str = field(repr=False)  # it may hold a password
    experiment_id: str
    """Empty where MLflow could not be opened."""
    root: Path
    name: str
    secrets: Secrets


@dataclass(frozen=True)
class RunRef:
    """Names a run in plain data, for `Journal.attached` in another process."""

    journal: JournalRef
    id: str
    name: str
    key: str


class Run:
    """A run that is open, or finished (`done`): then nothing that is asked of it does anything."""

    def __init__(
        self,
        journal: Journal,
        id: str,
        name: str,
        key: str,
        *,
        done: bool,
        resumed: bool,
        ended: float | None = None,
    ) -> None:
        self.id = id
        """MLflow's run id; "" where MLflow could not be opened."""
        self.name = name
        self.key = key
        self.done = done
        """It was finished before; skip what is dear to prepare."""
        self.resumed = resumed
        self._journal = journal
        self._ended = None if ended is None else int(1000 * ended)
        """Milliseconds since the epoch; the time of metrics and of the end, for work that was done before."""
        self._metrics: list[entities.Metric] = []
        self._params: dict[str, str] = {}
        self._tags: dict[str, str] = {}
        self._waiting_since = 0.0
        self._logged: dict[str, tuple[int, float]] = {}
        self._pictures: set[str] | None = None

    @property
    def ref(self) -> RunRef:
        """Plain data by which another process can hang runs below this one."""
        return RunRef(self._journal.ref, self.id, self.name, self.key)

    def metrics(self, values: Mapping[str, Number], step: int | None = None) -> None:
        """Log numbers; a Measurement `m` logs `m`, `m_lo`, `m_hi` (95 %) and `m_n`.

        What the run has already is passed over: steps up to its last one, or an equal number without a step. NaN is
        kept; infinity is refused with a warning.
        """
        if self._is_open:
            news = [point for point in self._points(values, step or 0) if self._is_news(point, step)]
            self._wait(lambda: self._metrics.extend(news))

    def params(self, values: Mapping[str, Any]) -> None:
        """Log settings. One of more than 6,000 characters becomes the file `params/<name>.txt` and a pointer to it."""
        if not self._is_open:
            return
        rows = {}
        for key, value in values.items():
            name, text = _name(key), self._journal.secrets.shown(str(key), value)
            if len(text) > LONGEST_PARAM:
                file = f"params/{name.replace('/', '_')}.txt"
                self.text(text, file)
                text = f"{len(text)} characters, see {file}"
            rows[name] = text
        self._wait(lambda: self._params.update(rows))

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags; they can be searched for in the UI. What is too long is cut and ends in `…`."""
        if self._is_open:
            rows = {_name(key): _cut(self._journal.secrets.shown(str(key), value)) for key, value in values.items()}
            self._wait(lambda: self._tags.update(rows))

    def flush(self) -> None:
        """Write what waits: parameters by themselves, since a refused one would take the others along."""
        if not self._is_open:
            return
        params, metrics, tags = list(self._params.items()), self._metrics, list(self._tags.items())
        self._params, self._metrics, self._tags = {}, [], {}
        for part in parts(params, PARAMS_PER_CALL):
            self._batch("params", params=dict(part))
        while metrics or tags:
            self._batch("metrics", metrics=metrics[:METRICS_PER_CALL], tags=dict(tags[:PARAMS_PER_CALL]))
            metrics, tags = metrics[METRICS_PER_CALL:], tags[PARAMS_PER_CALL:]

    def note(self, markdown: str) -> None:
        """The description on the run's page. What is too long is cut, says so, and is kept whole as note.md."""
        markdown = self._journal.secrets.text(markdown)
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
        image = picture if isinstance(picture, Image.Image) else open_picture(picture)
        self.kept([f"picture {key}, {step}"])
        self._do(f"picture {key}", lambda client: client.log_image(self.id, image, key=name, step=step))

    def file(self, path: Path, folder: str = "") -> None:
        """Keep a copy of a small file. Checkpoints go to `model`, which links: a copy would double gigabytes."""
        if path.suffix in {".safetensors", ".ckpt", ".pt", ".bin"}:
            raise BadSetting(f"{path.name} is a checkpoint, which is not copied to MLflow.\nLog it by run.model(...).")
        self.kept([f"{folder}/{path.name}" if folder else path.name])
        self._do(f"file {path.name}", lambda client: client.log_artifact(self.id, str(path), folder or None))

    def text(self, text: str, file: str) -> None:
        """Keep a text as a file, with its secrets masked."""
        self._keep(self._journal.secrets.text(text), file)

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
        """Keep what made this run and those below it, as files that its tags name; secrets are masked.

        config.yaml (resolved), overrides.yaml (as typed), diff.patch (changes of files that git tracks), untracked.txt
        (names of others), requirements.lock, hardware.json.
        """
        if not self._is_open:
            return
        secrets = self._journal.secrets
        self.text(yaml.safe_dump(secrets.settings(settings), sort_keys=False, allow_unicode=True), "config.yaml")
        self.text(yaml.safe_dump(secrets.overrides(overrides), allow_unicode=True), "overrides.yaml")
        for file, text in provenance(self._journal.root).files.items():
            self._keep(text, file)  # a patch that is masked would not apply

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
        becomes a version of that registered model, `aliases` point to it and `note` (markdown) describes it; the same
        weights under another name, alias, note, tag or parameter are another version.
        """
        models.check_aliases(aliases)
        journal = self._journal
        labels = {key: journal.secrets.shown(key, value) for key, value in (tags or {}).items()}
        knobs = {_name(key): journal.secrets.shown(key, value) for key, value in (params or {}).items()}
        numbers = {key: astuple(m) if isinstance(m, Measurement) else m for key, m in (metrics or {}).items()}
        about = {"name": name, "digest": digest, "kind": kind, "parents": dict(parents or {}), "tags": labels}
        about |= {"registered_as": registered_as, "aliases": list(aliases), "note": journal.secrets.text(note)}
        about |= {"params": knobs, "metrics": numbers}

        def enter(client: MlflowClient) -> str:
            place = (client, journal.experiment_id)
            every = {"uri": path.resolve().as_uri(), "bytes": path.stat().st_size, **labels}
            with locked(journal.uri, journal.root):
                model = models.enter(*place, name, digest, kind=kind, run_id=self.id, tags=every, params=knobs)
                made_from = [models.enter(*place, *parent, kind="input").model_id for parent in (parents or {}).items()]
                models.link(path, name, model.artifact_location)
                models.connect(client, self.id, model.model_id, made_from)
                if self.id not in {metric.run_id for metric in model.metrics or ()}:
                    client.log_batch(self.id, metrics=self._points(metrics or {}, model_id=model.model_id))
                if registered_as:
                    models.register(client, model, self.id, path, about)
            return str(model.model_id)

        found = self._do(f"model {name}", enter) or ""
        if found:
            journal.note(self.id, models=[{"id": found, "path": lines.relative(path, journal.root), **about}])
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
        if reason:
            self.tags({"ag.reason": reason})
        self.flush()
        if trace:
            self.text(trace, "error.txt")
        ended = now() if self._ended is None else self._ended
        self._journal.note(self.id, status=status, end=ended)
        self._do(f"the end of {self.name}", lambda client: client.set_terminated(self.id, status, ended))

    @property
    def _is_open(self) -> bool:
        return bool(self.id) and not self.done and self._journal.client is not None

    def _do(self, what: str, action: Callable[[MlflowClient], T]) -> T | None:
        return self._journal.attempt(what, action) if self._is_open else None

    def _wait(self, add: Callable[[], object]) -> None:
        """Add to what waits, and write it if it has waited long enough or is too much for one call."""
        if not (self._metrics or self._params or self._tags):
            self._waiting_since = time.monotonic()
        add()
        if len(self._metrics) >= METRICS_PER_CALL or time.monotonic() - self._waiting_since > FLUSH_SECONDS:
            self.flush()

    def kept(self, names: Sequence[str]) -> None:
        """Note names of files in the run's lines, so that a rebuilt database can say which are missing."""
        if self._is_open and names:
            self._journal.note(self.id, files=list(names))

    def _keep(self, text: str, file: str) -> None:
        self.kept([file])
        self._do(f"file {file}", lambda client: client.log_text(self.id, text, file))

    def _batch(
        self,
        what: str,
        metrics: Sequence[entities.Metric] = (),
        params: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        if self._is_open:
            self._journal.note(self.id, **lines.batch(metrics, params, tags))
        settings = [database.entities.Param(*pair) for pair in (params or {}).items()]
        labels = [database.entities.RunTag(*pair) for pair in (tags or {}).items()]
        self._do(f"{what} of {self.name}", lambda client: client.log_batch(self.id, metrics, settings, labels))

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
        when = now() if self._ended is None else self._ended
        return [
            database.entities.Metric(name, float(number), when, step, model_id or None)
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


def now() -> int:
    """Return milliseconds since the epoch, as MLflow counts."""
    return time.time_ns() // 1_000_000


def verdict(error: BaseException) -> tuple[str, str, str]:
    """Return how a run that ends by `error` is closed: status, reason, text of error.txt."""
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


def first_line(error: BaseException) -> str:
    """Return the beginning of an error's text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _name(key: object) -> str:
    """Return a key with what MLflow refuses replaced by `_`."""
    return re.sub(r"[^\w\-./: ]", "_", str(key))[:LONGEST_NAME]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TAG else text[: LONGEST_TAG - 1] + "…"


def parts(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut rows into parts of at most `size`."""
    return (rows[start : start + size] for start in range(0, len(rows), size))
