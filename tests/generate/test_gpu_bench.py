"""The GPU bench runs from end to end where there is no GPU, so that its first run on one measures something."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_line_of_the_generation_bench_runs() -> None:
    command = [sys.executable, "bench/gpu/generate.py", "--tiny", "--pictures=3", "--batch=2", "--steps=2", "--side=64"]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for line in ("stock pipeline, bf16 ", "ours ", "share of the matrix rate", "with scorers"):
        assert line in done.stdout
    assert re.search(r"anew after a swap of weights: 0$", done.stdout, re.MULTILINE)
    refused = subprocess.run([sys.executable, *command[1:2]], cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert "No GPU here" in refused.stderr
