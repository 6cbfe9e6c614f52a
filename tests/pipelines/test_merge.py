"""pipelines/merge.py and pipelines/verify.py as a user runs them, with Hydra: what they write, tell and refuse."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ambergrade.merge.header import read_header
from ambergrade.store import BUILTIN

REPOSITORY = Path(__file__).parents[2]


def run(name: str, *arguments: str, cache: Path, fails: bool = False) -> str:
    """What the pipeline tells: its output, or its complaint, which is a few lines and no traceback."""
    done = subprocess.run(
        [sys.executable, f"pipelines/{name}.py", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == (1 if fails else 0), done.stdout[-2000:] + done.stderr[-4000:]
    if fails:
        assert 0 < len(done.stderr.splitlines()) <= 10
        assert "Traceback" not in done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def base7(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = torch.Generator().manual_seed(7)
    tuned = {
        name: tensor + (1e-2 * torch.randn(tensor.shape, generator=random)).to(tensor.dtype)
        if name.startswith("model.")
        else tensor
        for name, tensor in load_file(BUILTIN / "beta7.safetensors").items()
    }
    path = tmp_path_factory.mktemp("base7") / "base7.safetensors"
    save_file(tuned, path)
    return path


@pytest.fixture(scope="module")
def merged(base7: Path, cache: Path) -> Path:
    """conf/merge/gamma_rev1.yaml over conf/models/tiny.yaml, with one coefficient of the command line's."""
    out = base7.parent / "gamma.safetensors"
    told = run("merge", f"models.base7={base7}", "coefficients.a=0.9", f"out={out}", cache=cache)
    assert "a = 0.9, b = 0.5" in told
    assert f"{out.stat().st_size:,} bytes" in told
    return out


def test_a_recipe_s_inputs_are_found_in_a_folder_by_their_digests(tmp_path: Path, cache: Path) -> None:
    file = tmp_path / "folder" / "under another name.safetensors"
    file.parent.mkdir()
    file.write_bytes((BUILTIN / "beta7.safetensors").read_bytes())
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"formula: beta7\nmodels:\n  beta7: {{file: {sha256}}}\n")
    out = tmp_path / "out.safetensors"
    run("merge", f"recipe={recipe}", f"models={file.parent}", f"out={out}", cache=cache)
    assert load_file(out).keys() == load_file(file).keys()


def test_the_group_is_merged_with_the_given_coefficient(merged: Path, base7: Path) -> None:
    x = {alias: load_file(BUILTIN / f"{alias}.safetensors") for alias in ("beta7", "anxl2", "anxl3")}
    x["base7"] = load_file(base7)
    found = load_file(merged)
    name = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
    beta7, anxl2, anxl3, tuned = (x[alias][name].double().numpy() for alias in ("beta7", "anxl2", "anxl3", "base7"))
    truth = beta7 + 0.9 * (anxl3 - anxl2) + 0.5 * (tuned - beta7)
    spacing = np.spacing(np.abs(truth.astype(np.float16))).astype(np.float64)
    assert (np.abs(found[name].double().numpy() - truth) <= 0.5001 * spacing).all()
    assert json.loads(read_header(merged).metadata["ambergrade.recipe"])["coefficients"] == {"a": 0.9, "b": 0.5}


def test_a_dry_run_tells_the_plan_and_writes_nothing(base7: Path, tmp_path: Path, cache: Path) -> None:
    out = tmp_path / "out.safetensors"
    told = run("merge", "merge=gamma_rev1", f"models.base7={base7}", "dry_run=true", f"out={out}", cache=cache)
    assert "gamma rev1 = beta7 + a * (anxl3 - anxl2) + b * (base7 - beta7)" in told
    assert "a = 0.8, b = 0.5" in told
    size = sum((BUILTIN / f"{alias}.safetensors").stat().st_size for alias in ("beta7", "anxl2", "anxl3"))
    assert f"read     {size + base7.stat().st_size:,} bytes of 4 inputs" in told
    assert "unet input_blocks.4" in told
    assert "audit    VAE" in told
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_file_anywhere_is_run_and_verified(tmp_path: Path, cache: Path) -> None:
    models = {alias: str(BUILTIN / f"{alias}.safetensors") for alias in ("beta7", "anxl2", "anxl3")}
    recipe = {"formula": "mine = beta7 + a * (anxl3 - anxl2)", "models": models, "coefficients": {"a": 0.3}}
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({**recipe, "out": "mine.safetensors"}))
    told = run("merge", f"recipe={file}", "coefficients.a=0.7", cache=cache)
    out = tmp_path / "mine.safetensors"  # beside the recipe, whatever the working folder
    assert str(out) in told
    told = run("verify", f"model={out}", f"models={BUILTIN}", cache=cache)
    assert f"verified: {out.stat().st_size:,} bytes" in told

    data = bytearray(out.read_bytes())
    data[-5] ^= 1
    out.chmod(0o644)
    out.write_bytes(data)
    told = run("verify", f"model={out}", f"models={BUILTIN}", cache=cache, fails=True)
    assert "not what its header says" in told


def test_mistakes_are_told_in_a_few_lines(tmp_path: Path, cache: Path) -> None:
    file, out = tmp_path / "recipe.yaml", tmp_path / "out.safetensors"
    models = {alias: str(BUILTIN / f"{alias}.safetensors") for alias in ("beta7", "anxl2", "anxl3")}
    file.write_text(json.dumps({"formula": "beta8 + a * (anxl3 - anxl2)", "models": models, "coefficients": {"a": 1}}))
    told = run("merge", f"recipe={file}", f"out={out}", cache=cache, fails=True)
    assert "Did you mean beta7" in told
    assert "    ^" not in told.splitlines()[0]
    assert "  ^" in told  # under the column
    told = run("merge", f"out={out}", cache=cache, fails=True)  # the group's formula, and no file for base7
    assert "models.base7=PATH" in told
    told = run("verify", f"model={file}", cache=cache, fails=True)
    assert "No value for: models" in told
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
