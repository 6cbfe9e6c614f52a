"""Release folders: the same bytes everywhere, copies, put in place whole, and runnable recipes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file, save_file

from ambergrade.door import files as command
from ambergrade.errors import BadInput
from ambergrade.family.digests import weights_sha256
from ambergrade.identity import file_digest
from ambergrade.merge.files import from_values, recipe_document
from ambergrade.nouns import Measurement, SamplerSettings
from ambergrade.release.build import build, build_release
from ambergrade.release.contents import Evaluation, Prompts, ReleaseContents, Scorer

FORMULA = "gamma rev1   = beta7 + a*(anxl3 - anxl2) + b * (base7 - beta7)"
NAN = float("nan")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    random = np.random.default_rng(0)
    for name in ("beta7", "anxl3", "anxl2", "base7"):
        save_file({"w": random.standard_normal((9, 7)).astype(np.float16)}, folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def contents(models: Path, tmp_path_factory: pytest.TempPathFactory) -> ReleaseContents:
    folder = tmp_path_factory.mktemp("inputs")
    given = {"formula": FORMULA, "coefficients": {"a": 0.8, "b": 0.5}}
    given |= {"models": {path.stem: str(path) for path in models.iterdir()}}
    checkpoint = folder / "model.safetensors"
    command.run_recipe(from_values(given, folder), out=checkpoint)
    checkpoint.chmod(0o444)  # as the store keeps it
    for number, name in enumerate(["contact_sheet", "heat_map"]):
        Image.new("RGB", (8, 8), (number, 20, 30)).save(folder / f"{name}.png")
    evaluation = Evaluation(
        prompts=Prompts("heldout", 48),
        sampler=SamplerSettings("euler", 12, 3.0, 128, 128),
        objective="tag_balance",
        scores={
            "tag_recall": {"gamma": Measurement(0.81, 0.78, 0.84, 48), "beta7": Measurement(0.41, 0.35, 0.47, 48)},
            "fid": {"gamma": Measurement(12.0, 11.0, 13.0, 48, False), "beta7": Measurement(NAN, NAN, NAN, 0, False)},
        },
        differences={"tag_recall": {"beta7": Measurement(0.40, 0.33, 0.47, 48)}},
        winner_set=[{"a": 0.8, "b": 0.5}, {"a": 0.8, "b": 0.75}],
        scorers={"tagger": Scorer("ab" * 32, tiny=True)},
    )
    return ReleaseContents(
        name="gamma",
        version="rev1",
        license="apache-2.0",
        family="sdxl_tiny",
        config="builtin://sdxl_tiny",
        checkpoint=checkpoint,
        recipe=recipe_document(checkpoint, formula=FORMULA, names={"beta7": "beta7.safetensors"}),
        evaluation=evaluation,
        training={"unet_lr": 1e-5, "batch": {"micro": 8, "accumulation": 4, "processes": 1}, "images": 12800},
        captions={"recipe": "kohaku-2024-01", "rules": ["quality tags by percentile", "artist first"]},
        contact_sheet=folder / "contact_sheet.png",
        heat_map=folder / "heat_map.png",
        lineage={"release": ["evaluation", "merge"]},
    )


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(program: str, *arguments: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.run(line, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)


def test_sha256sum_accepts_the_folder_and_the_manifest_lists_every_file(
    tmp_path: Path, contents: ReleaseContents
) -> None:
    release = build_release(tmp_path / "out", contents)
    subprocess.run(["sha256sum", "--strict", "--quiet", "-c", "SHA256SUMS"], cwd=release.path, check=True)
    listed = json.loads((release.path / "MANIFEST.json").read_text())["files"]
    assert set(listed) == {p.name for p in release.path.iterdir()} - {"MANIFEST.json", "SHA256SUMS"}
    for name, row in listed.items():
        assert row == {"bytes": (release.path / name).stat().st_size, "sha256": file_digest(release.path / name)}
    assert release.digest == file_digest(release.path / "MANIFEST.json")
    assert release.files["gamma-rev1.safetensors"] == file_digest(contents.checkpoint)


def test_the_weights_are_a_copy_that_cannot_reach_into_the_store(tmp_path: Path, contents: ReleaseContents) -> None:
    before = contents.checkpoint.read_bytes()
    release = build_release(tmp_path / "out", contents)
    weights = release.path / "gamma-rev1.safetensors"
    assert weights.stat().st_nlink == contents.checkpoint.stat().st_nlink == 1
    with weights.open("r+b") as file:
        file.write(b"edited by a tool")
    assert contents.checkpoint.read_bytes() == before


def test_a_checkpoint_of_other_bytes_than_recorded_is_refused(tmp_path: Path, contents: ReleaseContents) -> None:
    recorded = file_digest(contents.checkpoint)
    build_release(tmp_path / "out", dataclasses.replace(contents, checkpoint_sha256=recorded))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(contents.checkpoint.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(BadInput, match=r"damaged\.safetensors is damaged"):
        build_release(tmp_path / "o", dataclasses.replace(contents, checkpoint=damaged, checkpoint_sha256=recorded))
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({}))
    with pytest.raises(BadInput, match="safetensors"):
        build_release(tmp_path / "o", dataclasses.replace(contents, checkpoint=tmp_path / "pickle.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.safetensors", "out", "pickle.safetensors"]


def test_the_recipe_runs_and_gives_the_releases_bytes(
    tmp_path: Path, contents: ReleaseContents, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under other names, two of the inputs saved anew; the formula stands as it was written."""
    release = build_release(tmp_path / "out", contents)
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for number, path in enumerate(sorted(models.iterdir())):
        save_file(load_file(path), inputs / f"{number}.safetensors", {"saved": "anew"} if number % 2 else None)
    out = tmp_path / "again.safetensors"
    line = ["merge", str(release.path / "recipe.yaml"), "--models", str(inputs), "--out", str(out)]
    assert command.main(line) == 0
    assert out.read_bytes() == (release.path / contents.file).read_bytes()
    recipe = yaml.safe_load((release.path / "recipe.yaml").read_text())
    assert recipe["formula"].strip() == FORMULA
    assert recipe["result"] == {
        "name": "gamma-rev1.safetensors",
        "bytes": out.stat().st_size,
        "file": file_digest(out),
        "weights": weights_sha256(out),
    }
    assert recipe["models"]["beta7"] == {
        "name": "beta7.safetensors",
        "file": file_digest(models / "beta7.safetensors"),
        "weights": weights_sha256(models / "beta7.safetensors"),
    }
    assert command.main(line) == 1  # it is there now
    assert "is there already" in capsys.readouterr().err
    assert command.main([*line, "--overwrite"]) == 0
    for taken in (release.path / "recipe.yaml", inputs / "0.safetensors", release.path, Path("/dev/null")):
        assert command.main([*line[:-1], str(taken), "--overwrite"]) == 1, taken
    assert command.main(["verify", str(release.path / contents.file), "--models", str(inputs)]) == 0


def test_formulas_with_odd_line_breaks_stand_verbatim(tmp_path: Path, contents: ReleaseContents) -> None:
    for formula in ("tuned = x + y\ngamma = tuned # of two lines", "a = x # \u2028 odd \x85 breaks", "'a': [b] # : {"):
        recipe = {**contents.recipe, "formula": formula}
        release = build_release(tmp_path / "out", dataclasses.replace(contents, recipe=recipe))
        assert yaml.safe_load((release.path / "recipe.yaml").read_text())["formula"].strip() == formula


def test_a_build_in_another_folder_process_zone_locale_and_umask_gives_the_same_bytes(
    tmp_path: Path, contents: ReleaseContents
) -> None:
    release = build_release(tmp_path / "here" / "out", contents)
    other = tmp_path / "there" / "deeper" / "other name"
    (tmp_path / "contents").write_bytes(pickle.dumps(contents))
    program = """
        import os, pickle, sys; from pathlib import Path; from ambergrade.release.build import build_release
        os.umask(0o077)
        build_release(Path(sys.argv[2]), pickle.loads(Path(sys.argv[1]).read_bytes()))
    """
    zone = {"TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "7", "PYTHONUTF8": "0", "USER": "x"}
    done = run(program, tmp_path / "contents", other, folder=Path("/"), **zone)
    assert done.returncode == 0, done.stderr
    assert read(other) == read(release.path)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in [other, *other.iterdir()])


def test_an_equal_release_is_left_alone_and_another_is_replaced_whole(
    tmp_path: Path, contents: ReleaseContents
) -> None:
    out = tmp_path / "out"
    first = build_release(out, contents)
    inode = out.stat().st_ino
    assert build_release(out, contents) == first
    assert out.stat().st_ino == inode
    (out / "README.md").write_text("tampered")
    assert build_release(out, contents) == first
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=out, check=True)
    second = build_release(out, dataclasses.replace(contents, version="rev2"))
    assert second.digest != first.digest
    assert contents.file not in read(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _score(contents: ReleaseContents) -> ReleaseContents:
    recall = {**contents.evaluation.scores["tag_recall"], "gamma": Measurement(0.81 + 1e-9, 0.78, 0.84, 48)}
    evaluation = dataclasses.replace(contents.evaluation, scores={**contents.evaluation.scores, "tag_recall": recall})
    return dataclasses.replace(contents, evaluation=evaluation)


CHANGES: dict[str, Callable[[ReleaseContents], ReleaseContents]] = {
    "coefficient": lambda c: dataclasses.replace(c, recipe={**c.recipe, "coefficients": {"a": 0.8000001, "b": 0.5}}),
    "score": _score,
    "training": lambda c: dataclasses.replace(c, training={**(c.training or {}), "images": 12801}),
    "contact sheet": lambda c: dataclasses.replace(c, contact_sheet=c.heat_map or Path()),
    "lineage": lambda c: dataclasses.replace(c, lineage={"release": ["merge"]}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_an_input_changes_the_digest(tmp_path: Path, contents: ReleaseContents, change: str) -> None:
    before = build_release(tmp_path / "out", contents).digest
    assert build_release(tmp_path / "out", CHANGES[change](contents)).digest != before


@pytest.mark.parametrize("killed_in", ["_seal", "_sync", "_put_in_place", "between the renames"])
def test_a_build_that_was_killed_is_swept_up_and_the_old_release_stays_until_then(
    tmp_path: Path, contents: ReleaseContents, killed_in: str
) -> None:
    out = tmp_path / "out"
    build_release(out, contents)
    before = read(out)
    other = dataclasses.replace(contents, version="rev2")
    (tmp_path / "contents").write_bytes(pickle.dumps(other))
    program = """
        import os, pickle, signal, sys; from pathlib import Path; import ambergrade.release.build as room
        kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[3] == "between the renames":
            rename = Path.rename
            Path.rename = lambda self, target: kill() if Path(target) == Path(sys.argv[2]) else rename(self, target)
        else:
            setattr(room, sys.argv[3], kill)
        room.build_release(Path(sys.argv[2]), pickle.loads(Path(sys.argv[1]).read_bytes()))
    """
    done = run(program, tmp_path / "contents", out, killed_in, folder=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (read(out) if out.exists() else read(tmp_path / ".out.old")) == before
    (tmp_path / "contents").unlink()
    build_release(out, other)
    assert "gamma-rev2.safetensors" in read(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_builds_at_once_end_in_one_whole_release(tmp_path: Path, contents: ReleaseContents) -> None:
    (tmp_path / "contents").write_bytes(pickle.dumps(contents))
    program = """
        import dataclasses, pickle, sys; from pathlib import Path; from ambergrade.release.build import build_release
        contents = pickle.loads(Path(sys.argv[1]).read_bytes())
        for number in range(10):
            build_release(Path(sys.argv[2]), dataclasses.replace(contents, version=f"{sys.argv[3]}.{number}"))
    """
    line = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "contents"), str(tmp_path / "out")]
    both = [subprocess.Popen([*line, name]) for name in "xy"]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    subprocess.run(["sha256sum", "--strict", "--quiet", "-c", "SHA256SUMS"], cwd=tmp_path / "out", check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["contents", "out"]


def test_no_absolute_path_goes_into_a_release(tmp_path: Path, contents: ReleaseContents) -> None:
    facts = {"dataset": {"from": "/home/somebody/booru.sqlite"}}
    with pytest.raises(BadInput, match=r"lineage\.dataset\.from"):
        build_release(tmp_path / "out", dataclasses.replace(contents, lineage=facts))
    assert list(tmp_path.iterdir()) == []


def test_nothing_but_a_release_is_replaced(tmp_path: Path, contents: ReleaseContents) -> None:
    def refused(folder: Path, says: str) -> None:
        with pytest.raises(BadInput, match=says):
            build_release(folder, dataclasses.replace(contents, version="rev2"))

    out = tmp_path / "out"
    build_release(out, contents)
    (out / "thesis.tex").write_text("precious")  # in a release of ours
    refused(out, r"other things than a release: thesis\.tex")
    assert (out / "thesis.tex").read_text() == "precious"
    assert contents.file in read(out)
    (out / "thesis.tex").unlink()
    for manifest in ("{}", "[]", "null", '{"files": 7}', "torn"):
        (out / "MANIFEST.json").write_text(manifest)
        refused(out, "other things")
    (tmp_path / "link").symlink_to(out)
    refused(tmp_path / "link", "no folder of its own")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "no folder of its own")
    (tmp_path / "empty").mkdir()
    build_release(tmp_path / "empty", contents)


@pytest.mark.parametrize(
    "odd", ["../x", "/x", "a/b", "", ".x", "-x", "x\n", "x\0", "a\\b", "x" * 101, "\ud800", "a\u2028b"]
)
def test_names_and_versions_that_are_paths_are_refused(contents: ReleaseContents, odd: str) -> None:
    for what in ("name", "version"):
        with pytest.raises(BadInput, match=f"The release's {what}"):
            dataclasses.replace(contents, **{what: odd})


def test_a_pickle_is_refused_and_missing_facts_are_named_together(contents: ReleaseContents) -> None:
    with pytest.raises(BadInput, match="safetensors only"):
        dataclasses.replace(contents, checkpoint=Path("model.ckpt"))
    with pytest.raises(BadInput, match="formula, coefficients, models"):
        dataclasses.replace(contents, recipe={"dtype": None})


def test_what_was_not_scored_is_null_and_a_dash_never_zero(tmp_path: Path, contents: ReleaseContents) -> None:
    release = build_release(tmp_path / "out", contents)
    scores = json.loads((release.path / "evaluation.json").read_text())["scores"]
    assert scores["fid"]["beta7"]["value"] is None
    row = next(line for line in (release.path / "README.md").read_text().splitlines() if line.startswith("| fid ↓"))
    assert row == "| fid ↓ | 12.000 [11.000, 13.000] | – | – |"


def test_the_hub_reads_the_card(tmp_path: Path, contents: ReleaseContents, models: Path) -> None:
    from huggingface_hub import ModelCard

    release = build_release(tmp_path / "out", contents)
    model_card = ModelCard.load(release.path / "README.md")
    assert model_card.data.license == "apache-2.0"
    assert model_card.data.pipeline_tag == "text-to-image"
    assert sorted(model_card.data.base_model) == ["anxl2", "anxl3", "base7", "beta7"]
    assert "gamma rev1   = beta7 + 0.8*(anxl3 - anxl2) + 0.5 * (base7 - beta7)" in model_card.content
    assert "0.810 [0.780, 0.840]" in model_card.content
    assert "say nothing about real models" in model_card.content
    for path in models.iterdir():  # both digests, each under its name
        assert f"| `{path.stem}` | `{weights_sha256(path)}` | `{file_digest(path)}` |" in model_card.content
    assert "| input | sha256 of the weights | sha256 of the file |" in model_card.content


def test_the_call_with_mappings_still_builds(tmp_path: Path, contents: ReleaseContents) -> None:
    weights = {alias: {"sha256": row["weights"]} for alias, row in contents.recipe["models"].items()}
    recipe = {
        "formula": FORMULA,
        "coefficients": {"a": 0.8, "b": 0.5},
        "models": weights,
        "dtype": "the base's precision",
    }
    about = {field.name: getattr(contents, field.name) for field in dataclasses.fields(contents)}
    evaluation = {
        field.name: getattr(contents.evaluation, field.name) for field in dataclasses.fields(contents.evaluation)
    }
    evaluation |= {key: dataclasses.asdict(evaluation[key]) for key in ("prompts", "sampler")}
    evaluation |= {
        "scorers": {name: dataclasses.asdict(scorer) for name, scorer in contents.evaluation.scorers.items()}
    }
    del about["family"]
    about |= {"recipe": {**recipe, "family": "sdxl_tiny"}, "evaluation": evaluation}
    release = build(tmp_path / "out", **about)
    assert hashlib.sha256((release.path / contents.file).read_bytes()).hexdigest() == file_digest(contents.checkpoint)
