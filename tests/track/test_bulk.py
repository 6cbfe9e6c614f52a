"""Rows that are written at once: the database is as MLflow's own client would have left it."""

import math
import sqlite3
from pathlib import Path

import pytest

from ambergrade.nouns import Measurement
from ambergrade.track import bulk
from ambergrade.track.database import MlflowClient, entities
from ambergrade.track.journal import Journal

pytestmark = pytest.mark.usefixtures("quick_database")
TABLES = {
    "params": "key, value",
    "metrics": "key, value, timestamp, step, is_nan",
    "latest_metrics": "key, value, timestamp, step, is_nan",
}


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Journal:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return Journal.open(tmp_path, "bulk")


def rows(journal: Journal, run_id: str) -> dict[str, list]:
    with sqlite3.connect(journal.root / "mlruns" / "mlflow.db") as database:
        return {
            table: sorted(database.execute(f"select {columns} from {table} where run_uuid = ?", (run_id,)))
            for table, columns in TABLES.items()
        }


def test_rows_are_those_of_mlflows_own_client(journal: Journal) -> None:
    client: MlflowClient = journal.client
    metrics = [entities.Metric(f"m {k}", value, 1_700_000_000_000 + k, k) for k, value in enumerate([0.25, -1e300, 7])]
    metrics.append(entities.Metric("lost", math.nan, 1_700_000_000_000, 0))
    params = [entities.Param("a", "0.8"), entities.Param("long", "x" * 6000), entities.Param("sampler/steps", "4")]
    ours, theirs = (client.create_run(journal.experiment_id).info.run_id for _ in range(2))
    assert bulk.insert(client, ours, metrics, params)
    client.log_batch(theirs, metrics, params)
    assert rows(journal, ours) == rows(journal, theirs)
    assert len(rows(journal, ours)["latest_metrics"]) == 4
    # and MLflow goes on from there as from its own
    for run_id in (ours, theirs):
        client.log_batch(run_id, [entities.Metric("m 0", 0.5, 1_700_000_000_009, 9)])
    assert rows(journal, ours) == rows(journal, theirs)


def test_what_is_there_already_is_left_to_mlflow_and_nothing_is_half_written(journal: Journal) -> None:
    client: MlflowClient = journal.client
    run_id = client.create_run(journal.experiment_id).info.run_id
    client.log_batch(run_id, params=[entities.Param("a", "1")])
    before = rows(journal, run_id)
    new = entities.Metric("m", 1.0, 1, 0)
    assert not bulk.insert(client, run_id, [new], [entities.Param("b", "2"), entities.Param("a", "1")])
    assert not bulk.insert(client, run_id, [new, entities.Metric("m", 2.0, 2, 1)], [])
    assert rows(journal, run_id) == before
    with pytest.raises(Exception, match="exceeds the maximum length"):
        bulk.insert(client, run_id, [], [entities.Param("c", "x" * 6001)])


def test_a_run_that_two_processes_write_keeps_one_of_each(journal: Journal) -> None:
    """The second has taken the run up; the first still thinks that it is alone."""
    with journal.run("r", key="k", kind="point") as run:
        other = Journal.open(journal.root, "bulk")
        with other.run("r", key="k", kind="point", params={"a": 1}) as same:
            same.metrics({"score": Measurement(0.5, 0.4, 0.6, 8)})
        run.params({"a": 1})
        run.metrics({"score": Measurement(0.5, 0.4, 0.6, 8)})
    assert not journal.troubles
    found = journal.client.get_run(run.id)
    assert found.data.params == {"a": "1"}
    assert found.data.metrics == {"score": 0.5, "score_lo": 0.4, "score_hi": 0.6, "score_n": 8.0}


def test_runs_are_found_by_key_as_mlflow_finds_them(journal: Journal) -> None:
    made = []
    for key in ("k", "k", "other"):
        tags = {"ag.key": key, "note": "k"}
        made.append(journal.client.create_run(journal.experiment_id, tags=tags).info.run_id)
    gone = journal.client.create_run(journal.experiment_id, tags={"ag.key": "k"}).info.run_id
    journal.client.delete_run(gone)
    elsewhere = Journal.open(journal.root, "elsewhere")
    elsewhere.client.create_run(elsewhere.experiment_id, tags={"ag.key": "k"})
    found = bulk.runs_of(journal.client, journal.experiment_id, "k")
    assert (
        sorted(found) == sorted(made[:2]) == sorted(run.info.run_id for run in journal.search("tags.\"ag.key\" = 'k'"))
    )
