import contextlib
import os
import resource
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import sqlalchemy
from alembic import command
from mlflow.store.db.utils import _get_alembic_config, _get_latest_schema_revision
from mlflow.store.tracking.dbmodels.initial_models import Base

from ambergrade.errors import BadInput
from ambergrade.places import CHECKOUT
from ambergrade.track import database, ui
from ambergrade.track.database import open_client
from ambergrade.track.lookup import registered_checkpoint
from ambergrade.track.ui import deep_link, run_link, ui_command

STARTER = """
    import sys; from pathlib import Path; from ambergrade.track.journal import Journal
    from mlflow.telemetry.client import get_telemetry_client
    journal = Journal.open(Path(sys.argv[1]), "gamma")
    with journal.run("train", key="t", kind="train") as run:
        run.metrics({"loss": 1.0})
    print(run.id, journal.experiment_id, len(journal.troubles), get_telemetry_client())
"""


def test_processes_that_start_at_once_on_nothing_share_one_database_one_experiment_and_one_run(tmp_path):
    cwd = tmp_path / "elsewhere"
    cwd.mkdir()
    (tmp_path / "mlruns").mkdir()
    half_made = tmp_path / "mlruns" / ".mlflow.db.making" / "mlflow.db"  # what a kill leaves during the creation
    half_made.parent.mkdir()
    with contextlib.closing(sqlite3.connect(half_made)) as made:
        made.execute("CREATE TABLE _alembic_tmp_tags (key TEXT)")
    # MLflow keeps quiet on machines that look like a CI's or a test's: do not look like one.
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "CI", "GITHUB", "PYTEST", "DO_NOT"))}
    start = [sys.executable, "-c", textwrap.dedent(STARTER), str(tmp_path)]
    children = [subprocess.Popen(start, cwd=cwd, env=outside, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {child.communicate(timeout=300)[0].strip() for child in children}
    assert [child.returncode for child in children] == [0, 0]
    (line,) = said
    run_id, *rest = line.split()
    assert rest == ["1", "0", "None"]
    client = open_client(f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    assert [run.info.run_id for run in client.search_runs(["1"])] == [run_id]
    assert list(cwd.iterdir()) == []


def test_an_older_schema_is_brought_up_to_date_and_a_copy_is_kept(tmp_path):
    file = tmp_path / "mlflow.db"
    engine = sqlalchemy.create_engine(f"sqlite:///{file}")
    Base.metadata.create_all(engine)
    config = _get_alembic_config(f"sqlite:///{file}")
    command.upgrade(config, f"{_get_latest_schema_revision()}-1")
    engine.dispose()
    client = open_client(f"sqlite:///{file}")
    assert [experiment.name for experiment in client.search_experiments()] == ["Default"]
    (copy,) = tmp_path.glob("mlflow.db.before-*")
    with contextlib.closing(sqlite3.connect(copy)) as made:
        (revision,) = made.execute("SELECT version_num FROM alembic_version").fetchone()
    assert revision != _get_latest_schema_revision()


def test_the_links_need_no_mlflow():
    program = "import sys, ambergrade.track.ui; sys.exit('mlflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_links_open_on_the_training_pages(tmp_path, monkeypatch):
    link = deep_link("7", view="sweep-1234", chart=True)
    assert link == (
        "http://127.0.0.1:5000/#/experiments/7/runs"
        "?workflowType=machine_learning&viewStateShareKey=sweep-1234&compareRunsMode=CHART"
    )
    assert "workflowType=machine_learning" in run_link("7", "abc")
    monkeypatch.chdir(CHECKOUT)
    assert ui_command(CHECKOUT) == "make ui"
    assert ui_command(tmp_path) == f"ambergrade ui --root {tmp_path}"
    monkeypatch.chdir(tmp_path)  # a user's project, which has no Makefile
    assert ui_command(tmp_path) == f"ambergrade ui --root {tmp_path}"


def test_without_a_record_the_ui_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ui", "--root", str(tmp_path)])
    with pytest.raises(SystemExit, match="make demo"):
        ui.main()
    assert list(tmp_path.iterdir()) == []


OPENER = """
    import logging, sys; from pathlib import Path; from ambergrade.track.journal import Journal
    logging.basicConfig(level=logging.INFO, format="told: %(message)s")
    journal = Journal.open(Path(sys.argv[1]), "gamma")
    with journal.run("train", key="t", kind="train", params={"a": 1}) as run:
        run.metrics({"loss": 1.0})
        run.text("x", "x.txt")
    print("the work goes on", journal.client is None, *journal.troubles)
"""


def opened(root: Path, **how: object) -> subprocess.CompletedProcess[str]:
    """A program that journals at this root: its few lines, and that it ends well."""
    command = [sys.executable, "-c", textwrap.dedent(OPENER), str(root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, **how)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the work goes on True MLflow failed on the way, as was told above\n"
    lines = done.stderr.splitlines()
    assert len(lines) <= 4, done.stderr
    assert [line.startswith("told: ") for line in lines].count(True) == 1  # once
    assert "NOTHING MORE IS JOURNALED" in done.stderr
    return done


def test_a_damaged_database_is_told_in_a_few_lines_and_left_as_it_is(tmp_path):
    file = tmp_path / "mlruns" / "mlflow.db"
    file.parent.mkdir()
    file.write_bytes(b"no database" * 1000)
    said = opened(tmp_path).stderr
    assert f"{file} is damaged: file is not a database" in said
    assert "ambergrade reindex" in said
    assert file.read_bytes() == b"no database" * 1000
    with pytest.raises(BadInput, match="is damaged"):  # where it is asked for by name
        registered_checkpoint(tmp_path, "models:/kohaku@champion")


def test_a_database_of_a_newer_mlflow_is_told_once_and_left_as_it_is(tmp_path, made_once):
    file = tmp_path / "mlruns" / "mlflow.db"
    file.parent.mkdir()
    with contextlib.closing(sqlite3.connect(made_once)) as source, contextlib.closing(sqlite3.connect(file)) as copy:
        source.backup(copy)
        copy.execute("UPDATE alembic_version SET version_num = 'f00ba7'")
        copy.execute("PRAGMA user_version = 9000000")
        copy.commit()
    before = file.read_bytes()
    assert "was made by a newer MLflow than this" in opened(tmp_path).stderr
    assert file.read_bytes() == before
    assert not list(file.parent.glob("*.before-*"))


def test_a_root_that_cannot_be_written_is_told_in_a_few_lines():
    assert "/proc/nowhere" in opened(Path("/proc/nowhere")).stderr  # where not even root can write


def test_a_full_disk_is_told_and_the_work_goes_on(tmp_path, made_once):
    """The kernel refuses to make any file longer than the database is now."""
    file = tmp_path / "mlruns" / "mlflow.db"
    file.parent.mkdir()
    with contextlib.closing(sqlite3.connect(made_once)) as source, contextlib.closing(sqlite3.connect(file)) as copy:
        source.backup(copy)
        copy.execute(f"PRAGMA user_version = {database.THIS_MLFLOW}")
        copy.execute("PRAGMA journal_mode=DELETE")

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size // 100, resource.RLIM_INFINITY))

    said = opened(tmp_path, preexec_fn=limit).stderr
    assert "MLflow failed at" in said


def test_a_taken_port_of_the_ui_is_told_with_the_next_free_one(tmp_path, monkeypatch, capsys, made_once):
    (tmp_path / "mlruns").mkdir()
    shutil.copyfile(made_once, tmp_path / "mlruns" / "mlflow.db")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        port = one.getsockname()[1]
        free = ui.free_port(port)
        assert port < free < port + ui.PORTS
        started = []
        monkeypatch.setattr(os, "execv", lambda program, words: started.append(words))
        monkeypatch.setattr(sys, "argv", ["ui", "--root", str(tmp_path), "--port", str(port)])
        ui.main()
    assert started[0][started[0].index("--port") + 1] == str(free)
    assert f"Port {port} is taken, so the UI is at {free}" in capsys.readouterr().out
    assert ui.free_port(port) == port  # it was closed
    monkeypatch.setattr(ui, "PORTS", 0)
    with pytest.raises(SystemExit, match="--port"):
        ui.free_port(port)


@pytest.fixture(autouse=True)
def _no_other_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
