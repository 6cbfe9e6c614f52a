import contextlib
import json
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import psutil
import pytest
from PIL import Image

from ambergrade.errors import BadInput, BadSetting
from ambergrade.nouns import Measurement
from ambergrade.track import process
from ambergrade.track.database import MlflowClient, tracking_uri
from ambergrade.track.journal import Journal

SHA = {name: f"{number:064x}" for number, name in enumerate(["beta7", "anxl3", "anxl2", "base7", "gamma"], start=1)}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """One database for all tests of this file, at a path with a space and an accent; each test its own experiment."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    return tmp_path_factory.mktemp("a root é")


@pytest.fixture
def journal(root, request) -> Journal:
    journal = Journal.open(root, request.node.name)
    assert not journal.troubles
    return journal


@pytest.fixture
def client(root) -> MlflowClient:
    """MLflow's own client, asked independently of the journal."""
    return MlflowClient(f"sqlite:///{root}/mlruns/mlflow.db")


def runs(client: MlflowClient, journal: Journal) -> dict[str, list]:
    found: dict[str, list] = {}
    for run in client.search_runs([journal.experiment_id]):
        found.setdefault(run.info.run_name, []).append(run)
    return found


def test_the_database_keeps_a_write_ahead_log_and_artifacts_lie_beside_it(root, journal, client):
    # By SQLite, never by open(): closing the file would drop this process's POSIX locks on it, and another process
    # could then take away the log under our feet (https://www.sqlite.org/howtocorrupt.html, 2.2).
    with contextlib.closing(sqlite3.connect(root / "mlruns" / "mlflow.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    for experiment in client.search_experiments(filter_string="name != 'Default'"):
        assert experiment.artifact_location.startswith((root / "mlruns" / "artifacts").as_uri())


def test_a_child_hangs_below_its_parent_with_tags_params_and_intervals(journal, client):
    with (
        journal.run("gamma", key="c", kind="chain") as chain,
        journal.run("a 0.8", key="p", kind="point", parent=chain, params={"a": 0.8}, tags={"note": 1}) as point,
    ):
        point.metrics({"clip_score": Measurement(0.31, 0.30, 0.32, 48), "fid": 12.5, "nothing": float("nan")})
    run = client.get_run(point.id)
    assert run.info.status == client.get_run(chain.id).info.status == "FINISHED"
    assert run.data.tags["mlflow.parentRunId"] == chain.id
    assert run.data.tags["mlflow.user"]
    assert (run.data.tags["ag.kind"], run.data.tags["ag.cache"], run.data.tags["note"]) == ("point", "miss", "1")
    assert run.data.params == {"a": "0.8"}
    assert run.data.metrics.pop("nothing") != 0
    assert run.data.metrics == pytest.approx(
        {"clip_score": 0.31, "clip_score_lo": 0.30, "clip_score_hi": 0.32, "clip_score_n": 48, "fid": 12.5}
    )


def test_a_finished_run_is_found_again_and_nothing_is_written_to_it(journal, client):
    for value in (1.0, 2.0):
        with journal.run("stage", key="k", kind="train") as run:
            assert run.done == (value == 2.0)
            run.metrics({"loss": value})
            run.picture("sample", Image.new("RGB", (4, 4)))
            run.text("x", f"{value}.txt")
    (only,) = runs(client, journal)["stage"]
    assert only.data.metrics == {"loss": 1.0}
    assert {file.path for file in client.list_artifacts(only.info.run_id)} == {"images", "1.0.txt"}
    assert len(client.list_artifacts(only.info.run_id, "images")) == 2  # the picture and its thumbnail


def test_the_same_key_below_another_parent_or_of_another_kind_is_another_run(journal, client):
    for parent in ("one", "two"):
        with journal.run(parent, key=parent, kind="chain") as chain:
            for kind in ("train", "evaluation"):
                with journal.run("stage", key="k", kind=kind, parent=chain):
                    pass
    assert len(runs(client, journal)["stage"]) == 4


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (ValueError("numbers\nmore"), "FAILED", "ValueError: numbers"),
        (BadInput("no such table"), "FAILED", "BadInput: no such table"),
        (KeyboardInterrupt(), "KILLED", "SIGINT"),
        (SystemExit(3), "FAILED", "SystemExit: 3"),
        (SystemExit(0), "FINISHED", None),
    ],
)
def test_how_a_run_ends_is_what_mlflow_shows(journal, client, error, status, reason):
    ids = []

    def work() -> None:
        with journal.run("chain", key="c", kind="chain") as chain:
            ids.append(chain.id)
            with journal.run("stage", key="s", kind="train", parent=chain) as run:
                ids.append(run.id)
                run.metrics({"loss": 1.0})
                raise error

    with pytest.raises(type(error)):
        work()
    for run_id in ids:
        found = client.get_run(run_id)
        assert (found.info.status, found.data.tags.get("ag.reason")) == (status, reason)
    assert client.get_run(ids[1]).data.metrics == {"loss": 1.0}
    files = [file.path for file in client.list_artifacts(ids[1])]
    assert files == (["error.txt"] if isinstance(error, Exception) or status == "FAILED" else [])


def test_a_failed_run_is_taken_up_again_without_doubling_its_points_or_pictures(journal, client):
    def fail() -> None:
        with journal.run("train", key="k", kind="train") as run:
            ids.append(run.id)
            for step in range(3):
                run.metrics({"loss": 1.0 - step / 10}, step)
            run.picture("samples/00", Image.new("RGB", (4, 4)), step=2)
            raise ValueError

    ids: list[str] = []
    with pytest.raises(ValueError):
        fail()
    with journal.run("train", key="k", kind="train") as second:
        assert (second.id, second.resumed, second.done) == (ids[0], True, False)
        for step in range(1, 5):  # from a checkpoint before the last point
            second.metrics({"loss": 1.0 - step / 10}, step)
        second.metrics({"final": 0.5})
        for step in (2, 4):
            second.picture("samples/00", Image.new("RGB", (4, 4)), step=step)
    history = client.get_metric_history(ids[0], "loss")
    assert [(point.step, point.value) for point in history] == [(s, pytest.approx(1 - s / 10)) for s in range(5)]
    assert len(client.list_artifacts(ids[0], "images")) == 4
    run = client.get_run(ids[0])
    assert run.info.status == "FINISHED"
    assert "ag.reason" not in run.data.tags


PROGRAM = """
    import sys, time; from pathlib import Path; from ambergrade.track.journal import Journal
    journal = Journal.open(Path(sys.argv[1]), sys.argv[2])
    with journal.run("chain", key="c", kind="chain") as chain:
        with journal.run("train", key="t", kind="train", parent=chain) as run:
            run.metrics({"loss": 1.0}, 0)
            run.flush()
            print(run.id, flush=True)
            time.sleep(120)
"""


@pytest.fixture
def sleeper(root, request):
    """A process with an open chain and an open child; yields it and the child's run id."""
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(root), request.node.name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        yield child, child.stdout.readline().strip()
        child.kill()


@pytest.mark.parametrize(
    ("sent", "code", "status"), [(signal.SIGTERM, 143, "FAILED"), (signal.SIGINT, -signal.SIGINT, "KILLED")]
)
def test_a_signal_ends_the_open_runs_and_the_program_as_usual(root, client, sleeper, sent, code, status):
    child, run_id = sleeper
    child.send_signal(sent)
    assert child.wait(60) == code
    run = client.get_run(run_id)
    parent = client.get_run(run.data.tags["mlflow.parentRunId"])
    assert [r.info.status for r in (run, parent)] == [status, status]
    assert run.data.tags["ag.reason"] == sent.name
    assert run.data.metrics == {"loss": 1.0}


def test_runs_of_a_process_that_was_killed_are_closed_and_continued_those_of_a_living_one_are_not(
    root, client, sleeper, request
):
    child, run_id = sleeper
    Journal.open(root, request.node.name)
    assert client.get_run(run_id).info.status == "RUNNING"
    child.kill()
    child.wait()
    journal = Journal.open(root, request.node.name)
    assert client.get_run(run_id).info.status == "KILLED"
    assert client.get_run(run_id).data.tags["ag.reason"] == "its process is gone"
    with journal.run("chain", key="c", kind="chain") as chain:
        assert client.get_run(chain.id).info.status == "RUNNING"
        with journal.run("train", key="t", kind="train", parent=chain) as run:
            assert run.id == run_id
    assert {name: len(found) for name, found in runs(client, journal).items()} == {"chain": 1, "train": 1}
    assert client.get_run(run_id).info.status == "FINISHED"


def test_a_process_id_that_was_given_to_another_process_does_not_keep_a_run_alive():
    tags = process.owner()
    assert not process.is_dead(tags)
    pid, started = tags["ag.process"].split(" ")
    assert float(started) == pytest.approx(psutil.Process().create_time(), abs=0.01)
    assert process.is_dead({**tags, "ag.process": f"{pid} {float(started) - 60}"})
    assert not process.is_dead({**tags, "ag.host": "elsewhere", "ag.process": "1 1"})
    assert not process.is_dead({**tags, "ag.process": f"{pid} 4711 boot"})  # written by an earlier version
    assert not process.is_dead({})
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        born = psutil.Process(child.pid).create_time()
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:  # ended, and nobody has asked how
            time.sleep(0.01)
        for kept in (f"{child.pid} {born}", f"{child.pid} 4711 boot"):
            assert process.is_dead({**tags, "ag.process": kept})
    assert process.is_dead({**tags, "ag.process": f"{child.pid} {born}"})


def test_a_hit_below_another_parent_copies_the_metrics_and_points_to_the_first_run(journal, client):
    ids = []
    for chain_key in ("one", "two"):
        with (
            journal.run(chain_key, key=chain_key, kind="chain") as chain,
            journal.run("train", key="t", kind="train", parent=chain) as run,
        ):
            ids.append(run.id)
            if chain_key == "one":
                run.metrics({"loss": 0.25}, 7)
            else:
                run.hit()
                run.metrics({"loss": 0.25})
    second = client.get_run(ids[1])
    assert second.data.tags["ag.cache"] == "hit"
    assert second.data.tags["ag.origin"] == ids[0]
    assert [point.value for point in client.get_metric_history(ids[1], "loss")] == [0.25]


def test_a_long_parameter_becomes_a_file_and_a_note_is_cut_where_it_says_so(journal, client):
    note = "\n".join(f"| row {number} | 1.0 |" for number in range(2000))
    with journal.run("stage", key="k", kind="train") as run:
        run.params({"tags": "x" * 6001, "short@name": 1, **{f"p{n}": n for n in range(150)}})
        run.note(note)
    found = client.get_run(run.id)
    assert found.data.params["tags"] == "6001 characters, see params/tags.txt"
    assert found.data.params["short_name"] == "1"
    assert len(found.data.params) == 152
    assert "note.md" in found.data.tags["mlflow.note.content"]
    for file, text in {"params/tags.txt": "x" * 6001, "note.md": note}.items():
        assert Path(client.download_artifacts(run.id, file)).read_text() == text
    assert not journal.troubles


def test_infinity_is_told_and_not_stored_as_a_finite_number(journal, client, caplog):
    with journal.run("stage", key="k", kind="train") as run:
        run.metrics({"loss": float("inf"), "fid": 1.0})
    assert client.get_run(run.id).data.metrics == {"fid": 1.0}
    assert "loss is infinite" in caplog.text


def test_datasets_carry_their_whole_digest(journal, client):
    with journal.run("train", key="k", kind="train") as run:
        for _ in range(2):
            run.datasets({"captions": SHA["beta7"]}, "training")
    (data,) = client.get_run(run.id).inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("captions", SHA["beta7"][:32])
    assert {tag.key: tag.value for tag in data.tags} == {"mlflow.data.context": "training", "sha256": SHA["beta7"]}


def test_a_model_is_linked_registered_once_and_knows_its_parents(journal, client, root):
    checkpoint = root / "gamma.safetensors"
    checkpoint.write_bytes(b"weights")
    for key in ("first", "second"):  # the same weights entered from two runs are one model
        with journal.run("train", key=f"{key}-train", kind="train") as train:
            base7 = train.model("base7", checkpoint, SHA["base7"], parents={"beta7": SHA["beta7"]})
        with journal.run("release", key=key, kind="release") as run:
            model_id = run.model(
                "gamma-rev1.0",
                checkpoint,
                SHA["gamma"],
                parents={name: SHA[name] for name in ("beta7", "anxl3", "anxl2", "base7")},
                registered_as="gamma_tiny",
                aliases=["candidate", "rel-1_0"],
                note="the formula",
                params={"a": 0.8},
                metrics={"tag_recall": Measurement(0.8, 0.7, 0.9, 48)},
            )
        found = client.get_run(run.id)
        assert [made.model_id for made in found.outputs.model_outputs] == [model_id]
        names = {client.get_logged_model(used.model_id).name for used in found.inputs.model_inputs}
        assert names == {"beta7", "anxl3", "anxl2", "base7"}
        assert base7 in {used.model_id for used in found.inputs.model_inputs}
    model = client.get_logged_model(model_id)
    assert str(model.status) == "READY"
    assert model.tags["sha256"] == SHA["gamma"]
    assert {metric.key: metric.value for metric in model.metrics}["tag_recall_lo"] == 0.7
    listed = {file.path: file.file_size for file in client.list_logged_model_artifacts(model_id)}
    assert listed["gamma-rev1.0.safetensors"] == len(b"weights")
    place = Path(url2pathname(urlparse(model.artifact_location).path))
    assert os.path.samefile(place / "gamma-rev1.0.safetensors", checkpoint)
    (version,) = client.search_model_versions("name = 'gamma_tiny'")
    assert (version.description, version.tags["sha256"]) == ("the formula", SHA["gamma"])
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "gamma_tiny", "version": version.version}]
    for alias in ("candidate", "rel-1_0"):
        assert client.get_model_version_by_alias("gamma_tiny", alias).version == version.version
    assert not journal.troubles


@pytest.mark.parametrize("alias", ["1.0", "latest", "v3", ""])
def test_an_alias_that_mlflow_would_refuse_is_refused_before_anything_is_written(journal, root, alias):
    (root / "m.safetensors").write_bytes(b"w")
    with journal.run("release", key="k", kind="release") as run, pytest.raises(BadSetting):
        run.model("m", root / "m.safetensors", SHA["gamma"], registered_as="m", aliases=[alias])


def test_a_checkpoint_is_never_copied(journal, root):
    with journal.run("release", key="k", kind="release") as run, pytest.raises(BadSetting, match=r"run\.model"):
        run.file(root / "gamma.safetensors")


def test_a_view_is_what_mlflow_can_search_by(journal, client):
    with journal.run("chain", key="c", kind="chain") as chain:
        for a in (0.4, 0.8):
            with journal.run(f"a {a}", key=f"{a}", kind="point", parent=chain, params={"a": a}) as point:
                point.metrics({"score": a})
        with journal.run("train", key="t", kind="train", parent=chain):
            pass
        view = chain.view("sweep", "point", order_by="score", params=["a"], metrics=["score"])
    state = json.loads(client.get_experiment(journal.experiment_id).tags[f"mlflow.sharedViewState.{view}"])
    order = [f"{state['orderByKey']} {'ASC' if state['orderByAsc'] else 'DESC'}"]
    found = client.search_runs([journal.experiment_id], state["searchFilter"], order_by=order)
    assert [run.info.run_name for run in found] == ["a 0.8", "a 0.4"]


@pytest.mark.parametrize("uri", ["sqlite:////proc/nowhere/mlflow.db", "http://127.0.0.1:9"])
def test_without_mlflow_the_work_goes_on_and_the_loss_is_told(tmp_path, monkeypatch, caplog, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "m.safetensors").write_bytes(b"w")
    with caplog.at_level(logging.WARNING):
        journal = Journal.open(tmp_path, "gamma")
    assert "NOTHING MORE IS JOURNALED" in caplog.text
    with journal.run("train", key="k", kind="train", params={"a": 1}) as run:
        run.metrics({"loss": 1.0})
        run.picture("p", Image.new("RGB", (4, 4)))
        run.hit()
        assert run.model("m", tmp_path / "m.safetensors", SHA["gamma"]) == ""
    assert len(journal.troubles) == 1


def test_when_mlflow_fails_on_the_way_it_is_told_once_and_the_next_start_completes_the_run(
    root, client, request, caplog
):
    journal = Journal.open(root, request.node.name)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    with journal.run("train", key="k", kind="train") as run:
        real, journal.client.log_text = journal.client.log_text, fail
        run.text("a", "a.txt")
        run.text("b", "b.txt")
    journal_client = MlflowClient(journal.uri)
    assert real
    assert len(journal.troubles) == 1
    assert caplog.text.count("No space left") == 1
    assert journal_client.get_run(run.id).info.status == "RUNNING"
    with Journal.open(root, request.node.name).run("train", key="k", kind="train") as again:
        assert again.id == run.id
        again.text("a", "a.txt")
    assert client.get_run(run.id).info.status == "FINISHED"


def test_mlflow_tracking_uri_is_respected_and_made_absolute(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://tracking.example/x")
    assert tracking_uri(tmp_path) == "https://tracking.example/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(Path("/elsewhere")) == f"sqlite:///{tmp_path}/other.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlruns/mlflow.db"


def test_a_second_pass_over_thirty_finished_runs_is_cheap(journal):
    def chain() -> float:
        start = time.process_time()
        with journal.run("chain", key="c", kind="chain") as parent:
            for number in range(30):
                with journal.run(f"p{number}", key=f"p{number}", kind="point", parent=parent, params={"a": 1}) as run:
                    run.metrics({"score": 1.0, "fid": 2.0})
        return time.process_time() - start

    chain()
    assert chain() < 3  # processor seconds; 0.25 on a quiet machine, of the demo's 20


def test_a_run_that_two_processes_write_keeps_one_of_each(root, client, journal, request):
    """The second has taken the run up; the first still thinks that it is alone."""
    with journal.run("r", key="k", kind="point") as run:
        other = Journal.open(root, request.node.name)
        with other.run("r", key="k", kind="point", params={"a": 1}) as same:
            same.metrics({"score": Measurement(0.5, 0.4, 0.6, 8)})
        run.params({"a": 1})
        run.metrics({"score": Measurement(0.5, 0.4, 0.6, 8)})
    assert not journal.troubles
    found = client.get_run(run.id)
    assert found.data.params == {"a": "1"}
    assert found.data.metrics == {"score": 0.5, "score_lo": 0.4, "score_hi": 0.6, "score_n": 8.0}


def test_a_refused_parameter_takes_no_number_along(journal, client):
    with journal.run("r", key="k", kind="point", params={"a": 1}) as run:
        run.params({"a": 2})  # MLflow keeps the first value
        run.metrics({"score": 0.5})
        run.tags({"note": "x" * 9000, "x": 1})
    assert len(journal.troubles) == 1
    assert "refused" in journal.troubles[0]
    found = client.get_run(run.id)
    assert (found.info.status, found.data.params, found.data.metrics) == ("FINISHED", {"a": "1"}, {"score": 0.5})
    assert (len(found.data.tags["note"]), found.data.tags["x"]) == (8000, "1")


def point_costs(journal: Journal, numbers: range) -> list[float]:
    """Processor seconds of points with 40 parameters and 40 numbers each."""
    costs = []
    for number in numbers:
        start = time.process_time()
        with journal.run(f"p{number}", key=f"p{number}", kind="point", params={f"p{k}": k for k in range(40)}) as run:
            run.metrics({f"m{k}": Measurement(number, number - k, number + k, 8) for k in range(10)})
        costs.append(time.process_time() - start)
    return costs


def test_a_point_of_forty_parameters_and_forty_numbers_costs_less_than_a_tenth_of_a_second(journal, client):
    costs = point_costs(journal, range(12))
    assert sorted(costs)[len(costs) // 2] < 0.1  # 0.05 on a quiet machine
    runs = client.search_runs([journal.experiment_id])
    assert {(len(run.data.params), len(run.data.metrics)) for run in runs} == {(40, 40)}


@pytest.mark.slow
def test_among_a_thousand_runs_a_point_costs_what_it_did_before(journal, client):
    first = sorted(point_costs(journal, range(20)))[10]
    for number in range(1000):
        client.create_run(journal.experiment_id, tags={"ag.key": f"other {number}", "ag.kind": "point"})
    assert sorted(point_costs(journal, range(20, 40)))[10] < 2 * first
