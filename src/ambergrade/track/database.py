"""Opens MLflow quietly, and its local database safely: made once, under a lock, with a write-ahead log.

Everything that this room needs of MLflow comes from here, after the settings that must come first, and only when it is
asked for: the import takes seconds, and a process whose journal is kept by another (relay.py) can do without.
Eight processes that open a new SQLite database at once leave it broken for good, and so does a kill
half way through its creation: therefore the lock, and the rename at the end.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.metadata
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient, entities
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException
    from mlflow.models.utils import get_external_mlflow_model_spec

# MLflow reads these when it is imported. What a user has set stays.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",  # alembic's and the registry's chatter
    "MLFLOW_TRUNCATE_LONG_VALUES": "false",  # a value that is too long raises; it is never cut in silence
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # a server's client prints two lines at the end of every run
}.items():
    os.environ.setdefault(_name, _value)

__all__ = [
    "MlflowClient",
    "MlflowException",
    "artifact_root",
    "database_file",
    "download_artifacts",
    "entities",
    "get_external_mlflow_model_spec",
    "locked",
    "open_client",
    "tracking_uri",
]

LATER = {
    "MlflowClient": "mlflow",
    "MlflowException": "mlflow.exceptions",
    "download_artifacts": "mlflow.artifacts",
    "entities": "mlflow",
    "get_external_mlflow_model_spec": "mlflow.models.utils",
}
"""What other modules take from MLflow, and where it lies."""

_VERSION = importlib.metadata.version("mlflow")
THIS_MLFLOW = int("".join(f"{int(part):03}" for part in re.findall(r"\d+", _VERSION)[:3]))
"""The version as a number for SQLite's `user_version`: 3.17.2 is 3017002."""


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(LATER[name]), name)


def tracking_uri(root: Path) -> str:
    """`MLFLOW_TRACKING_URI` if that is set, else the SQLite database in `<root>/mlruns`."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.resolve() / 'mlruns' / 'mlflow.db'}"
    file = database_file(uri)
    return uri if file is None else f"sqlite:///{file}"  # a relative one would change its meaning with the cwd


def database_file(uri: str) -> Path | None:
    """The database behind a `sqlite:///` URI; None for a server."""
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


def artifact_root(uri: str, root: Path) -> str | None:
    """Where artifacts go: beside a local database, in `<root>/mlruns` for a database server; None: a server says.

    MLflow's own default follows the working directory of whoever creates the experiment.
    """
    if uri.startswith(("http:", "https:")):
        return None
    file = database_file(uri)
    return ((root.resolve() / "mlruns" if file is None else file.parent) / "artifacts").as_uri()


@contextmanager
def locked(uri: str, root: Path) -> Iterator[None]:
    """Hold the lock of the local database, or of the root that a server's runs come from.

    A server keeps its tables in order, but "create what is not there" takes two calls.
    """
    place = (root / "mlruns" / "server.db") if database_file(uri) is None else database_file(uri)
    assert place is not None
    place.parent.mkdir(parents=True, exist_ok=True)
    with place.with_name(f".{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def open_client(uri: str) -> MlflowClient:
    """A client whose database exists and has this MLflow's schema. Raises what MLflow, alembic or SQLite raise."""
    from mlflow import MlflowClient

    file = database_file(uri)
    with locked(uri, file.parent) if file is not None else nullcontext():
        if file is not None:
            if not file.exists():
                _create(file)
            elif _mark(file) != THIS_MLFLOW:
                _migrate(file)
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)  # a server that does not answer is found out here
    return client


def _create(file: Path) -> None:
    from mlflow.db import upgrade
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    aside = file.with_name(f".{file.name}.new")
    for left in file.parent.glob(f"{aside.name}*"):
        left.unlink()
    upgrade.callback(f"sqlite:///{aside}")
    with closing(sqlite3.connect(aside)) as database:
        database.execute("PRAGMA journal_mode=WAL")  # is kept in the file; halves the latency of a write
        database.execute(f"PRAGMA user_version={THIS_MLFLOW}")
    aside.rename(file)
    uri = f"sqlite:///{file}"
    SqlAlchemyStore(
        uri, artifact_root(uri, file.parent)
    )  # makes the "Default" experiment, with its artifacts beside the database


def _mark(file: Path) -> int:
    """Which MLflow brought the database up to date, as far as we know."""
    with closing(sqlite3.connect(file)) as database:
        return int(database.execute("PRAGMA user_version").fetchone()[0])


def _migrate(file: Path) -> None:
    """Bring a database of another MLflow up to date, after a copy: a migration that is killed cannot be taken up again.

    MLflow itself would refuse the database or, where a table is missing, migrate it without a copy.
    """
    from mlflow.db import upgrade

    kept = file.with_name(f"{file.name}.before-mlflow-{_VERSION}")
    with closing(sqlite3.connect(file)) as database:
        if not kept.exists():  # else a migration was killed, and the copy is the better one
            aside = kept.with_name(f".{kept.name}")
            aside.unlink(missing_ok=True)
            with closing(sqlite3.connect(aside)) as copy:
                database.backup(copy)
            aside.rename(kept)
        upgrade.callback(f"sqlite:///{file}")
        database.execute(f"PRAGMA user_version={THIS_MLFLOW}")
