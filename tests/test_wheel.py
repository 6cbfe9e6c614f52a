"""The wheel, installed with the lock into a clean environment outside of the repository, is the whole product."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an environment that knows nothing of this checkout."""
    home = tmp_path_factory.mktemp("wheel")
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(home),
        str(HOUSE),
    ]
    subprocess.run(build, check=True)
    subprocess.run([sys.executable, "-m", "venv", str(home / "env")], check=True)
    pip = [str(home / "env" / "bin" / "python"), "-m", "pip", "-q", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "--require-hashes", "-r", str(HOUSE / "requirements.lock")], check=True)
    (wheel,) = home.glob("*.whl")
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True)
    (home / "work").mkdir()
    return home


def ambergrade(home: Path, *arguments: str) -> str:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "AMBERGRADE_ROOT")}
    line = [str(home / "env" / "bin" / "ambergrade"), *arguments]
    done = subprocess.run(line, cwd=home / "work", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert str(HOUSE) not in done.stdout
    return done.stdout


def test_the_chain(home: Path) -> None:
    told = ambergrade(home, "gamma", "experiment=gamma_smoke")
    assert "model file sha256" in told
    assert list((home / "work" / "mlruns" / "releases").glob("*/*.safetensors"))


def test_a_sweep_of_two_points(home: Path) -> None:
    few = ["prompts.sweep_count=4", "data.draw.count=40", "data.draw.prompts=4", "sampler.steps=2"]
    models = "models.base7=builtin://anxl3.safetensors"
    told = ambergrade(home, "sweep", "--multirun", "coefficients.a=0.4,0.8", models, *few)
    assert "a 0.4" in told
    assert "a 0.8" in told


def test_a_merge_with_a_method(home: Path) -> None:
    names = ("beta7", "anxl2", "anxl3")
    weights = next((home / "env").glob("lib/*/site-packages/ambergrade/world/weights"))
    lines = ["formula: merged = ties(beta7, anxl2, anxl3, density=0.3)", "models:"]
    lines += [f"  {name}: {weights / name}.safetensors" for name in names]
    (home / "work" / "recipe.yaml").write_text("\n".join([*lines, "out: merged.safetensors", ""]))
    ambergrade(home, "merge", "recipe.yaml")
    ambergrade(home, "verify", "merged.safetensors", "--models", str(weights))


def test_a_plan(home: Path) -> None:
    assert "dollars" in ambergrade(home, "train", "experiment=base7", "plan=true", "gpu=a100", "processes=2")


def test_a_project(home: Path) -> None:
    ambergrade(home, "init", "mine")
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "AMBERGRADE_ROOT")}
    line = [str(home / "env" / "bin" / "ambergrade"), "gamma", "experiment=mine", "--cfg", "job"]
    done = subprocess.run(line, cwd=home / "work" / "mine", env=env, capture_output=True, text=True)
    assert "name: mine" in done.stdout, done.stderr
