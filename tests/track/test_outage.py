"""A real `mlflow server` that is killed, started again, or hangs; and work that is journaled after it was done."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ambergrade.nouns import Measurement
from ambergrade.track.database import MlflowClient
from ambergrade.track.journal import Journal, RunRef
from ambergrade.track.ui import deep_link, run_link, ui_command


def journal_points(journal: Journal, points: dict[float, tuple[float, float]]) -> int:
    """What a sweep does with its finished points: enter those that MLflow has not; returns how many those were."""
    with journal.run("sweep", key="sweep", kind="sweep") as sweep:
        known = journal.finished_keys("point", sweep)
        for a, (start, end) in points.items():
            if f"p{a}" not in known:
                about = {"params": {"a": a}, "start": start, "end": end}
                with journal.run(f"a {a}", key=f"p{a}", kind="point", parent=sweep, **about) as run:
                    run.metrics({"score": Measurement(a, a - 0.1, a + 0.1, 8)})
    return len(points.keys() - {float(key[1:]) for key in known})


@pytest.mark.usefixtures("quick_database")
def test_work_that_was_done_before_is_entered_once_with_its_own_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    points = {0.1 * n: (1_700_000_000.5 + 10 * n, 1_700_000_009.25 + 10 * n) for n in range(1, 4)}
    journal = Journal.open(tmp_path, "gamma")
    with (
        journal.run("sweep", key="sweep", kind="sweep") as sweep,
        journal.run("other", key="p0.1", kind="stage", parent=sweep),  # of another kind
    ):
        pass
    assert journal.finished_keys("point", sweep) == frozenset()
    assert [journal_points(journal, points) for _ in range(2)] == [3, 0]
    assert not journal.troubles
    found = MlflowClient(journal.uri).search_runs([journal.experiment_id], "tags.\"ag.kind\" = 'point'")
    assert len(found) == 3
    for run in found:
        start, end = points[float(run.data.params["a"])]
        assert (run.info.start_time, run.info.end_time) == (1000 * start, 1000 * end)
        (score,) = MlflowClient(journal.uri).get_metric_history(run.info.run_id, "score")
        assert score.timestamp == 1000 * end
        assert run.data.tags["mlflow.parentRunId"] == sweep.id


WORKER = """
    import os, pickle, sys; from ambergrade.track.journal import Journal
    ref = pickle.load(sys.stdin.buffer)
    journal = Journal.attach(ref.journal)
    parent = journal.attached(ref.id, ref.name, ref.key)
    for number in range(3):
        with journal.run(f"p{number}", key=f"p{number}", kind="point", parent=parent) as run:
            run.metrics({"score": number})
    print(os.getpid(), len(journal.troubles), "mlflow" in sys.modules)
"""


def draw(ref: RunRef) -> list[str]:
    """Draw three points below a run in a process that gets only its pickled name; returns what it says."""
    command = [sys.executable, "-c", textwrap.dedent(WORKER)]
    done = subprocess.run(command, input=pickle.dumps(ref), capture_output=True, check=True, timeout=300)
    assert done.stderr == b""
    return done.stdout.decode().split()


@pytest.mark.usefixtures("quick_database")
def test_a_worker_process_journals_below_the_run_that_it_was_handed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    journal = Journal.open(tmp_path, "gamma")
    with journal.run("sweep", key="s", kind="sweep") as sweep:
        pid, *rest = draw(sweep.ref)
        assert rest == ["0", "True"]
        assert MlflowClient(journal.uri).get_run(sweep.id).info.status == "RUNNING"
    found = MlflowClient(journal.uri).search_runs([journal.experiment_id], "tags.\"ag.kind\" = 'point'")
    assert sorted(run.data.metrics["score"] for run in found) == [0, 1, 2]
    assert {(run.info.status, run.data.tags["mlflow.parentRunId"]) for run in found} == {("FINISHED", sweep.id)}
    assert {run.data.tags["ag.process"].split()[0] for run in found} == {pid}


def test_a_worker_of_a_journal_that_is_closed_says_nothing_and_waits_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    journal = Journal.open(tmp_path, "gamma")
    with journal.run("sweep", key="s", kind="sweep") as sweep:
        assert len(caplog.records) == 1
        assert draw(sweep.ref)[1:] == ["0", "False"]  # MLflow is not even imported
    assert len(caplog.records) == 1


def test_links_name_the_server_that_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://kay:pw@tracking.example:8443/x/")
    for link in (deep_link("7", view="v", chart=True), run_link("7", "abc"), f"{ui_command(tmp_path)}/#/"):
        assert link.startswith("https://tracking.example:8443/x/#/")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///x.db")
    assert run_link("7", "abc").startswith("http://127.0.0.1:5000/#/")


class Server:
    """An `mlflow server` on a SQLite file, which can be killed, stopped and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            self.port = one.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        options = [
            "--backend-store-uri",
            f"sqlite:///{self.folder}/server.db",
            "--artifacts-destination",
            str(self.folder),
        ]
        command = [sys.executable, "-m", "mlflow", "server", *options, "--port", str(self.port), "--workers", "1"]
        outside = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_TRACKING_URI": ""}
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=outside, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + 240
        while not self.answers():
            assert time.monotonic() < end, (self.folder / "log").read_text()[-2000:]
            assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def send(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.process.wait(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, made_once: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "server.db").write_bytes(made_once.read_bytes())
    one = Server(folder)
    one.start()
    yield one
    one.kill()


OUTAGES: dict[str, tuple[Callable[[Server], None], Callable[[Server], None], float]] = {
    "hangs": (lambda server: server.send(signal.SIGSTOP), lambda server: server.send(signal.SIGCONT), 60),
    "is killed": (Server.kill, Server.start, 30),
}
"""What happens, what mends it, and how many seconds drawing may be held."""


@pytest.mark.slow
@pytest.mark.parametrize("outage", OUTAGES)
def test_an_outage_holds_the_work_for_seconds_and_the_same_command_journals_it_later(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, outage: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    happens, mends, held = OUTAGES[outage]
    points: dict[float, tuple[float, float]] = {}
    journal = Journal.open(tmp_path, outage)
    with journal.run("sweep", key="sweep", kind="sweep") as sweep:
        for number in range(1, 6):
            started = time.monotonic()
            if number == 3:
                happens(server)
            with journal.run(
                f"a {number}", key=f"p{number}.0", kind="point", parent=sweep, params={"a": number}
            ) as run:
                begun = time.time()
                run.metrics({"score": Measurement(number, number - 0.1, number + 0.1, 8)})
                run.tags({"x": 1})
                points[float(number)] = (begun, time.time())
            assert time.monotonic() - started < (held if number == 3 else 10)
    assert len(caplog.records) == 1
    assert "NOTHING MORE IS JOURNALED" in caplog.text
    mends(server)
    again = Journal.open(tmp_path, outage)
    assert journal_points(again, points) == 3
    assert not again.troubles
    client = MlflowClient(server.uri)
    found = client.search_runs([again.experiment_id], "tags.\"ag.kind\" = 'point'")
    assert sorted(run.data.metrics["score_lo"] for run in found) == pytest.approx([0.9, 1.9, 2.9, 3.9, 4.9])
    assert {(run.info.status, run.data.tags["mlflow.parentRunId"]) for run in found} == {("FINISHED", sweep.id)}
    assert client.get_run(sweep.id).info.status == "FINISHED"
