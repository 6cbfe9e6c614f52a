"""Workers that all find nothing, and make database, experiment, parent and points at the same instant."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ambergrade.track.database import MlflowClient

WORKERS = 8
TRIES = 20


def started_at_once(roots: list[Path], workers: int, **environment: str) -> list[dict]:
    """What the workers said, root by root."""
    outside = {**os.environ, "MLFLOW_TRACKING_URI": "", **environment}
    command = [sys.executable, str(Path(__file__).with_name("at_once.py")), str(workers), *map(str, roots)]
    done = subprocess.run(command, env=outside, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(client: MlflowClient, said: dict, workers: int) -> None:
    """No worker failed: one experiment, one parent, one shared run, and every point below the parent."""
    assert said["codes"] == [0] * workers
    assert [troubles for *_, troubles in said["said"] if troubles] == []
    experiment = client.get_experiment_by_name("gamma")
    assert {found.name for found in client.search_experiments()} == {"Default", "gamma"}
    assert client.search_runs(["0"]) == []
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    assert len(runs) == workers + 2
    (parent,) = {sweep for _, _, sweep, _, _ in said["said"]}
    assert len({shared for *_, shared, _ in said["said"]}) == 1
    for number, point, *_ in said["said"]:
        run = runs[point]
        assert run.data.tags["mlflow.parentRunId"] == parent
        assert run.data.params == {"a": str(number)}
        found = {"score": number, "score_lo": number - 0.5, "score_hi": number + 0.5, "score_n": 8}
        assert run.data.metrics == found
    assert {run.info.status for run in runs.values()} == {"FINISHED"}


@pytest.mark.slow
def test_eight_workers_on_a_fresh_root_never_fail_and_meet_in_one_tree(tmp_path: Path) -> None:
    roots = [tmp_path / f"try {number}" for number in range(TRIES)]
    told = started_at_once(roots, WORKERS)
    assert len(told) == TRIES
    for root, said in zip(roots, told, strict=True):
        check(MlflowClient(f"sqlite:///{root}/mlruns/mlflow.db"), said, WORKERS)
