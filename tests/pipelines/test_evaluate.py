"""pipelines/evaluate.py as a user runs it: a model, a folder, two sheets, references, a tagger; and its mistakes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ambergrade.identity import random_seed
from ambergrade.nouns import PromptSet
from ambergrade.score.reference import Reference
from ambergrade.world import grammar
from ambergrade.world.booru import prompt as world_prompt
from ambergrade.world.draw import draw

REPOSITORY = Path(__file__).parents[2]


def evaluate(root: Path, *arguments: str, fails: bool = False) -> str:
    command = [sys.executable, "pipelines/evaluate.py", f"root={root}", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode == 1) == fails, done.stdout[-2000:] + done.stderr[-4000:]
    assert "Traceback" not in done.stderr
    return done.stderr if fails else done.stdout


def folder_of(told: str, kind: str = "report") -> Path:
    found = re.search(rf"^{kind} +(\S+)$", told, re.MULTILINE)
    assert found, told
    return Path(found[1])


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: Any) -> Path:
    """A folder of right pictures with prompts.jsonl."""
    folder = tmp_path_factory.mktemp("pictures")
    scenes = [grammar.sample(5, k, clean=True) for k in range(36)]
    prompts = [world_prompt(scene, f"{k:03}", random_seed(5, "x", k) % 2**32) for k, scene in enumerate(scenes)]
    PromptSet("p", tuple(prompts)).write(folder / "prompts.jsonl")
    for k, scene in enumerate(scenes):
        draw(scene).save(folder / f"{k:03}.png")
    return folder


def test_help_and_mistakes_are_told_at_once_without_torch(tmp_path: Path) -> None:
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "pipelines/evaluate.py", "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert time.monotonic() - start < 10  # under 3 s on a quiet machine
    assert "action" in done.stdout
    assert " torch\n" not in done.stderr
    for arguments, told in [
        ((), "Give either model=… (pictures are drawn) or pictures=DIR"),
        (("action=scor",), "Did you mean 'score'"),
        (("action=compare",), "No value for: sheet, baseline"),
        (("model=gone.safetensors",), "No file or folder at gone.safetensors"),
        (("model=builtin://beta7.safetensors", "suite=full"), "No value for: reference"),
        (("model=builtin://beta7.safetensors", "count=0"), "at least 1"),
        (("model=builtin://beta7.safetensors", "suite=fast"), "Option of 'suite' 'fast' is not known"),
    ]:
        assert told in evaluate(tmp_path, *arguments, fails=True)


def test_a_folder_of_pictures_is_scored_against_references_and_compared(drawn: Path, tmp_path: Path) -> None:
    worse = tmp_path / "worse"
    shutil.copytree(drawn, worse)
    rng = np.random.default_rng(0)
    for file in worse.glob("*.png"):
        pixels = np.asarray(Image.open(file))
        Image.fromarray(np.clip(pixels + rng.normal(0, 60, pixels.shape), 0, 255).astype(np.uint8)).save(file)
    told = evaluate(tmp_path, "action=reference", f"reference={drawn}", "suite=full", "name=real")
    made = sorted((tmp_path / "mlruns" / "references" / "real").glob("*.npz"))
    assert len(made) == 2  # one for the feature extractor, one for CLIP
    assert all(Reference.read(path).m == 36 for path in made)
    assert f"reference={made[0].parent}" in told

    full = ("suite=full", f"reference={made[0].parent}")
    first = evaluate(tmp_path, f"pictures={drawn}", *full)
    sheet = folder_of(first, "sheet")
    second = evaluate(tmp_path, f"pictures={worse}", *full, f"baseline={sheet}")
    report = folder_of(second).read_text()
    assert 'src="data:image/png;base64,' in report
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", report)  # nothing is fetched
    for word in ("Worst prompts", "Best prompts", "Against the baseline", "Rating", "weights", "<svg", "fid"):
        assert word in report
    assert re.search(r"tag_prob .*worse", second)
    assert re.search(r"fid .*worse", second)
    again = evaluate(tmp_path, f"pictures={drawn}", *full)
    assert "finished before" in again
    compared = evaluate(tmp_path, "action=compare", f"sheet={folder_of(second, 'sheet')}", f"baseline={sheet}")
    assert re.search(r"tag_prob .*worse", compared)
    assert "Against the baseline" in folder_of(compared).read_text()
    margins = ("+margins.clip_score=1000", "+margins.fid=1")
    sheets = f"sheet=[{sheet},{folder_of(second, 'sheet')}]"
    chosen = evaluate(tmp_path, "action=compare", sheets, f"baseline={sheet}", *margins)
    same, noisy = (line for line in chosen.splitlines() if "tag_prob" in line and "scores" in line)
    assert same.startswith("* ")
    assert "+0.000 [+0.000, +0.000] undecided; keeps the margins" in same
    assert noisy.startswith("  ")
    assert "worse; misses fid" in noisy
    assert "Pareto front" in folder_of(chosen).read_text()
    squashed = evaluate(tmp_path, f"pictures={drawn}", "suite.metrics.clip_score.resize_mode=squash")
    unlike = ("action=compare", f"sheet={folder_of(squashed, 'sheet')}", f"baseline={sheet}")
    assert "resize_mode" in evaluate(tmp_path, *unlike, fails=True)


def test_a_model_is_drawn_scored_contrasted_and_journaled(drawn: Path, tmp_path: Path) -> None:
    arguments = (
        "model=builtin://beta7.safetensors",
        "sampler.steps=2",
        "count=4",
        "seeds=2",
        "suite=full",
        f"reference={drawn}/list.txt",
        f"reference_pictures={drawn}",
        "suite.contrast.prompts=3",
        "noise_batch=1",
        "noise_count=2",
        "precision=bf16",
    )
    (drawn / "list.txt").write_text("".join(f"{k:03}.png\n" for k in range(36)))
    told = evaluate(tmp_path, *arguments)
    assert "control response" in told
    report = folder_of(told).read_text()
    assert "response_quality" in report
    assert "Kernel noise (A/A)" in report
    assert "precision bf16" in report
    assert re.search(r"another batch moves tag_prob +by \S+ \(largest", told)
    assert report.count("<div class=two>") >= 4  # both seeds of a prompt side by side
    assert "refused" in told  # 8 pictures are too few for FID
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name("evaluation")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    chain = next(run for run in runs if run.data.tags["ag.kind"] == "chain")
    assert {"tag_prob", "tag_prob_lo", "clip_margin"} <= chain.data.metrics.keys()
    assert "report.html" in {file.path for file in client.list_artifacts(chain.info.run_id)}


def test_a_tagger_is_calibrated_on_pictures_with_known_tags(drawn: Path, tmp_path: Path) -> None:
    told = evaluate(tmp_path, "action=calibrate", f"pictures={drawn}", "name=tiny")
    assert "tags measured on 36 pictures" in told
    rates = tmp_path / "mlruns" / "references" / "tiny.rates.csv"
    assert rates.read_text().startswith("tag,tpr,fpr,pictures,without\n")
    evaluate(tmp_path, f"pictures={drawn}", f"suite.metrics.tag_adherence.rates={rates}")


def test_folders_that_do_not_fit_their_prompts_are_told_by_name(drawn: Path, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.mkdir()
    shutil.copy(drawn / "000.png", odd / "000.png")
    lacks = "1 of 1 pictures lack a .txt with words in it: ['000.png']"
    assert lacks in evaluate(tmp_path, f"pictures={odd}", fails=True)
    (odd / "000.txt").write_text(" \n")  # an empty caption is none
    assert lacks in evaluate(tmp_path, f"pictures={odd}", fails=True)
    (odd / "000.txt").write_text("1girl, (long hair:1.2), masterpiece")
    assert "tag_prob" in evaluate(tmp_path, f"pictures={odd}")
    shutil.copy(drawn / "000.png", odd / "stray.png")
    (odd / "prompts.jsonl").write_text(
        json.dumps({"id": "000", "text": "a"}) + "\n" + json.dumps({"id": "lost", "text": "b"})
    )
    told = evaluate(tmp_path, f"pictures={odd}", fails=True)
    assert "stray.png" in told
    assert "lost" in told
    grid = evaluate(tmp_path, f"pictures={drawn}", "suite=mosaic")
    assert "mosaic" in grid
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(drawn / "001.png", bare / "data.png")  # a folder of data: no prompts at all
    assert re.search(r"mosaic +0\.\d", evaluate(tmp_path, f"pictures={bare}", "suite=mosaic"))
    (odd / "stray.png").unlink()
    (odd / "prompts.jsonl").write_text(json.dumps({"id": "000", "text": ""}))
    (odd / "000.png").write_bytes((drawn / "000.png").read_bytes()[:300])
    told = evaluate(tmp_path, f"pictures={odd}", fails=True)
    assert "1 of 1 pictures are faulty" in told
    assert "000.png" in told
