"""A database that was deleted comes back from what it was told: judged by MLflow's own client, before and after."""

import contextlib
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from ambergrade.errors import BadSetting
from ambergrade.nouns import Measurement
from ambergrade.store import Ledger, Outputs
from ambergrade.track import lines
from ambergrade.track.database import MlflowClient, tracking_uri
from ambergrade.track.journal import Journal
from ambergrade.track.rebuild import rebuild

REPOSITORY = Path(__file__).parents[2]
SHA = {name: f"{number:064x}" for number, name in enumerate(["beta7", "base7", "gamma", "delta"], start=1)}
PASSED, FAILED = {"floor": (True, "0.9")}, {"floor": (False, "0.1")}


pytestmark = pytest.mark.usefixtures("quick_database")


@pytest.fixture(autouse=True)
def _local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")  # what a test sets is undone


def client(root: Path) -> MlflowClient:
    return MlflowClient(tracking_uri(root))


def chain(root: Path) -> None:
    """A small chain: a training with a curve, points, a second chain that hits, a failure, releases with gates."""
    journal = Journal.open(root, "gamma")
    checkpoint = root / "base7.safetensors"
    checkpoint.write_bytes(b"base7")
    merged = {name: root / f"{name}.safetensors" for name in ("gamma", "delta")}
    for name, file in merged.items():
        file.write_bytes(name.encode())
    ledger = Ledger(root / "mlruns")
    for name in ("gamma", "delta"):
        with journal.run(name, key=f"chain {name}", kind="chain", params={"formula": "x" * 7000}) as parent:
            parent.provenance({"a": 0.8}, ["a=0.8"])
            with journal.run("train base7", key="t", kind="train", parent=parent, params={"lr": 1e-4}) as run:
                if name == "delta":
                    run.hit()
                for step in range(1500):
                    run.metrics({"loss": 1 / (1 + step)}, step)
                run.metrics({"nothing": math.nan})
                run.datasets({"captions": SHA["beta7"]}, "training")
                run.model("base7", checkpoint, SHA["base7"], parents={"beta7": SHA["beta7"]})
            for a in (0.4, 0.8):
                done = ledger.once("point", 1, {"a": a}, {}, lambda scratch: Outputs(values={}))
                with journal.run(f"a {a}", key=done.identity, kind="point", parent=parent, params={"a": a}) as run:
                    run.metrics({"clip_score": Measurement(a, a - 0.1, a + 0.1, 48)})
                    run.picture("sweep/p1", Image.new("RGB", (8, 8), (int(100 * a), 0, 0)))
            with journal.run(f"release {name}", key=f"release {name}", kind="release", parent=parent) as run:
                run.model(
                    name,
                    merged[name],
                    SHA[name],
                    parents={"beta7": SHA["beta7"], "base7": SHA["base7"]},
                    registered_as="kohaku",
                    aliases=["candidate"],
                    note=f"formula of {name}",
                    params={"a": 0.8},
                    metrics={"clip_score": Measurement(0.3, 0.2, 0.4, 48)},
                )
            parent.view("sweep", "point", order_by="clip_score", params=["a"], metrics=["clip_score"])
        journal.gated("kohaku", SHA[name], PASSED if name == "gamma" else FAILED)
    asked = client(root)
    asked.set_model_version_tag("kohaku", "2", "veto", "six fingers")
    asked.set_model_version_tag("kohaku", "1", "seen_by", "Kay")
    for name in ("gamma", "delta"):
        journal.gated("kohaku", SHA[name], PASSED if name == "gamma" else FAILED)
    asked.delete_model_version_tag("kohaku", "2", "veto")
    journal.gated("kohaku", SHA["delta"], FAILED)
    with pytest.raises(ValueError), journal.run("broken", key="b", kind="chain"):
        raise ValueError("no such file")
    assert not journal.troubles


def seen(root: Path) -> dict[str, object]:
    """Everything that MLflow shows, without the ids that it gave."""
    asked = client(root)
    (experiment,) = [found for found in asked.search_experiments() if found.name == "gamma"]
    runs = {run.info.run_id: run for run in asked.search_runs([experiment.experiment_id], max_results=1000)}
    names = {run_id: run.info.run_name for run_id, run in runs.items()}

    def path(run_id: str) -> str:
        above = runs[run_id].data.tags.get("mlflow.parentRunId")
        return (f"{path(above)}/" if above else "") + names[run_id]

    def tags(run_id: str) -> dict[str, str]:
        found = {key: value for key, value in runs[run_id].data.tags.items() if key != "ag.rebuilt_from"}
        for key in ("mlflow.parentRunId", "ag.origin"):
            if key in found:
                found[key] = path(found[key])
        return found

    def files(run_id: str, folder: str = "") -> dict[str, bytes]:
        found = {}
        for file in asked.list_artifacts(run_id, folder):
            if file.is_dir:
                found |= files(run_id, file.path)
            else:
                found[file.path] = Path(asked.download_artifacts(run_id, file.path)).read_bytes()
        return found

    def made(run_id: str) -> dict[str, object]:
        run = runs[run_id]
        history = {
            key: [(point.step, str(point.value)) for point in asked.get_metric_history(run_id, key)]
            for key in run.data.metrics
        }
        times = [point.timestamp for point in asked.get_metric_history(run_id, "loss")]
        inputs = {asked.get_logged_model(used.model_id).tags["sha256"] for used in run.inputs.model_inputs}
        models = [asked.get_logged_model(used.model_id) for used in run.outputs.model_outputs]
        return {
            "status": (run.info.status, run.info.start_time, run.info.end_time),
            "params": run.data.params,
            "tags": tags(run_id),
            "metrics": history,
            "times": times,
            "data": [
                (d.dataset.name, d.dataset.digest, {t.key: t.value for t in d.tags}) for d in run.inputs.dataset_inputs
            ],
            "files": files(run_id),
            "inputs": inputs,
            "models": [
                (
                    model.name,
                    model.tags["sha256"],
                    model.params,
                    {metric.key: metric.value for metric in model.metrics or []},
                    [file.path for file in asked.list_logged_model_artifacts(model.model_id)],
                )
                for model in models
            ],
        }

    versions = [
        (int(v.version), v.description, sorted(v.tags.items()), asked.get_run(v.run_id).info.run_name)
        for v in asked.search_model_versions("name = 'kohaku'")
    ]
    views = []
    for key, value in asked.get_experiment(experiment.experiment_id).tags.items():
        if key.startswith("mlflow.sharedViewState."):
            state = json.loads(value)
            parent = state["searchFilter"].split("'")[1]
            views.append({**state, "searchFilter": state["searchFilter"].replace(parent, path(parent))})
    return {
        "runs": {path(run_id): made(run_id) for run_id in runs},
        "versions": sorted(versions),
        "aliases": asked.get_registered_model("kohaku").aliases,
        "views": sorted(views, key=str),
    }


def differing(one: object, other: object, place: str = "") -> list[str]:
    """Where two nested values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = [f"{place}/{key}" for key in one.keys() ^ other.keys()]
        return found + [
            line for key in one.keys() & other.keys() for line in differing(one[key], other[key], f"{place}/{key}")
        ]
    return [] if one == other else [f"{place}: {one} {other}"[:2000]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    place = tmp_path / "a root é"
    place.mkdir()
    chain(place)
    return place


def on_disk(folder: Path) -> int:
    """Bytes of all files; one that has several names counts once."""
    found = [file.stat() for file in folder.rglob("*") if file.is_file()]
    return sum({(stat.st_dev, stat.st_ino): stat.st_size for stat in found}.values())


def lose_database(root: Path) -> None:
    """From now on there is another one, empty: this process would go on with the open file of a deleted one."""
    number = len(list((root / "mlruns").glob("*.db")))
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{root}/mlruns/another-{number}.db"


def test_a_deleted_database_comes_back_as_it_was_and_a_second_time_too(root: Path) -> None:
    before = seen(root)
    size = on_disk(root / "mlruns" / "artifacts")
    assert before["aliases"] == {"candidate": 2, "champion": 1}
    assert len(before["runs"]) == 11  # type: ignore[arg-type]
    for _ in range(2):
        lose_database(root)
        done = rebuild(root)
        assert (done.runs, done.models, done.there, done.from_records, done.missing) == (11, 4, 0, 0, [])
        after = seen(root)
        assert differing(before, after) == []
    assert len(list(lines.folder(root).glob("*.jsonl"))) == 12  # one a run, and the registry's
    assert on_disk(root / "mlruns" / "artifacts") == pytest.approx(
        size, rel=0.01
    )  # files are linked to their new place
    again = rebuild(root)
    assert (again.runs, again.there) == (0, 11)
    assert seen(root) == after


def test_a_rebuild_that_is_killed_goes_on_and_a_finished_run_is_taken_up_as_before(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = seen(root)
    lose_database(root)
    calls = []

    def dies(self, *arguments, **keywords):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, *arguments, **keywords)

    real = MlflowClient.set_terminated
    monkeypatch.setattr(MlflowClient, "set_terminated", dies)
    with pytest.raises(KeyboardInterrupt):
        rebuild(root)
    monkeypatch.setattr(MlflowClient, "set_terminated", real)
    done = rebuild(root)
    assert (done.runs, done.there) == (7, 4)
    assert differing(before, seen(root)) == []
    journal = Journal.open(root, "gamma")
    with journal.run("gamma", key="chain gamma", kind="chain") as parent:
        assert parent.done
        with journal.run("train base7", key="t", kind="train", parent=parent) as run:
            assert run.done


def everything(root: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file of a root, with its inode, time of change and bytes."""
    found = {path: path.stat() for path in root.rglob("*") if path.is_file()}
    return {str(path): (stat.st_ino, stat.st_mtime_ns, path.read_bytes()) for path, stat in found.items()}


def as_earlier_versions_wrote(root: Path, named: Path) -> None:
    """Whole paths in the lines, those of `named`."""
    for file in lines.folder(root).glob("*.jsonl"):
        events = lines.read(file)
        for event in events:
            if "run" in event:
                event["run"]["artifacts"] = (named / event["run"]["artifacts"]).as_uri()
            for model in event.get("models", ()):
                model["path"] = str(named / model["path"])
        file.write_text("".join(json.dumps(event, ensure_ascii=False) + "\n" for event in events))


@pytest.mark.parametrize("earlier", [False, True])
def test_a_copied_root_is_rebuilt_from_its_own_files_and_the_original_stays_as_it_was(
    root: Path, tmp_path: Path, earlier: bool
) -> None:
    before = seen(root)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("*.db*"))
    if earlier:
        as_earlier_versions_wrote(copy, root)
    for picture in (copy / "mlruns" / "artifacts").rglob("overrides.yaml"):
        picture.write_text("- of=the copy\n")
    untouched = everything(root)
    done = rebuild(copy)
    assert (done.runs, done.models, done.missing) == (11, 4, [])
    assert everything(root) == untouched
    after = seen(copy)
    for versions in (before["versions"], after["versions"]):
        for _, _, tags, _ in versions:  # type: ignore[attr-defined]
            tags[:] = [(key, value) for key, value in tags if key != "uri"]
    differences = differing(before, after)
    assert [line.partition(":")[0] for line in sorted(differences)] == [
        f"/runs/{name}/files/overrides.yaml" for name in ("delta", "gamma")
    ]
    for model in client(copy).search_logged_models([client(copy).get_experiment_by_name("gamma").experiment_id]):
        assert str(root) not in str(model.to_dictionary())


def test_a_root_that_was_copied_with_its_database_is_refused_before_it_writes_to_the_original(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Journal.open(tmp_path / "one", "gamma").run("a", key="a", kind="chain") as run:
        run.text("x", "x.txt")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    untouched = everything(tmp_path / "one")
    journal = Journal.open(tmp_path / "two", "gamma")
    with journal.run("b", key="b", kind="chain") as run:
        run.text("y", "y.txt")
    assert journal.client is None
    assert "was copied or moved" in caplog.text
    assert "reindex" in caplog.text
    assert everything(tmp_path / "one") == untouched
    lose_database(tmp_path / "two")
    assert rebuild(tmp_path / "two").runs == 1


@pytest.mark.parametrize(
    "artifacts", ["../one/mlruns/artifacts/gamma/ID/artifacts", "file:///etc/mlruns/x/../artifacts"]
)
def test_lines_that_lead_out_of_the_root_are_not_followed(tmp_path: Path, artifacts: str) -> None:
    with Journal.open(tmp_path / "one", "gamma").run("a", key="a", kind="chain") as run:
        run.text("x", "x.txt")
    shutil.copytree(tmp_path / "one", tmp_path / "two", ignore=shutil.ignore_patterns("*.db*", "artifacts"))
    file = lines.folder(tmp_path / "two") / f"{run.id}.jsonl"
    events = lines.read(file)
    events[0]["run"]["artifacts"] = artifacts.replace("ID", run.id)
    file.write_text("".join(json.dumps(event) + "\n" for event in events))
    done = rebuild(tmp_path / "two")
    assert done.runs == 1
    assert [line.partition(":")[0] for line in done.missing] == ["1 files of a"]


def test_while_a_run_is_open_nothing_is_rebuilt(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, "gamma")
    with journal.run("chain", key="c", kind="chain"), pytest.raises(BadSetting, match="is open in process"):
        rebuild(tmp_path)


def test_a_killed_run_comes_back_as_killed_and_a_lost_checkpoint_is_told(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, "gamma")
    (tmp_path / "m.safetensors").write_bytes(b"weights")
    with journal.run("chain", key="c", kind="chain") as run:
        run.model("m", tmp_path / "m.safetensors", SHA["gamma"])
    file = lines.folder(tmp_path) / f"{run.id}.jsonl"
    kept = [line for line in file.read_text().splitlines() if "FINISHED" not in line]
    dead = kept[0].replace(f'"ag.process": "{os.getpid()} ', '"ag.process": "1 0')
    assert dead != kept[0]
    file.write_text("\n".join([dead, *kept[1:], '{"cut sho']) + "\n")
    lose_database(tmp_path)
    (tmp_path / "m.safetensors").unlink()
    shutil.rmtree(tmp_path / "mlruns" / "artifacts" / "gamma" / "models")
    done = rebuild(tmp_path)
    assert done.runs == 1
    assert len(done.missing) == 1
    assert "is gone" in done.missing[0]
    (found,) = client(tmp_path).search_runs(["1"])
    assert found.info.status == "KILLED"


def test_where_the_files_are_gone_too_pictures_come_from_the_store_and_the_rest_is_told(tmp_path: Path) -> None:
    def work(scratch: Path) -> Outputs:
        Image.new("RGB", (16, 8), (9, 8, 7)).save(scratch / "strip.png")
        return Outputs({"pictures": scratch / "strip.png"})

    done = Ledger(tmp_path / "mlruns").once("point", 1, {}, {}, work)
    journal = Journal.open(tmp_path, "gamma")
    with journal.run("chain", key="c", kind="chain") as chain:
        chain.text("x", "config.yaml")
        with journal.run("a 0.8", key=done.identity, kind="point", parent=chain) as run:
            run.picture("sweep/p1", Image.new("RGB", (8, 8)))
            run.picture("sweep/p2", Image.new("RGB", (8, 8)))
    with journal.run("bare", key="b", kind="chain"):
        pass
    lose_database(tmp_path)
    shutil.rmtree(tmp_path / "mlruns" / "artifacts")
    missing = rebuild(tmp_path).missing
    assert [line.partition(":")[0] for line in missing] == ["1 files of chain", "2 files of a 0.8"]
    assert missing[1].endswith("its pictures are the store's")
    asked = client(tmp_path)
    (point,) = asked.search_runs(["1"], "tags.\"ag.kind\" = 'point'")
    (picture,) = [file.path for file in asked.list_artifacts(point.info.run_id, "images") if file.path.endswith(".png")]
    with Image.open(asked.download_artifacts(point.info.run_id, picture)) as found:
        assert found.getpixel((0, 0)) == (9, 8, 7)


def test_stages_that_mlflow_never_heard_of_come_from_their_records(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "mlruns")
    number = {"value": 0.5, "low": 0.4, "high": None, "n": 48, "higher_is_better": True}

    def work(scratch: Path) -> Outputs:
        Image.new("RGB", (16, 8)).save(scratch / "strip.png")
        return Outputs({"pictures": scratch / "strip.png"}, {"aggregates": {"clip_score": number}})

    settings = {"recipe": {"coefficients": {"a": 0.8, "b": 0.5}}}
    done = ledger.once("point", 1, settings, {"prompts": SHA["beta7"]}, work)
    heard = ledger.once("merge", 1, {}, {}, lambda scratch: Outputs())
    with Journal.open(tmp_path, "gamma").run("merge", key=heard.identity, kind="merge"):
        pass
    shutil.rmtree(lines.folder(tmp_path))  # the record of a version that kept no lines
    for expected in (1, 0):
        assert rebuild(tmp_path).from_records == expected
    runs = client(tmp_path).search_runs(["1", "2"])
    (run,) = [run for run in runs if run.data.tags["ag.kind"] == "point"]
    assert sorted(run.data.tags["ag.kind"] for run in runs) == ["merge", "point", "records"]
    assert (run.info.run_name, run.data.tags["ag.key"]) == ("a 0.8, b 0.5", done.identity)
    assert run.data.params == {"a": "0.8", "b": "0.5"}
    found = run.data.metrics
    assert (found["clip_score"], found["clip_score_lo"], found["clip_score_n"]) == (0.5, 0.4, 48)
    assert len(client(tmp_path).list_artifacts(run.info.run_id, "images")) == 2


def test_the_command_rebuilds_a_file_that_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "pipelines/reindex.py", f"root={tmp_path}"]
    told_off = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert told_off.returncode == 1
    assert told_off.stderr.startswith("There are no records at ")
    with Journal.open(tmp_path, "gamma").run("chain", key="c", kind="chain", params={"a": 1}) as run:
        run.metrics({"score": Measurement(0.5, 0.4, 0.6, 8)})
    for file in (tmp_path / "mlruns").glob("mlflow.db*"):
        file.unlink()
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert "1 runs and 0 models told again, 0 runs were there" in done.stdout, done.stderr
    with contextlib.closing(sqlite3.connect(tmp_path / "mlruns" / "mlflow.db")) as database:
        assert database.execute("SELECT name, status FROM runs").fetchall() == [("chain", "FINISHED")]
        found = dict(database.execute("SELECT key, value FROM latest_metrics").fetchall())
    assert found == {"score": 0.5, "score_lo": 0.4, "score_hi": 0.6, "score_n": 8}
