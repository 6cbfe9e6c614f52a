"""Kills at random instants, under each launcher: the same command finishes as if nothing had happened."""

import itertools
import json
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

APP = Path(__file__).with_name("toy_sweep.py")
MARK = "AMBERGRADE_CHAOS"
ROLES = {
    "basic": {"point": r"multiprocessing\.spawn"},
    "joblib": {"point": r"popen_loky"},
    "submitit_local": {"point": r"submitit\.core\._submit", "worker": r"submitit\.local\._local"},
    "ray": {"point": r"ray::_run_job", "worker": r"raylet/raylet"},
}
INIT = "+hydra.launcher.ray.init"
MORE = {
    "basic": [],
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit_local": [],
    "ray": [f"{INIT}.num_cpus=2", f"{INIT}.include_dashboard=false"],
}
LEFT = {"ray": 60}  # seconds until all are gone: Ray's agents, which draw nothing, look for their parent now and then
RAY = pytest.mark.skipif(
    find_spec("ray") is None or find_spec("hydra_plugins.hydra_ray_launcher") is None,
    reason="hydra-ray-launcher is not in the lock (docs/how-to/sweep.md says why); pip install '.[ray]' brings it",
)


def start(root: Path, launcher: str, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, str(APP), "--multirun", f"root={root}", f"hydra/launcher={launcher}", *overrides]
    root.mkdir(exist_ok=True)
    told = (root / "told").open("a")
    # Threads: workers of several threads each would make one core slower still.
    env = {**os.environ, MARK: str(root), "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    # A group of its own, as a shell gives it to a command: Ctrl-C goes to all of it.
    return subprocess.Popen([*command, *MORE[launcher]], stdout=told, stderr=told, env=env, process_group=0)


def living(root: Path) -> dict[int, str]:
    """Process ids and commands of all that the sweeps of this root have started and that still live."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={root}\0".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # gone meanwhile, or another user's
            continue
    return found


def gone(root: Path, seconds: float = 15) -> bool:
    end = time.monotonic() + seconds
    while living(root):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def outcomes(root: Path) -> dict[Path, tuple[str, int]]:
    """Text and time of every finished point's outcome."""
    found = {}
    for file in (root / "sweeps").glob("*/*/outcome.json"):
        text = file.read_text()
        if json.loads(text)["status"] == "done":
            found[file] = (text, file.stat().st_mtime_ns)
    return found


def scores(root: Path) -> dict[str, float]:
    """Label to score; each point has one folder."""
    found = {}
    for file in (root / "sweeps").glob("*/*/point.json"):
        label = json.loads(file.read_text())["label"]
        assert label not in found
        found[label] = json.loads(file.with_name("outcome.json").read_text())["value"]
    return found


def calls(root: Path) -> list[str]:
    file = root / "calls"
    return file.read_text().split() if file.exists() else []


def runs(root: Path) -> list[tuple]:
    """What MLflow's database says, read without MLflow: key, kind, state, parent's key, params and metrics."""
    with sqlite3.connect(root / "mlruns" / "mlflow.db") as database:
        rows = database.execute("select run_uuid, status from runs where lifecycle_stage = 'active'").fetchall()
        tags = {(run, key): value for key, value, run in database.execute("select key, value, run_uuid from tags")}
        params = database.execute("select run_uuid, key, value from params").fetchall()
        metrics = database.execute("select run_uuid, key, value from latest_metrics").fetchall()
    told = []
    for run, status in rows:
        parent = tags.get((run, "mlflow.parentRunId"))
        about = sorted((key, value) for owner, key, value in [*params, *metrics] if owner == run)
        told.append(
            (
                tags[run, "ag.key"],
                tags[run, "ag.kind"],
                status,
                tags.get((parent, "ag.key")),
                about,
                (run, "ag.reason") in tags,
            )
        )
    return sorted(told, key=str)


def until_a_point_is_open(root: Path, process: subprocess.Popen) -> None:
    while not (calls(root) and ("point", "RUNNING") in [row[1:3] for row in runs(root)]):
        time.sleep(0.2)
        assert process.poll() is None, (root / "told").read_text()


def finished_again(root: Path, launcher: str, overrides: list[str], attempts: int = 4) -> None:
    """The same command until it finishes; a killed point may have failed under the last."""
    for _ in range(attempts):
        if start(root, launcher, *overrides).wait(120) == 0:
            return
    raise AssertionError((root / "told").read_text()[-4000:])


def campaign(
    base: Path, launcher: str, overrides: list[str], kills: int, seed: int, wait: tuple[float, float]
) -> Iterator[Path]:
    """Yields finished sweeps, until so many living processes were killed at random instants while they were drawn."""
    rng = random.Random(seed)
    roles = [*ROLES[launcher], "parent"]
    waiting = list(itertools.islice(itertools.cycle(itertools.product(roles, (signal.SIGKILL, signal.SIGTERM))), kills))
    rng.shuffle(waiting)
    for number in itertools.count():
        root = base / f"{launcher}-{number}"
        process, known, drawn = start(root, launcher, *overrides), {}, {}
        while waiting:
            time.sleep(rng.uniform(*wait))
            if process.poll() == 0:
                break
            if process.poll() is not None:  # it ended by a kill, or with a failed point
                process = start(root, launcher, *overrides)
                continue
            role, number_of_signal = waiting[0]
            pattern = ROLES[launcher].get(role)
            found = [pid for pid, command in living(root).items() if pattern and re.search(pattern, command)]
            victim = process.pid if role == "parent" else rng.choice(found) if found else None
            try:
                os.kill(victim or 0, number_of_signal if victim else 0)
            except ProcessLookupError:
                continue
            if victim is None:
                continue
            waiting.pop(0)
            if role == "parent":
                process.wait(60)
                assert gone(root, LEFT.get(launcher, 15)), (launcher, living(root))  # no orphan goes on drawing
            now = outcomes(root)
            assert known.items() <= now.items()  # what was finished is as it was
            times = {path: calls(root).count(_x(path)) for path in known}
            assert all(times[path] == drawn[path] for path in known), (times, drawn)  # and was not drawn again
            known, drawn = now, {path: calls(root).count(_x(path)) for path in now}
        process.wait(120)
        finished_again(root, launcher, overrides)
        assert known.items() <= outcomes(root).items()
        assert gone(root, LEFT.get(launcher, 15)), living(root)
        yield root
        if not waiting:
            return


def _x(outcome: Path) -> str:
    return json.loads(outcome.with_name("point.json").read_text())["label"].removeprefix("x ")


POINTS = {"basic": 12, "joblib": 12, "submitit_local": 4, "ray": 12}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "kills"), [("basic", 18), ("joblib", 12), ("submitit_local", 8), pytest.param("ray", 6, marks=RAY)]
)
def test_kills_at_random_instants_leave_no_trace_in_the_outcomes(tmp_path, launcher, kills):
    points = POINTS[launcher]
    overrides = [f"x=range(0,{points})", "seconds=0.15"]
    for root in campaign(tmp_path, launcher, overrides, kills, 1, (0.1, 1.5)):
        assert scores(root) == {f"x {x}": float(x) for x in range(points)}
        assert json.loads((root / "result.json").read_text())["best"][1] == points - 1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    root = tmp_path_factory.mktemp("clean") / "root"
    assert start(root, "basic", *JOURNALED).wait(120) == 0, (root / "told").read_text()
    return runs(root)


JOURNALED = ["x=range(0,4)", "seconds=0.2", "journal=true"]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "kills"), [("basic", 6), ("joblib", 4), ("submitit_local", 3)])
def test_kills_leave_no_trace_in_mlflow(tmp_path, undisturbed, launcher, kills):
    assert [row[1:3] for row in undisturbed].count(("point", "FINISHED")) == 4
    for root in campaign(tmp_path, launcher, JOURNALED, kills, 2, (0.5, 6)):
        assert runs(root) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "how"),
    [
        *((launcher, "SIGTERM") for launcher in ROLES if launcher != "ray"),
        ("basic", "Ctrl-C"),
        ("joblib", "Ctrl-C"),
        pytest.param("ray", "SIGTERM", marks=RAY),
    ],
)
def test_a_sweep_that_is_asked_to_end_closes_its_runs_and_leaves_nobody_behind(tmp_path, launcher, how):
    process = start(tmp_path / "root", launcher, "x=range(0,2)", "seconds=60", "journal=true")
    until_a_point_is_open(tmp_path / "root", process)
    if how == "SIGTERM":
        process.terminate()
        assert process.wait(60) == 143
    else:
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) in (1, 130, -signal.SIGINT)
    assert gone(tmp_path / "root", LEFT.get(launcher, 15))
    states = {row[1:3] for row in runs(tmp_path / "root")}
    assert {kind for kind, _ in states} == {"sweep", "point"}
    # a worker that did not end in time was closed as KILLED by the reaper
    assert states <= {("sweep", "FAILED" if how == "SIGTERM" else "KILLED"), ("point", "FAILED"), ("point", "KILLED")}


def test_the_same_sweep_twice_at_once_draws_each_point_once(tmp_path):
    both = [start(tmp_path / "root", "basic", "x=range(0,5)", "seconds=0.2") for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert sorted(calls(tmp_path / "root")) == list("01234")
    told = (tmp_path / "root" / "told").read_text()
    assert "draws this sweep now; waiting for it" in told
    assert "5 of 5 points finished before" in told


def test_a_search_that_was_killed_retries_its_zombie_within_the_total(tmp_path):
    root, search = tmp_path / "root", ["hydra.sweeper.search.name=optuna", "+hydra.sweeper.search.sampler=tpe"]
    overrides = ["x=interval(0,1)", "seconds=0.3", *search, "+hydra.sweeper.search.trials=4"]
    process = start(root, "basic", *overrides)
    while len(calls(root)) < 2:
        time.sleep(0.02)
        assert process.poll() is None
    process.kill()
    process.wait()
    assert gone(root)
    assert start(root, "basic", *overrides).wait(60) == 0
    assert len(set(calls(root))) == 4  # points
    assert len(calls(root)) == 5  # and the second was drawn twice
    assert len(scores(root)) == len(outcomes(root)) == 4


@pytest.mark.slow
def test_a_submitit_job_that_is_preempted_is_started_again_by_submitit(tmp_path):
    """SIGUSR2 is what SLURM sends before it takes the machine away; here submitit's local controller starts anew."""
    root = tmp_path / "root"
    process = start(root, "submitit_local", "x=1", "seconds=3", "journal=true")
    until_a_point_is_open(root, process)
    (pid, *_) = [pid for pid, command in living(root).items() if "submitit.core._submit" in command]
    os.kill(pid, signal.SIGUSR2)
    assert process.wait(120) == 0, (root / "told").read_text()
    assert calls(root) == ["1", "1"]
    assert {row[1:3] for row in runs(root)} == {("sweep", "FINISHED"), ("point", "FINISHED")}
