"""A model file that was made elsewhere is scored and released as it is; its origin and licence are told as unknown."""

import subprocess
import sys
from pathlib import Path

from ambergrade.identity import file_digest
from ambergrade.release.facts import read_facts
from ambergrade.store import BUILTIN

REPOSITORY = Path(__file__).parents[2]
SMALL = ["data.draw.count=20", "data.draw.prompts=4", "data.draw.references=8", "sampler.steps=1", "sheet=2"]


def release(root: Path, *more: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "pipelines/release.py", f"root={root}", "release.name=found", "release.version=1"]
    return subprocess.run([*line, *SMALL, *more], cwd=REPOSITORY, capture_output=True, text=True)


def test_a_file_of_unknown_origin_is_released_byte_for_byte(tmp_path: Path) -> None:
    told = release(tmp_path, "model=builtin://beta7.safetensors")
    assert told.returncode == 0, told.stdout[-2000:] + told.stderr[-4000:]
    folder = tmp_path / "mlruns" / "releases" / "found-1"
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=folder).returncode == 0
    facts = read_facts(folder)
    assert facts.weights.file == file_digest(BUILTIN / "beta7.safetensors")
    assert facts.recipe is None
    assert facts.license == "unknown"
    assert len(facts.samples) == 2
    assert "Nobody recorded how these weights were made." in (folder / "README.md").read_text()
    assert not (folder / "recipe.yaml").exists()


def test_what_cannot_be_meant_is_told_before_anything_is_drawn(tmp_path: Path) -> None:
    for more, says in (
        ([], "Give either sweep="),
        (["model=nowhere.safetensors"], "No file or folder at nowhere.safetensors"),
        (["model=builtin://beta7.safetensors", "point={a: 1}"], "give sweep=FOLDER too"),
        ([f"sweep={tmp_path}"], "no sweep's folder, or the sweep is not finished"),
    ):
        done = release(tmp_path / "root", *more)
        assert (done.returncode, "Traceback" in done.stderr) == (1, False), done.stderr
        assert says in done.stderr
    assert not (tmp_path / "root" / "mlruns" / "booru").exists()
