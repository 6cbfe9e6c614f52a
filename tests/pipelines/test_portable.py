"""compute=portable: one instruction set for every library, chosen before any of them is loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy  # noqa: F401  (it is loaded here, so this process can no longer choose)
import pytest

from ambergrade.chain.context import Stage
from ambergrade.chain.portable import ENVIRONMENT, is_portable, make_portable
from ambergrade.chain.settings import Compute
from ambergrade.errors import BadSetting

HOUSE = Path(__file__).parents[2]
SMALL = [
    "data.draw={seed: 0, count: 80, prompts: 2, references: 4}",
    *(f"trainer.{key}=8" for key in ("images", "save_every", "log_every", "sample_every")),
    *("trainer.batch=4", "trainer.micro=4", "trainer.schedule.warmup=1", "trainer.ema=0"),
]


def run(*line: str, **environment: str) -> None:
    inherited = {key: text for key, text in os.environ.items() if key not in ENVIRONMENT}
    done = subprocess.run(line, cwd=HOUSE, env={**inherited, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def results(root: Path, *overrides: str, **environment: str) -> dict[str, object]:
    """Train two steps, draw and score with the result; return the bytes of the latents and every stage's digests."""
    model, given = root / "base7.safetensors", ["sampler.steps=2", f"root={root}", *overrides]
    run(sys.executable, "pipelines/train.py", "experiment=base7_tiny", f"out={model}", *SMALL, *given, **environment)
    run(sys.executable, "pipelines/evaluate.py", f"model={model}", "count=2", *given, **environment)
    records = (root / "mlruns" / "records").glob("*/*.json")
    found = {record["stage"]: record["files"] for record in (json.loads(file.read_text()) for file in records)}
    latents = {path.name: path.read_bytes() for path in (root / "mlruns" / "latents").rglob("*") if path.is_file()}
    return {**found, "latents": {name: data for name, data in latents.items() if not name.endswith(".json")}}


@pytest.mark.slow
def test_the_processor_s_kernels_change_training_and_pictures_but_not_portable_ones(tmp_path: Path) -> None:
    old = results(tmp_path / "old", "compute=portable", ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41")
    new = results(tmp_path / "new", "compute=portable", ATEN_CPU_CAPABILITY="avx2")
    assert old == new
    assert {"train", "evaluation", "latents"} <= old.keys()
    assert old["latents"]
    plain = results(tmp_path / "plain", ATEN_CPU_CAPABILITY="default")
    assert plain["train"] != old["train"]
    assert plain["evaluation"] != old["evaluation"]


@pytest.mark.parametrize("door", ["main", "sweeping", "compose", "files", "command"])
def test_the_door_loads_neither_numpy_nor_torch_before_kernels_are_chosen(door: str) -> None:
    program = f"import sys, ambergrade.door.{door}; sys.exit(bool({{'numpy', 'torch'}} & sys.modules.keys()))"
    run(sys.executable, "-c", program)


def test_a_process_that_has_loaded_numpy_cannot_become_portable() -> None:
    assert not is_portable()
    with pytest.raises(BadSetting, match=r"comes too late: .*numpy is loaded"):
        make_portable()


def test_portable_results_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = Stage("train", 1).task({"lr": 1}, {"base": "ab"}).identity
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    make_portable()  # it is already
    assert Stage("train", 1).task({"lr": 1}, {"base": "ab"}).identity != ordinary


def test_portable_needs_one_thread_of_the_processor() -> None:
    with pytest.raises(BadSetting, match="Give compute=portable"):
        Compute("cuda", 1, portable=True)
    with pytest.raises(BadSetting, match="threads=1"):
        Compute("cpu", 2, portable=True)
