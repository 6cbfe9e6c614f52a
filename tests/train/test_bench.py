"""The measurements run, at their smallest; what they measure here is nobody's number."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        ["bench/train.py", "--steps", "1", "--rounds", "1", "--batch", "2"],
        ["bench/gpu/train.py", "--device", "cpu", "--tiny", "--side", "128", "--micro", "2", "--steps", "1"],
    ],
    ids=lambda line: line[0],
)
def test_both_loops_run_and_are_compared(line: list[str]) -> None:
    done = subprocess.run([sys.executable, *line], cwd=REPOSITORY, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rates = [line for line in done.stdout.splitlines() if "images/s" in line or "images a CPU second" in line]
    assert len(rates) == 2
    assert "ratio" in done.stdout.splitlines()[-1]
