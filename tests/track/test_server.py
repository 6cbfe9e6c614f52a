"""The journal on a real `mlflow server` with a real PostgreSQL behind it, by one setting: MLFLOW_TRACKING_URI."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy
from PIL import Image

from ambergrade.nouns import Measurement
from ambergrade.track.database import MlflowClient
from ambergrade.track.journal import Journal
from ambergrade.track.lookup import registered_checkpoint
from ambergrade.track.rebuild import rebuild

pytestmark = pytest.mark.slow

SHA = {name: f"{number:064x}" for number, name in enumerate(["beta7", "base7", "gamma"], start=1)}


def binary(name: str) -> str | None:
    """Find a program of PostgreSQL: Debian keeps it out of the PATH."""
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return str(found[-1]) if found else shutil.which(name)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait(what: str, process: subprocess.Popen, log: Path, answers, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not answers():
        assert process.poll() is None, f"{what} ended:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < end, f"{what} does not answer:\n{log.read_text()[-3000:]}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """A PostgreSQL of its own, thrown away at the end."""
    initdb, postgres = binary("initdb"), binary("postgres")
    if not initdb or not postgres:
        pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql), so it is not tested")
    with tempfile.TemporaryDirectory() as place:
        folder, log = Path(place), Path(place) / "postgres.log"
        who: dict = {}
        if os.getuid() == 0:  # PostgreSQL does not run as root
            who = {"user": "nobody", "group": "nogroup", "extra_groups": []}
            shutil.chown(folder, "nobody", "nogroup")
        data = str(folder / "data")
        made = [initdb, "-D", data, "-U", "ambergrade", "--auth=trust", "-E", "UTF8", "--no-sync"]
        done = subprocess.run(made, **who, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        port = free_port()
        settings = [f"port={port}", "listen_addresses=127.0.0.1", f"unix_socket_directories={folder}", "fsync=off"]
        command = [postgres, "-D", data, *(word for setting in settings for word in ("-c", setting))]
        with log.open("w") as out, subprocess.Popen(command, **who, cwd=folder, stdout=out, stderr=out) as process:
            try:
                wait("PostgreSQL", process, log, lambda: "ready to accept connections" in log.read_text())
                yield f"postgresql+pg8000://ambergrade@127.0.0.1:{port}/postgres"
            finally:
                process.send_signal(signal.SIGINT)  # a fast shutdown
                process.wait(60)


@pytest.fixture(scope="module")
def server(database: str) -> Iterator[str]:
    """An `mlflow server` that keeps artifacts itself; its URI is the one setting."""
    with tempfile.TemporaryDirectory() as place:
        folder, log, port = Path(place), Path(place) / "server.log", free_port()
        uri = f"http://127.0.0.1:{port}"
        options = ["--backend-store-uri", database, "--artifacts-destination", str(folder / "artifacts")]
        command = [sys.executable, "-m", "mlflow", "server", *options, "--port", str(port), "--workers", "1"]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        outside = {**os.environ, **quiet, "MLFLOW_TRACKING_URI": ""}

        def answers() -> bool:
            try:
                with urllib.request.urlopen(f"{uri}/health", timeout=2) as answer:
                    return answer.status == 200
            except OSError:
                return False

        with (
            log.open("w") as out,
            subprocess.Popen(
                command, cwd=folder, env=outside, stdout=out, stderr=out, start_new_session=True
            ) as process,
        ):
            try:
                wait("mlflow server", process, log, answers)
                yield uri
            finally:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait(60)


@pytest.fixture
def journal(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Journal:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    journal = Journal.open(tmp_path, request.node.name)
    assert not journal.troubles
    return journal


@pytest.fixture
def client(server: str, monkeypatch: pytest.MonkeyPatch) -> MlflowClient:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    return MlflowClient(server)


def test_a_tree_with_settings_intervals_pictures_and_files_is_taken_up_again(journal, client):
    def work(last: int) -> str:
        with journal.run("chain", key="c", kind="chain") as chain:
            chain.provenance({"a": 0.8}, ["a=0.8"])
            with journal.run("train", key="t", kind="train", parent=chain, params={"a": 0.8}) as run:
                for step in range(last):
                    run.metrics({"loss": 1 / (step + 1)}, step)
                run.metrics({"clip_score": Measurement(0.31, 0.30, 0.32, 48)})
                run.picture("samples/00", Image.new("RGB", (4, 4)))
                run.datasets({"captions": SHA["beta7"]})
                if last == 3:
                    raise KeyboardInterrupt
        return run.id

    with pytest.raises(KeyboardInterrupt):
        work(3)
    run = client.get_run(work(5))
    assert run.info.status == "FINISHED"
    assert client.get_run(run.data.tags["mlflow.parentRunId"]).info.status == "FINISHED"
    assert run.data.params == {"a": "0.8"}
    assert (run.data.metrics["clip_score_lo"], run.data.metrics["clip_score_n"]) == (0.30, 48)
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(s, pytest.approx(1 / (s + 1))) for s in range(5)]
    assert len(client.list_artifacts(run.info.run_id, "images")) == 2
    parent = run.data.tags["mlflow.parentRunId"]
    assert Path(client.download_artifacts(parent, "config.yaml")).read_text() == "a: 0.8\n"
    assert [data.dataset.digest for data in run.inputs.dataset_inputs] == [SHA["beta7"][:32]]
    assert not journal.troubles


def test_models_come_by_reference_with_lineage_aliases_and_gates(journal, client, tmp_path):
    checkpoint = tmp_path / "gamma.safetensors"
    with checkpoint.open("wb") as file:
        file.truncate(10**9)
    start = time.monotonic()
    with journal.run("release", key="r", kind="release") as run:
        model = run.model(
            "gamma",
            checkpoint,
            SHA["gamma"],
            parents={"beta7": SHA["beta7"], "base7": SHA["base7"]},
            registered_as="kohaku",
            aliases=["candidate"],
            metrics={"tag_prob": Measurement(0.8, 0.7, 0.9, 40)},
        )
    assert time.monotonic() - start < 10  # a gigabyte that is sent takes longer, and fills the server's disk
    assert checkpoint.stat().st_nlink == 1
    assert {file.path for file in client.list_logged_model_artifacts(model)} == {"MLmodel"}
    found = client.get_run(run.id)
    assert [made.model_id for made in found.outputs.model_outputs] == [model]
    names = {client.get_logged_model(used.model_id).name for used in found.inputs.model_inputs}
    assert names == {"beta7", "base7"}
    assert client.get_logged_model(model).tags["uri"] == checkpoint.as_uri()
    assert client.get_model_version_by_alias("kohaku", "candidate").tags["sha256"] == SHA["gamma"]
    assert registered_checkpoint(tmp_path, "models:/kohaku@candidate") == checkpoint
    assert journal.champion("kohaku") is None
    assert journal.gated("kohaku", SHA["gamma"], {"floor": (True, "0.9")}) == "version 1 is the champion now"
    assert client.get_model_version_by_alias("kohaku", "champion").tags["gate.floor"] == "pass: 0.9"
    assert journal.champion("kohaku").path == checkpoint
    assert not journal.troubles


PROGRAM = """
    import sys, time; from pathlib import Path; from ambergrade.track.journal import Journal
    journal = Journal.open(Path(sys.argv[1]), sys.argv[2])
    with journal.run("train", key="t", kind="train") as run:
        run.metrics({"loss": 1.0}, 0)
        run.flush()
        print(run.id, flush=True)
        time.sleep(120)
"""


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_dead_are_closed(journal, client, tmp_path, request, sent):
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path), request.node.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        run_id = child.stdout.readline().strip()
        child.send_signal(sent)
        child.wait(60)
    reasons = {signal.SIGKILL: "its process is gone", signal.SIGTERM: "SIGTERM", signal.SIGINT: "SIGINT"}
    again = Journal.open(tmp_path, request.node.name)
    run = client.get_run(run_id)
    status = "FAILED" if sent == signal.SIGTERM else "KILLED"
    assert (run.info.status, run.data.tags["ag.reason"]) == (status, reasons[sent])
    with again.run("train", key="t", kind="train") as taken:
        assert taken.id == run_id
    assert client.get_run(run_id).info.status == "FINISHED"
    assert client.get_run(run_id).data.metrics == {"loss": 1.0}


def met_in_one_tree(client: MlflowClient, uri: str, root: Path, workers: int) -> None:
    """Start workers at one instant: none fails, and their runs hang below one parent."""
    command = [sys.executable, str(Path(__file__).with_name("at_once.py")), str(workers), str(root)]
    outside = {**os.environ, "MLFLOW_TRACKING_URI": uri}
    done = subprocess.run(command, env=outside, capture_output=True, text=True, timeout=500)
    said = json.loads(done.stdout)
    assert said["codes"] == [0] * workers, done.stderr[-2000:]
    assert [troubles for *_, troubles in said["said"] if troubles] == []
    runs = client.search_runs([client.get_experiment_by_name("gamma").experiment_id])
    (parent,) = {sweep for _, _, sweep, _, _ in said["said"]}
    assert len(runs) == workers + 2
    assert {run.info.status for run in runs} == {"FINISHED"}
    below = {run.info.run_id for run in runs if run.data.tags.get("mlflow.parentRunId") == parent}
    assert below == {point for _, point, *_ in said["said"]} | {shared for *_, shared, _ in said["said"]}


def test_eight_workers_at_once(server, client, tmp_path):
    met_in_one_tree(client, server, tmp_path, 8)


def test_a_local_record_moves_to_the_server(server, client, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    local = Journal.open(tmp_path, "moved")
    checkpoint = tmp_path / "gamma.safetensors"
    checkpoint.write_bytes(b"weights")
    with (
        local.run("chain", key="c", kind="chain", params={"formula": "x"}) as chain,
        local.run("release", key="r", kind="release", parent=chain) as run,
    ):
        run.metrics({"clip_score": Measurement(0.31, 0.30, 0.32, 48)})
        run.picture("sheet", Image.new("RGB", (4, 4)))
        run.model("gamma", checkpoint, SHA["gamma"], registered_as="moved", aliases=["candidate"])
    local.gated("moved", SHA["gamma"], {"floor": (True, "0.9")})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    done = rebuild(tmp_path)
    assert (done.runs, done.models, done.missing) == (2, 1, [])
    assert (rebuild(tmp_path).runs, rebuild(tmp_path).there) == (0, 2)
    (found,) = client.search_runs([client.get_experiment_by_name("moved").experiment_id], "tags.\"ag.key\" = 'r'")
    assert client.get_run(found.data.tags["mlflow.parentRunId"]).data.params == {"formula": "x"}
    assert found.data.metrics["clip_score_hi"] == 0.32
    assert len(client.list_artifacts(found.info.run_id, "images")) == 2
    assert client.get_model_version_by_alias("moved", "champion").tags["gate.floor"] == "pass: 0.9"
    before = MlflowClient(local.uri)
    assert len(before.list_artifacts(run.id, "images")) == 2  # the local record stays whole


def test_four_processes_on_a_fresh_postgresql_all_journal(database, tmp_path):
    """Each makes the tables, the experiment and the shared runs, or finds that another one has."""
    engine = sqlalchemy.create_engine(database, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text("CREATE DATABASE fresh"))
    engine.dispose()
    fresh = database.rpartition("/")[0] + "/fresh"
    met_in_one_tree(MlflowClient(fresh), fresh, tmp_path, 4)


def test_a_postgresql_that_is_down_is_told_at_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql+pg8000://kay:swordfish@127.0.0.1:{free_port()}/x")
    start = time.monotonic()
    journal = Journal.open(tmp_path, "gamma")
    assert time.monotonic() - start < 30  # MLflow by itself tries for 100 s
    assert journal.client is None
    assert "NOTHING MORE IS JOURNALED" in caplog.text
    assert "kay:***@" in caplog.text
    assert "swordfish" not in caplog.text


def test_the_database_itself_can_be_the_record(database, server, tmp_path, monkeypatch):
    """Without a server between: rows are written at once there too, and a row that is there is left to MLflow."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    journal = Journal.open(tmp_path, "straight")
    for score in (0.5, 0.7):  # the second time it is finished
        with journal.run("p", key="p", kind="point", params={"a": 0.8}) as run:
            run.metrics({"score": score, "lost": math.nan})
    with (
        journal.run("q", key="q", kind="point") as run,
        Journal.open(tmp_path, "straight").run("q", key="q", kind="point", params={"a": 1}) as same,
    ):
        same.metrics({"score": 0.1})
        run.params({"a": 1})
        run.metrics({"score": 0.1})
    assert not journal.troubles
    found = {one.data.tags["ag.key"]: one.data for one in journal.search("")}
    assert (found["p"].params, found["p"].metrics["score"], found["q"].metrics) == ({"a": "0.8"}, 0.5, {"score": 0.1})
    assert math.isnan(found["p"].metrics["lost"])
    assert found["q"].params == {"a": "1"}
