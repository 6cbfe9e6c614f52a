import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import save_file

from ambergrade.errors import BadInput
from ambergrade.identity import file_digest
from ambergrade.nouns import Measurement
from ambergrade.release.build import build

FACTS = {
    "name": "gamma",
    "version": "rev1",
    "license": "apache-2.0",
    "config": "builtin://sdxl_tiny",
    "recipe": {
        "formula": "gamma rev1 = beta7 + a * (anxl3 - anxl2) + b * (base7 - beta7)",
        "coefficients": {"a": 0.8, "b": 0.5},
        "models": {
            name: {"sha256": f"{number:064x}", "source": f"builtin://{name}.safetensors"}
            for number, name in enumerate(["beta7", "anxl3", "anxl2", "base7"])
        },
        "family": "sdxl_tiny",
        "dtype": "fp16",
    },
    "evaluation": {
        "prompts": {"name": "heldout", "count": 48},
        "sampler": {"name": "euler", "steps": 12, "guidance": 3.0, "width": 128, "height": 128},
        "objective": "tag_balance",
        "scores": {
            "tag_recall": {"gamma": Measurement(0.81, 0.78, 0.84, 48), "beta7": Measurement(0.41, 0.35, 0.47, 48)},
            "fid": {
                "gamma": Measurement(12.0, 11.0, 13.0, 48, False),
                "beta7": Measurement(float("nan"), float("nan"), float("nan"), 0, False),
            },
        },
        "differences": {"tag_recall": {"beta7": Measurement(0.40, 0.33, 0.47, 48)}},
        "winner_set": [{"a": 0.8, "b": 0.5}, {"a": 0.8, "b": 0.75}],
        "scorers": {"tagger": {"fingerprint": "ab" * 32, "tiny": True}},
    },
    "training": {"unet_lr": 1e-5, "batch": {"micro": 8, "accumulation": 4, "processes": 1}, "images": 12800},
    "captions": {"recipe": "kohaku-2024-01", "rules": ["quality tags by percentile", "artist first"]},
    "lineage": {"release": ["evaluation", "merge"]},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    save_file({"weight": np.arange(6, dtype=np.float16)}, folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o444)  # as the store keeps it
    for number, name in enumerate(["contact_sheet", "heat_map"]):
        Image.new("RGB", (8, 8), (number, 20, 30)).save(folder / f"{name}.png")
    return {
        "checkpoint": folder / "model.safetensors",
        "contact_sheet": folder / "contact_sheet.png",
        "heat_map": folder / "heat_map.png",
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_sha256sum_accepts_the_folder_and_the_manifest_lists_every_file(tmp_path, files):
    release = build(tmp_path / "out", **FACTS, **files)
    subprocess.run(["sha256sum", "--strict", "--quiet", "-c", "SHA256SUMS"], cwd=release.path, check=True)
    listed = json.loads((release.path / "MANIFEST.json").read_text())["files"]
    assert set(listed) == {p.name for p in release.path.iterdir()} - {"MANIFEST.json", "SHA256SUMS"}
    for name, row in listed.items():
        assert row == {"bytes": (release.path / name).stat().st_size, "sha256": file_digest(release.path / name)}
    assert release.digest == file_digest(release.path / "MANIFEST.json")
    assert release.files["gamma-rev1.safetensors"] == file_digest(files["checkpoint"])


def test_a_build_in_another_folder_process_zone_locale_and_umask_gives_the_same_bytes(tmp_path, files):
    release = build(tmp_path / "here" / "out", **FACTS, **files)
    facts = tmp_path / "facts.json"
    other = tmp_path / "there" / "deeper" / "other name"
    facts.write_text(json.dumps(FACTS, default=lambda noun: vars(noun)))
    program = f"""
        import json, os; from pathlib import Path; from ambergrade.release.build import build
        os.umask(0o077)
        files = json.loads({json.dumps({k: str(v) for k, v in files.items()})!r})
        facts = json.loads(Path({str(facts)!r}).read_text())
        build(Path({str(other)!r}), **facts, **{{k: Path(v) for k, v in files.items()}})
    """
    zone = {**os.environ, "TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "7", "PYTHONUTF8": "0", "USER": "x"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd="/", env=zone, check=True)
    assert contents(other) == contents(release.path)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in [other, *other.iterdir()])


def test_an_equal_release_is_left_alone_and_another_is_replaced_whole(tmp_path, files):
    out = tmp_path / "out"
    first = build(out, **FACTS, **files)
    inode = out.stat().st_ino
    assert build(out, **FACTS, **files) == first
    assert out.stat().st_ino == inode
    (out / "README.md").write_text("tampered")
    (out / "extra.txt").write_text("not ours")
    assert build(out, **FACTS, **files) == first
    assert "extra.txt" not in contents(out)
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=out, check=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("change", ["checkpoint", "contact_sheet", "coefficient", "score", "training"])
def test_every_change_of_an_input_changes_the_digest(tmp_path, files, change):
    before = build(tmp_path / "out", **FACTS, **files).digest
    facts, inputs = json.loads(json.dumps(FACTS, default=vars)), dict(files)
    if change in files:
        inputs[change] = tmp_path / files[change].name
        inputs[change].write_bytes(files[change].read_bytes() + b"\0")
    elif change == "coefficient":
        facts["recipe"]["coefficients"]["a"] = 0.8000001
    elif change == "score":
        facts["evaluation"]["scores"]["tag_recall"]["gamma"]["value"] += 1e-9
    else:
        facts["training"]["images"] += 1
    assert build(tmp_path / "out", **facts, **inputs).digest != before


def test_a_build_that_was_killed_is_swept_up_and_the_old_release_stays_until_then(tmp_path, files):
    out = tmp_path / "out"
    build(out, **FACTS, **files)
    before = contents(out)
    program = f"""
        import os, signal; from pathlib import Path; import ambergrade.release.build as room
        room._seal = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        import json
        facts = json.loads({json.dumps(FACTS | {"version": "rev2"}, default=vars)!r})
        files = json.loads({json.dumps({k: str(v) for k, v in files.items()})!r})
        room.build(Path({str(out)!r}), **facts, **{{k: Path(v) for k, v in files.items()}})
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(program)])
    assert killed.returncode == -signal.SIGKILL
    assert contents(out) == before
    assert len(list(tmp_path.iterdir())) == 2
    build(out, **FACTS | {"version": "rev2"}, **files)
    assert "gamma-rev2.safetensors" in contents(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_absolute_path_goes_into_a_release(tmp_path, files):
    facts = FACTS | {"lineage": {"dataset": {"from": "/home/somebody/booru.sqlite"}}}
    with pytest.raises(BadInput, match=r"lineage\.dataset\.from"):
        build(tmp_path / "out", **facts, **files)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_other_things_is_not_replaced(tmp_path, files):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(BadInput, match="other things"):
        build(tmp_path, **FACTS, **files)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_pickle_is_refused_and_missing_facts_are_named_together(tmp_path, files):
    with pytest.raises(BadInput, match="safetensors only"):
        build(tmp_path / "out", **FACTS, **files | {"checkpoint": Path("model.ckpt")})
    with pytest.raises(BadInput, match=r"recipe\.formula.*evaluation\.scorers"):
        build(tmp_path / "out", **FACTS | {"recipe": {}, "evaluation": {}}, **files)


def test_the_released_recipe_reads_back_as_what_was_given(tmp_path, files):
    release = build(tmp_path / "out", **FACTS, **files)
    recipe = yaml.safe_load((release.path / "recipe.yaml").read_text())
    assert recipe.pop("formula").strip() == FACTS["recipe"]["formula"]
    assert recipe == {key: value for key, value in FACTS["recipe"].items() if key != "formula"}


def test_what_was_not_scored_is_null_and_a_dash_never_zero(tmp_path, files):
    release = build(tmp_path / "out", **FACTS, **files)
    scores = json.loads((release.path / "evaluation.json").read_text())["scores"]
    assert scores["fid"]["beta7"]["value"] is None
    row = next(line for line in (release.path / "README.md").read_text().splitlines() if line.startswith("| fid ↓"))
    assert row == "| fid ↓ | 12.000 [11.000, 13.000] | – | – |"


def test_the_hub_reads_the_card(tmp_path, files):
    from huggingface_hub import ModelCard

    release = build(tmp_path / "out", **FACTS, **files)
    model_card = ModelCard.load(release.path / "README.md")
    assert model_card.data.license == "apache-2.0"
    assert model_card.data.pipeline_tag == "text-to-image"
    assert sorted(model_card.data.base_model) == ["anxl2", "anxl3", "base7", "beta7"]
    assert "gamma rev1 = beta7 + 0.8 * (anxl3 - anxl2) + 0.5 * (base7 - beta7)" in model_card.content
    assert "0.810 [0.780, 0.840]" in model_card.content
    assert "say nothing about real models" in model_card.content
