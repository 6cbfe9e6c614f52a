"""Release folders: the same bytes everywhere, copies, put in place whole, and runnable recipes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file, save_file

from ambergrade.door import files as command
from ambergrade.errors import BadInput
from ambergrade.family.digests import weights_sha256
from ambergrade.family.header import read_header
from ambergrade.identity import file_digest
from ambergrade.nouns import PromptSet
from ambergrade.release.build import Payload, build_release
from ambergrade.release.facts import Draft, Evaluation, Score, Training

NAME = "gamma-rev1.safetensors"


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(program: str, *arguments: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.run(line, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True)


def test_sha256sum_accepts_the_folder_and_the_manifest_lists_every_file(
    tmp_path: Path, draft: Draft, payload: Payload
) -> None:
    release = build_release(tmp_path / "out", draft, payload)
    subprocess.run(["sha256sum", "--strict", "--quiet", "-c", "SHA256SUMS"], cwd=release.path, check=True)
    listed = json.loads((release.path / "MANIFEST.json").read_text())["files"]
    assert set(listed) == {*read(release.path)} - {"MANIFEST.json", "SHA256SUMS"}
    for name, row in listed.items():
        assert row == {"bytes": (release.path / name).stat().st_size, "sha256": file_digest(release.path / name)}
    wanted = {"scores/released.parquet", "samples/1.png", "config/unet/config.json", "prompts.jsonl", "release.json"}
    assert wanted <= {*listed}
    assert not [name for name in listed if "diffusion_pytorch_model" in name]
    assert release.digest == file_digest(release.path / "MANIFEST.json")
    assert release.model_sha256 == file_digest(release.path / NAME)
    assert PromptSet.read(release.path / "prompts.jsonl", "heldout").digest == payload.prompts.digest


def test_the_weights_are_a_copy_that_cannot_reach_into_the_store(
    tmp_path: Path, draft: Draft, payload: Payload
) -> None:
    before = payload.checkpoint.read_bytes()
    for as_it_is in (True, False):
        release = build_release(tmp_path / "out", draft, replace(payload, as_it_is=as_it_is))
        weights = release.path / NAME
        assert weights.stat().st_nlink == payload.checkpoint.stat().st_nlink == 1
        with weights.open("r+b") as file:
            file.write(b"edited by a tool")
        assert payload.checkpoint.read_bytes() == before


def test_the_header_says_what_is_released_and_the_tensors_stay_as_they_were(
    tmp_path: Path, draft: Draft, payload: Payload
) -> None:
    import hashlib

    release = build_release(tmp_path / "out", draft, payload)
    file = release.path / NAME
    header, before = read_header(file), read_header(payload.checkpoint)
    assert {**before.metadata, **header.metadata} == header.metadata | {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": "gamma rev1",
        "modelspec.author": "Kim",
        "modelspec.license": "Fair AI Public License 1.0-SD",
        "modelspec.resolution": "128x128",
        "modelspec.encoder_layer": "2",
        "modelspec.merged_from": "beta7, anxl3, anxl2, base7",
    }
    start = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert header.metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(file.read_bytes()[start:]).hexdigest()
    picture = header.metadata["modelspec.thumbnail"]
    assert picture.startswith("data:image/jpeg;base64,")
    assert weights_sha256(file) == weights_sha256(payload.checkpoint)
    for name, values in load_file(payload.checkpoint).items():
        assert np.array_equal(load_file(file)[name], values)
    kept = build_release(tmp_path / "kept", draft, replace(payload, as_it_is=True))
    assert kept.model_sha256 == file_digest(payload.checkpoint)


def test_samples_say_what_drew_them_as_a1111_does(tmp_path: Path, draft: Draft, payload: Payload) -> None:
    release = build_release(tmp_path / "out", draft, payload)
    with Image.open(release.path / "samples" / "1.png") as picture:
        assert picture.info == {"parameters": picture.info["parameters"]}
        prompt, negative, settings = picture.info["parameters"].split("\n")
    assert (prompt, negative) == ("1girl, smile", "Negative prompt: nsfw")
    given = dict(pair.split(": ") for pair in settings.split(", "))
    assert given == {
        "Steps": "12",
        "Sampler": "Euler",
        "CFG scale": "3.0",
        "Seed": "7",
        "Size": "128x128",
        "Model hash": release.model_sha256[:10],
        "Model": "gamma-rev1",
        "Clip skip": "2",
        "Version": "ambergrade",
    }


def test_a_checkpoint_of_other_bytes_than_recorded_is_refused(tmp_path: Path, draft: Draft, payload: Payload) -> None:
    recorded = file_digest(payload.checkpoint)
    build_release(tmp_path / "out", draft, replace(payload, checkpoint_sha256=recorded))
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(payload.checkpoint.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(BadInput, match=r"damaged\.safetensors is damaged"):
        build_release(tmp_path / "o", draft, replace(payload, checkpoint=damaged, checkpoint_sha256=recorded))
    (tmp_path / "pickle.safetensors").write_bytes(pickle.dumps({}))
    with pytest.raises(BadInput, match="safetensors"):
        build_release(tmp_path / "o", draft, replace(payload, checkpoint=tmp_path / "pickle.safetensors"))
    with pytest.raises(BadInput, match="safetensors only"):
        replace(payload, checkpoint=Path("model.ckpt"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.safetensors", "out", "pickle.safetensors"]


def test_the_recipe_runs_and_gives_the_releases_bytes(
    tmp_path: Path, draft: Draft, payload: Payload, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under other names, two of the inputs saved anew; the formula stands as it was written."""
    release = build_release(tmp_path / "out", draft, payload)
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for number, path in enumerate(sorted(models.iterdir())):
        save_file(load_file(path), inputs / f"{number}.safetensors", {"saved": "anew"} if number % 2 else None)
    out = tmp_path / "again.safetensors"
    line = ["merge", str(release.path / "recipe.yaml"), "--models", str(inputs), "--out", str(out)]
    assert command.main(line) == 0
    assert out.read_bytes() == (release.path / NAME).read_bytes()
    recipe = yaml.safe_load((release.path / "recipe.yaml").read_text())
    assert draft.recipe is not None
    assert recipe["formula"].strip() == draft.recipe.formula
    assert recipe["result"].pop("header").keys() > {"modelspec.license", "modelspec.hash_sha256"}
    assert recipe["result"] == {
        "name": NAME,
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
    assert command.main(["verify", str(release.path / NAME), "--models", str(inputs)]) == 0


def test_a_hash_in_the_header_that_is_not_the_tensors_is_found(
    tmp_path: Path, draft: Draft, payload: Payload, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    release = build_release(tmp_path / "out", draft, payload)
    file = release.path / NAME
    said = read_header(file).metadata["modelspec.hash_sha256"]
    file.write_bytes(file.read_bytes().replace(said.encode(), b"0x" + b"0" * 64))
    assert command.main(["verify", str(file), "--models", str(models)]) == 1
    assert "modelspec.hash_sha256 in the header, which is not the hash" in capsys.readouterr().out


def test_a_release_with_its_parents_rebuilds_from_itself(
    tmp_path: Path, draft: Draft, payload: Payload, models: Path
) -> None:
    bundle = {f"parents/{path.name}": path for path in models.iterdir()}
    files = {**payload.files, **bundle}
    release = build_release(tmp_path / "out", draft, replace(payload, files=files))
    out = tmp_path / "again.safetensors"
    line = ["merge", str(release.path / "recipe.yaml"), "--models", str(release.path / "parents"), "--out", str(out)]
    assert command.main(line) == 0
    assert file_digest(out) == release.model_sha256
    wrong = {**files, "parents/beta7.safetensors": models / "anxl3.safetensors"}
    with pytest.raises(BadInput, match=r"beta7\.safetensors is not the beta7 that was merged"):
        build_release(tmp_path / "other", draft, replace(payload, files=wrong))
    assert not (tmp_path / "other").exists()


def test_formulas_with_odd_line_breaks_stand_verbatim(tmp_path: Path, draft: Draft, payload: Payload) -> None:
    assert draft.recipe is not None
    for formula in ("tuned = x + y\ngamma = tuned # of two lines", "a = x # \u2028 odd \x85 breaks", "'a': [b] # : {"):
        recipe = replace(draft.recipe, formula=formula)
        release = build_release(tmp_path / "out", replace(draft, recipe=recipe), payload)
        assert yaml.safe_load((release.path / "recipe.yaml").read_text())["formula"].strip() == formula


def test_a_build_in_another_folder_process_zone_locale_and_umask_gives_the_same_bytes(
    tmp_path: Path, draft: Draft, payload: Payload
) -> None:
    release = build_release(tmp_path / "here" / "out", draft, payload)
    other = tmp_path / "there" / "deeper" / "other name"
    (tmp_path / "given").write_bytes(pickle.dumps((draft, payload)))
    program = """
        import os, pickle, sys; from pathlib import Path; from ambergrade.release.build import build_release
        os.umask(0o077)
        build_release(Path(sys.argv[2]), *pickle.loads(Path(sys.argv[1]).read_bytes()))
    """
    zone = {"TZ": "Asia/Tokyo", "LC_ALL": "C", "PYTHONHASHSEED": "7", "PYTHONUTF8": "0", "USER": "x"}
    done = run(program, tmp_path / "given", other, folder=Path("/"), **zone)
    assert done.returncode == 0, done.stderr
    assert read(other) == read(release.path)
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in [other, *other.rglob("*")])


def test_an_equal_release_is_left_alone_and_another_is_replaced_whole(
    tmp_path: Path, draft: Draft, payload: Payload
) -> None:
    out = tmp_path / "out"
    first = build_release(out, draft, payload)
    inode = out.stat().st_ino
    assert build_release(out, draft, payload) == first
    assert out.stat().st_ino == inode
    (out / "README.md").write_text("tampered")
    assert build_release(out, draft, payload) == first
    subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=out, check=True)
    second = build_release(out, replace(draft, version="rev2"), payload)
    assert second.digest != first.digest
    assert NAME not in read(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _score(draft: Draft) -> Evaluation:
    row = {**draft.evaluation.scores["tag_recall"], "gamma": Score(0.81 + 1e-9, 0.78, 0.84, 48)}
    return replace(draft.evaluation, scores={**draft.evaluation.scores, "tag_recall": row})


def _training(draft: Draft) -> Training:
    assert draft.training is not None
    return replace(draft.training, shown={**draft.training.shown, "images": 12801})


CHANGES: dict[str, Callable[[Draft, Payload], tuple[Draft, Payload]]] = {
    "coefficient": lambda d, p: (replace(d, recipe=replace(d.recipe, coefficients={"a": 0.8000001, "b": 0.5})), p),
    "score": lambda d, p: (replace(d, evaluation=_score(d)), p),
    "training": lambda d, p: (replace(d, training=_training(d)), p),
    "picture": lambda d, p: (d, replace(p, files={**p.files, "contact_sheet.png": p.files["heat_map.png"]})),
    "prompt": lambda d, p: (d, replace(p, prompts=p.prompts.first(1))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_of_an_input_changes_the_digest(
    tmp_path: Path, draft: Draft, payload: Payload, change: str
) -> None:
    before = build_release(tmp_path / "out", draft, payload).digest
    assert build_release(tmp_path / "out", *CHANGES[change](draft, payload)).digest != before


@pytest.mark.parametrize("killed_in", ["_fill", "_seal", "_sync", "_put_in_place", "between the renames"])
def test_a_build_that_was_killed_is_swept_up_and_the_old_release_stays_until_then(
    tmp_path: Path, draft: Draft, payload: Payload, killed_in: str
) -> None:
    out = tmp_path / "out"
    build_release(out, draft, payload)
    before = read(out)
    other = replace(draft, version="rev2")
    (tmp_path / "given").write_bytes(pickle.dumps((other, payload)))
    program = """
        import os, pickle, signal, sys; from pathlib import Path; import ambergrade.release.build as room
        kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[3] == "between the renames":
            rename = Path.rename
            Path.rename = lambda self, target: kill() if Path(target) == Path(sys.argv[2]) else rename(self, target)
        else:
            setattr(room, sys.argv[3], kill)
        room.build_release(Path(sys.argv[2]), *pickle.loads(Path(sys.argv[1]).read_bytes()))
    """
    done = run(program, tmp_path / "given", out, killed_in, folder=tmp_path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert (read(out) if out.exists() else read(tmp_path / ".out.old")) == before
    (tmp_path / "given").unlink()
    build_release(out, other, payload)
    assert "gamma-rev2.safetensors" in read(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_builds_at_once_end_in_one_whole_release(tmp_path: Path, draft: Draft, payload: Payload) -> None:
    (tmp_path / "given").write_bytes(pickle.dumps((draft, payload)))
    program = """
        import dataclasses, pickle, sys; from pathlib import Path; from ambergrade.release.build import build_release
        draft, payload = pickle.loads(Path(sys.argv[1]).read_bytes())
        for number in range(4):
            build_release(Path(sys.argv[2]), dataclasses.replace(draft, version=f"{sys.argv[3]}.{number}"), payload)
    """
    line = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "given"), str(tmp_path / "out")]
    both = [subprocess.Popen([*line, name]) for name in "xy"]
    assert [process.wait(timeout=300) for process in both] == [0, 0]
    subprocess.run(["sha256sum", "--strict", "--quiet", "-c", "SHA256SUMS"], cwd=tmp_path / "out", check=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given", "out"]


def test_nothing_but_a_release_is_replaced(tmp_path: Path, draft: Draft, payload: Payload) -> None:
    def refused(folder: Path, says: str) -> None:
        with pytest.raises(BadInput, match=says):
            build_release(folder, replace(draft, version="rev2"), payload)

    out = tmp_path / "out"
    build_release(out, draft, payload)
    for foreign in (out / "thesis.tex", out / "scores" / "thesis.tex"):
        foreign.write_text("precious")  # in a release of ours
        refused(out, f"other things than a release: {foreign.relative_to(out)}")
        assert foreign.read_text() == "precious"
        assert NAME in read(out)
        foreign.unlink()
    (out / "mine").mkdir()
    refused(out, "other things than a release: mine")
    (out / "mine").rmdir()
    shutil.move(out / "README.md", tmp_path / "README.md")
    (out / "README.md").symlink_to(tmp_path / "README.md")
    refused(out, r"other things than a release: README\.md")
    for manifest in ("{}", "[]", "null", '{"files": 7}', "torn"):
        (out / "MANIFEST.json").write_text(manifest)
        refused(out, "other things")
    (tmp_path / "link").symlink_to(out)
    refused(tmp_path / "link", "no folder of its own")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "no folder of its own")
    (tmp_path / "empty").mkdir()
    build_release(tmp_path / "empty", draft, payload)


@pytest.mark.parametrize(
    "odd", ["../x", "/x", "a/b", "", ".x", "-x", "x\n", "x\0", "a\\b", "x" * 101, "\ud800", "a\u2028b"]
)
def test_names_and_versions_that_are_paths_are_refused(draft: Draft, odd: str) -> None:
    for what in ("name", "version"):
        with pytest.raises(BadInput, match=f"The release's {what}"):
            replace(draft, **{what: odd})
