"""A sweep through a real SLURM, where one answers: a job each point, a job that is killed, a parent that is killed.

One machine will do: Debian's slurm-wlm and munge, and for job states slurmdbd on mariadb-server, since submitit asks
`sacct`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

APP = Path(__file__).with_name("toy_sweep.py")


def answers() -> bool:
    """Whether there is a cluster, with accounting."""
    if not all(shutil.which(program) for program in ("sinfo", "sbatch", "sacct")):
        return False
    try:
        told = [subprocess.run([program], capture_output=True, timeout=20).returncode for program in ("sinfo", "sacct")]
    except subprocess.TimeoutExpired:
        return False
    return told == [0, 0]


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not answers(), reason="no SLURM answers here (sinfo, sacct): its launcher is not tried"),
]


def start(root: Path, *overrides: str) -> subprocess.Popen:
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.mem_gb=1", "hydra.launcher.timeout_min=10"]
    told = (root / "told").open("a")
    command = [sys.executable, str(APP), "--multirun", f"root={root}", *launcher, *overrides]
    return subprocess.Popen(command, stdout=told, stderr=told, process_group=0)


def drawn(root: Path) -> list[str]:
    return (root / "calls").read_text().split() if (root / "calls").exists() else []


def until(root: Path, points: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while len(drawn(root)) < points:
        time.sleep(0.2)
        assert process.poll() is None, (root / "told").read_text()
        assert time.monotonic() < end, (root / "told").read_text()


def result(root: Path) -> dict[str, float]:
    return json.loads((root / "result.json").read_text())["scores"]


def test_a_killed_job_is_drawn_again_alone(tmp_path):
    process = start(tmp_path, "x=range(0,3)", "seconds=3", "journal=true")
    until(tmp_path, 1, process)
    first = drawn(tmp_path)[0]
    os.kill(int((tmp_path / "processes").read_text().split()[0]), signal.SIGKILL)
    assert process.wait(240) == 0, (tmp_path / "told").read_text()
    assert result(tmp_path) == {f"x {x}": float(x) for x in range(3)}
    assert sorted(drawn(tmp_path)) == sorted(["0", "1", "2", first])


def test_jobs_outlive_their_command_and_what_they_finish_is_taken(tmp_path):
    process = start(tmp_path, "x=range(0,4)", "seconds=5")
    until(tmp_path, 1, process)
    process.kill()
    process.wait()
    assert start(tmp_path, "x=range(0,4)", "seconds=5").wait(240) == 0, (tmp_path / "told").read_text()
    assert result(tmp_path) == {f"x {x}": float(x) for x in range(4)}
    assert len(list((tmp_path / "sweeps").glob("*/*/point.json"))) == 4
