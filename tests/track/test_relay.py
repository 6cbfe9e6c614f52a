"""A relayed journal leaves the same record as one that is kept where the work is done."""

import io
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ambergrade.nouns import Measurement
from ambergrade.track import relay
from ambergrade.track.journal import Journal
from ambergrade.track.relay import Relayed, Scribe
from ambergrade.track.run import Run

pytestmark = pytest.mark.usefixtures("quick_database")


@pytest.fixture(autouse=True)
def _local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")


def relayed(scribe: Scribe, root: Path) -> Relayed:
    """Through bytes, as between processes."""
    return Relayed(lambda message: scribe.hear(pickle.loads(pickle.dumps(message))), root)


def point(journal: Journal, sweep: Run, picture: Path, fails: bool = False) -> None:
    """All that a point tells."""
    with journal.run("a 0.8", key="p", kind="point", parent=sweep, params={"a": 0.8}) as run:
        with journal.run("a 0.8", key="s", kind="scoring", parent=run, tags={"x": "y"}) as stage:
            stage.hit()
            stage.datasets({"prompts": "0" * 64})
            if fails:
                raise ValueError("numbers")
        run.tags({"ag.cache": "hit"})
        run.metrics({"score": Measurement(0.5, 0.4, 0.6, 8), "loss": 1.0}, step=3)
        run.picture("sweep/1", picture)
        run.picture("sweep/2", Image.new("RGB", (4, 4), "red"))
        run.note("a note")
        run.text("text", "t.txt")
        run.params({"b": 1})


def seen(journal: Journal) -> list[Any]:
    """Everything of every run that is not its id, its time or its process."""
    found = []
    names = {run.info.run_id: run.data.tags["ag.key"] for run in journal.search("")}
    mine = ("ag.process", "ag.origin", "mlflow.runName", "mlflow.parentRunId", "mlflow.source.name")
    for run in journal.search(""):
        files = [file.path for file in journal.client.list_artifacts(run.info.run_id)]
        pictures = [Path(f.path).name for f in journal.client.list_artifacts(run.info.run_id, "images")]
        found.append(
            {
                "name": run.info.run_name,
                "status": run.info.status,
                "above": names.get(run.data.tags.get("mlflow.parentRunId")),
                "tags": {key: value for key, value in run.data.tags.items() if key not in mine},
                "params": run.data.params,
                "metrics": run.data.metrics,
                "inputs": [used.dataset.digest for used in run.inputs.dataset_inputs],
                "files": files,
                "pictures": sorted(name.partition("+timestamp")[0] for name in pictures),
            }
        )
    return sorted(found, key=lambda row: row["tags"]["ag.key"])


@pytest.mark.parametrize("fails", [False, True])
def test_the_record_is_that_of_a_journal_at_hand(tmp_path: Path, fails: bool) -> None:
    records = []
    for name in ("at hand", "relayed"):
        Image.new("RGB", (4, 4), "blue").save(tmp_path / "picture.png")
        journal = Journal.open(tmp_path / name, "r")
        with journal.run("sweep", key="k", kind="sweep") as sweep:
            used = journal if name == "at hand" else relayed(Scribe(journal), journal.root)
            try:
                point(used, used.attached(sweep.id, sweep.name, sweep.key), tmp_path / "picture.png", fails)
            except ValueError:
                assert fails
        assert not journal.troubles
        records.append(seen(journal))
    assert records[0] == records[1]
    assert [row["status"] for row in records[1]] == ["FINISHED", *2 * ["FAILED" if fails else "FINISHED"]]
    assert [row["above"] for row in records[1]] == [None, "k", "p"]


def test_a_finished_run_is_left_alone_and_an_unfinished_one_is_taken_up(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, "r")
    for score in (1.0, 2.0):
        with relayed(Scribe(journal), tmp_path).run("a", key="p", kind="point") as run:
            run.metrics({"score": score})
    (only,) = journal.search("")
    assert only.data.metrics == {"score": 1.0}
    with pytest.raises(KeyboardInterrupt), relayed(Scribe(journal), tmp_path).run("b", key="q", kind="point"):
        raise KeyboardInterrupt
    with relayed(Scribe(journal), tmp_path).run("b", key="q", kind="point") as run:
        run.metrics({"score": 3.0})
    (taken,) = journal.search("tags.\"ag.key\" = 'q'")
    assert (taken.info.status, taken.data.metrics, "ag.reason" in taken.data.tags) == (
        "FINISHED",
        {"score": 3.0},
        False,
    )


def test_what_a_dead_process_left_open_ends_as_killed(tmp_path: Path) -> None:
    """By the keeper, or by the next command's reaper: the run belongs to the process that drew."""
    child = textwrap.dedent("""
        import os, pickle, signal, sys
        from pathlib import Path
        from ambergrade.track.relay import Relayed
        journal = Relayed(lambda message: pickle.dump(message, sys.stdout.buffer), Path(sys.argv[1]))
        with journal.run("a", key="p", kind="point") as run, journal.run("a", key="s", kind="scoring", parent=run):
            sys.stdout.flush()
            assert not [name for name in sys.modules if name.partition(".")[0] in ("mlflow", "sqlalchemy", "torch")]
            os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", child, str(tmp_path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    for ends in (Scribe.lose, lambda scribe: Journal.open(tmp_path, "r")):
        journal = Journal.open(tmp_path, "r")
        scribe = Scribe(journal)
        for message in unpickled(done.stdout):
            scribe.hear(message)
        assert {run.info.status for run in journal.search("")} == {"RUNNING"}
        ends(scribe)
        assert [(r.info.status, r.data.tags["ag.reason"]) for r in journal.search("")] == [
            ("KILLED", "its process is gone")
        ] * 2


def unpickled(data: bytes) -> list[relay.Message]:
    stream, found = io.BytesIO(data), []
    while stream.tell() < len(data):
        found.append(pickle.load(stream))
    return found


@pytest.mark.parametrize("call", [lambda run: run.view("v"), lambda run: run.file(Path("x"))])
def test_what_cannot_be_sent_is_refused(tmp_path: Path, call: Callable[[Run], Any]) -> None:
    scribe = Scribe(Journal(None, "", "", tmp_path))
    journal = relayed(scribe, tmp_path)
    with pytest.raises(TypeError, match="where the journal is kept"), journal.run("a", key="p", kind="x") as run:
        call(run)
