"""Opens MLflow quietly, and its local database safely: made once, under a lock, with a write-ahead log.

Everything that this room needs of MLflow comes from here, after the settings that must come first, and only when it is
asked for, because the import takes seconds. Eight processes that open a new SQLite database at once leave it broken
for good, and so does a kill half way through its creation: therefore the lock, and the rename at the end.
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.metadata
import logging
import os
import random
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambergrade.errors import BadInput

if TYPE_CHECKING:
    from mlflow import MlflowClient, entities
    from mlflow.artifacts import download_artifacts
    from mlflow.exceptions import MlflowException

# MLflow reads these. What a user has set stays.
for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # what fails is raised too, and told once, by the journal
    "MLFLOW_TRUNCATE_LONG_VALUES": "false",  # a value that is too long raises; it is never cut in silence
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # a server's client prints two lines at the end of every run
    # A server that is down holds the work for seconds, and one that hangs for half a minute (MLflow: for minutes).
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}.items():
    os.environ.setdefault(_name, _value)

__all__ = [
    "MlflowClient",
    "MlflowException",
    "artifact_root",
    "database_file",
    "download_artifacts",
    "entities",
    "failures",
    "locked",
    "open_client",
    "tracking_uri",
]

LATER = {
    "MlflowClient": "mlflow",
    "MlflowException": "mlflow.exceptions",
    "download_artifacts": "mlflow.artifacts",
    "entities": "mlflow",
}
"""What other modules take from MLflow, and the module that has it."""

_VERSION = importlib.metadata.version("mlflow")
THIS_MLFLOW = int("".join(f"{int(part):03}" for part in re.findall(r"\d+", _VERSION)[:3]))
"""The version as a number for SQLite's `user_version`: 3.17.2 is 3017002."""

TRIES = 8
"""To set up a new database server, where another process may be at it too."""


def __getattr__(name: str) -> Any:
    if name not in LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(LATER[name]), name)


def failures() -> tuple[type[Exception], ...]:
    """Return what MLflow, its database and its network raise when they fail."""
    _quiet()
    from alembic.util import CommandError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, OSError, SQLAlchemyError, sqlite3.Error, CommandError, ImportError, BadInput


def tracking_uri(root: Path) -> str:
    """Return `MLFLOW_TRACKING_URI` if that is set, else the address of the SQLite database in `<root>/mlruns`."""
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root.resolve() / 'mlruns' / 'mlflow.db'}"
    file = database_file(uri)
    return uri if file is None else f"sqlite:///{file}"  # a relative one would change its meaning with the cwd


def database_file(uri: str) -> Path | None:
    """Return the database behind a `sqlite:///` address; None for a server."""
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


def artifact_root(uri: str, root: Path) -> str | None:
    """Return where artifacts go: beside a local database, else in `<root>/mlruns`; None where a server decides.

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
    file = database_file(uri) or root / "mlruns" / "server.db"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_name(f".{file.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def open_client(uri: str) -> MlflowClient:
    """Return a client whose database exists, has this MLflow's tables and answers. Raises one of `failures`."""
    _quiet()
    file = database_file(uri)
    if file is None:
        return _connect(uri)
    with locked(uri, file.parent):
        if not file.exists():
            _create(file)
        elif _made_by(file) != THIS_MLFLOW:
            _migrate(file)
        return _answering(uri)


def _quiet() -> None:
    """Silence lines for every migration and retry; what fails in the end is raised."""
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)


def _answering(uri: str) -> MlflowClient:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    client.search_experiments(max_results=1)
    return client


def _connect(uri: str) -> MlflowClient:
    """Connect to a server. On an empty database every client makes the tables; all but one fail and try again."""
    from sqlalchemy import create_engine
    from sqlalchemy.exc import DBAPIError

    if not uri.startswith(("postgresql", "mysql", "mssql")):
        return _answering(uri)
    engine = create_engine(uri)
    engine.connect().close()  # MLflow itself would try for 100 s to reach a database that is down
    engine.dispose()
    for left in reversed(range(TRIES)):
        try:
            return _answering(uri)
        except DBAPIError:
            if not left:
                raise
            time.sleep(random.uniform(0.2, 1.0))
    raise AssertionError("the last try returns or raises")


def _create(file: Path) -> None:
    """Make the database aside, by MLflow's own client, and give it its name when it is whole."""
    making, aside = file.with_name(f".{file.name}.making"), file.with_name(f".{file.name}.new")
    shutil.rmtree(making, ignore_errors=True)  # a kill left it
    aside.unlink(missing_ok=True)
    making.mkdir()
    _answering(f"sqlite:///{making / file.name}")
    with closing(sqlite3.connect(making / file.name)) as made, closing(sqlite3.connect(aside)) as copy:
        made.backup(copy)
        copy.execute("PRAGMA journal_mode=WAL")  # is kept in the file; halves the latency of a write
        copy.execute(f"PRAGMA user_version={THIS_MLFLOW}")
    aside.rename(file)
    shutil.rmtree(making)


def _made_by(file: Path) -> int:
    """Return the MLflow that brought the database up to date, as far as we know. Raises BadInput if it is damaged."""
    try:
        with closing(sqlite3.connect(file)) as database:
            database.execute("SELECT count(*) FROM sqlite_master").fetchone()
            return int(database.execute("PRAGMA user_version").fetchone()[0])
    except sqlite3.OperationalError:  # it is locked, or cannot be read
        raise
    except sqlite3.DatabaseError as error:
        raise BadInput(
            f"{file} is damaged: {error}.\nMove it away and make it anew from the records: ambergrade reindex"
        ) from error


def _migrate(file: Path) -> None:
    """Bring a database of another MLflow up to date, after a copy: a migration that is killed cannot be taken up again.

    MLflow itself would refuse the database or, where a table is missing, migrate it without a copy.
    """
    kept = file.with_name(f"{file.name}.before-mlflow-{_VERSION}")
    if not kept.exists():  # else a migration was killed, and the copy is the better one
        aside = kept.with_name(f".{kept.name}")
        aside.unlink(missing_ok=True)
        with closing(sqlite3.connect(file)) as database, closing(sqlite3.connect(aside)) as copy:
            database.backup(copy)
        aside.rename(kept)
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{file}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it says no more"])[-1]
        if "Can't locate revision" in reason:  # nothing was begun
            kept.unlink()
            raise BadInput(
                f"{file} was made by a newer MLflow than this, {_VERSION}.\nInstall that, or choose a new root."
            )
        raise BadInput(f"{file} cannot be brought up to date: {reason}\nMove it away and run: ambergrade reindex")
    with closing(sqlite3.connect(file)) as database:
        database.execute(f"PRAGMA user_version={THIS_MLFLOW}")
