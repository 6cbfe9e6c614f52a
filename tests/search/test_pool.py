"""The pool of worker processes: what it keeps busy, what a death costs, and that nobody outlives the parent."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ambergrade.search.driver import Driver, Job
from ambergrade.search.load import search
from ambergrade.search.pool import Pool

FOLDER = Path(__file__).parent


@pytest.fixture
def toys(monkeypatch):
    """What the workers do, in a module that they can import."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("toy_points")


@pytest.fixture
def swept(tmp_path, toys):
    def sweep(values, workers=1, payload=lambda job: job.point["a"]):
        pool = Pool(toys.evaluate, lambda job: (str(tmp_path), payload(job)), workers)
        with pool:
            chosen = search("grid", values={"a": list(values)}, objective="x")
            result = Driver(chosen, pool, lambda point: f"a {point['a']:g}").sweep()
        assert _only_the_tracker()
        return {trial.job.label: trial.outcome for trial in result.trials}

    return sweep


def _only_the_tracker():
    """multiprocessing's own helper at most, which ends with this process."""
    commands = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    return all("resource_tracker" in command for command in commands)


def test_workers_keep_what_they_loaded_and_all_are_used(swept):
    found = swept(range(6), workers=2)
    assert [found[f"a {a}"].score for a in range(6)] == list(range(6))
    assert len({outcome.value["process"] for outcome in found.values()}) == 2
    assert len({outcome.value["process"] for outcome in swept(range(3)).values()}) == 1


def test_a_worker_that_dies_fails_its_point_and_no_other(swept):
    found = swept([1, 13, 2, 14, 3, 15, 4, 16, 5], workers=2)
    assert all(found[f"a {a}"].done for a in (1, 2, 3, 4, 5))
    assert found["a 13"].reason == "Ended: its process was ended by SIGKILL (out of memory?)"
    assert "exit code 3" in found["a 14"].reason
    assert "SIGTERM" in found["a 15"].reason
    assert "pickle" in found["a 16"].reason
    assert not any(found[f"a {a}"].done for a in (13, 14, 15, 16))


def test_a_point_that_cannot_be_sent_has_failed(swept):
    def payload(job):
        if job.point["a"] == 1:
            raise ValueError("does not compose")
        return (lambda: None) if job.point["a"] == 2 else job.point["a"]

    found = swept([0, 1, 2, 3], payload=payload)
    assert found["a 1"].reason == "ValueError: does not compose"
    assert "pickle" in found["a 2"].reason
    assert found["a 0"].done
    assert found["a 3"].done


def test_a_slot_that_is_free_gets_the_next_point_at_once(toys):
    """Slow and quick points on two slots: the quick ones do not wait for the slow one."""
    order = []
    with Pool(toys.sleep, lambda job: job.point["a"], 2) as pool:
        jobs = [Job(str(a), {"a": a}) for a in (1.5, 0.1, 0.1, 0.1)]
        for job, outcome in pool(iter(jobs)):
            assert outcome.done
            order.append(job.point["a"])
    assert order == [0.1, 0.1, 0.1, 1.5]


PARENT = """
import sys
sys.path.insert(0, sys.argv[2])
import toy_points
from ambergrade.search.driver import Job
from ambergrade.search.pool import Pool

if __name__ == "__main__":
    with Pool(toy_points.evaluate, lambda job: (sys.argv[1], 99), 2) as pool:
        list(pool(iter([Job("one", {}), Job("two", {})])))
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "Ctrl-C"])
def test_no_worker_outlives_its_parent(tmp_path, how):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, script, tmp_path, FOLDER], stderr=subprocess.PIPE, process_group=0)
    end = time.monotonic() + 60
    while len(list(tmp_path.glob("begun-*"))) < 2:
        assert time.monotonic() < end
        time.sleep(0.05)
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert len(workers) >= 2
    if how == "Ctrl-C":
        os.killpg(parent.pid, signal.SIGINT)
    else:
        parent.send_signal(getattr(signal, how))
    told = parent.communicate(timeout=20)[1].decode()
    assert not psutil.wait_procs(workers, timeout=5)[1]
    if how == "Ctrl-C":
        assert told.count("Traceback") == 1  # the parent's own; the workers are silent
