import contextlib
import os
import sqlite3
import subprocess
import sys
import textwrap

import pytest
import sqlalchemy
from alembic import command
from mlflow.store.db.utils import _get_alembic_config, _get_latest_schema_revision
from mlflow.store.tracking.dbmodels.initial_models import Base

from ambergrade.track import ui
from ambergrade.track.database import open_client
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
    half_made = tmp_path / "mlruns" / ".mlflow.db.new"  # what a kill leaves that comes during the creation
    with contextlib.closing(sqlite3.connect(half_made)) as database:
        database.execute("CREATE TABLE _alembic_tmp_tags (key TEXT)")
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
    with contextlib.closing(sqlite3.connect(copy)) as database:
        (revision,) = database.execute("SELECT version_num FROM alembic_version").fetchone()
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
    monkeypatch.chdir(tmp_path)
    assert ui_command(tmp_path) == "make ui"
    assert ui_command(tmp_path / "x") == f"python -m ambergrade.track.ui --root {tmp_path / 'x'}"


def test_without_a_record_the_ui_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ui", "--root", str(tmp_path)])
    with pytest.raises(SystemExit, match="make demo"):
        ui.main()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(autouse=True)
def _no_other_server(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
