"""A database in no time: made once a session by the real code, then copied."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ambergrade.track import database


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("made once") / "mlflow.db"
    database._create(file)
    return file


@pytest.fixture(scope="module")
def quick_database(made_once: Path) -> Iterator[None]:
    """Every new database of the module is a copy: its migrations take seconds, and other tests are about them."""

    def copied(file: Path) -> None:
        with closing(sqlite3.connect(made_once)) as source, closing(sqlite3.connect(file)) as target:
            source.backup(target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(database, "_create", copied)
        yield
