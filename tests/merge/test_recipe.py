"""Recipes: what enters the digest, what the file's header says, and that a file rebuilds from its own header."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import runpy
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor

from ambergrade.door import files as command
from ambergrade.errors import AmbergradeError, BadInput, BadSetting, MissingObject, UnknownName
from ambergrade.family import sdxl
from ambergrade.identity import canonical_json, digest
from ambergrade.merge.files import from_values, read_recipe, recipe_document, verify
from ambergrade.merge.formula import Formula
from ambergrade.merge.recipe import Recipe, metadata
from ambergrade.merge.resident import ResidentMerge

CONF = Path(__file__).parents[2] / "conf"
MODELS = ("beta7", "base7", "anxl2", "anxl3")
GAMMA = Formula.parse("gamma rev1 = beta7 + a * (anxl3 - anxl2) + b * (base7 - beta7)", MODELS)
INPUTS = {alias: str(number) * 64 for number, alias in enumerate(MODELS)}
RECIPE = Recipe(GAMMA, {"a": 0.8, "b": 0.5}, INPUTS)


@pytest.mark.parametrize(
    "change",
    [
        {"formula": Formula.parse("gamma rev1 = beta7 + a * (anxl3 - anxl2) + b * (base7 - anxl2)", MODELS)},
        {"coefficients": {"a": 0.8, "b": 0.25}},
        {"inputs": {**INPUTS, "base7": "f" * 64}},
        {"dtype": "bf16"},
        {"policies": {"vae": "merge"}},
    ],
)
def test_all_that_makes_a_merge_enters_the_digest(change: dict[str, Any]) -> None:
    assert dataclasses.replace(RECIPE, **change).digest != RECIPE.digest


def test_what_makes_no_merge_stays_out_of_the_digest() -> None:
    spelled = Formula.parse("gamma   rev1 = beta7+a*(anxl3-anxl2)+(b)*(base7-beta7)", [*MODELS, "unused"])
    inputs = {"unused": "9" * 64, **dict(reversed(INPUTS.items()))}
    same = Recipe(spelled, {"b": 0.5, "a": 0.8}, inputs, policies={}, files=dict.fromkeys(MODELS, "a" * 64))
    assert same.digest == RECIPE.digest


def test_json_there_and_back() -> None:
    both = dataclasses.replace(RECIPE, files=dict.fromkeys(MODELS, "a" * 64))
    for recipe in (RECIPE, both):
        again = Recipe.from_json(recipe.to_json())
        assert again == recipe
        assert again.digest == RECIPE.digest
    inputs = json.loads(both.to_json())["inputs"]
    assert inputs["base7"] == {"weights": INPUTS["base7"], "file": "a" * 64}  # each is called by what it is


def spoilt(**changes: Any) -> str:
    return json.dumps({**json.loads(RECIPE.to_json()), **changes})


@pytest.mark.parametrize(
    "text",
    [
        '{"formula": "x"}',
        "[" * 100_000,
        spoilt(coefficients={"a": 10**400, "b": 0.5}),
        spoilt(coefficients={"a": 1e301, "b": 0.5}),
        spoilt(coefficients={"a": float("nan"), "b": 0.5}),
        spoilt(coefficients={"a": True, "b": 0.5}),
        spoilt(inputs={alias: {"wieghts": "0" * 64} for alias in MODELS}),
        spoilt(inputs={alias: {"weights": "0"} for alias in MODELS}),
        spoilt(inputs={alias: {"file": "0" * 64} for alias in MODELS}),
        spoilt(inputs={**INPUTS, "beta7": {"weights": "0" * 64}}),
        spoilt(inputs={**{alias: {"weights": "0" * 64} for alias in MODELS}, "\ud800": {"weights": "0" * 64}}),
        spoilt(policies={"vae": "\ud800"}),
    ],
)
def test_a_malformed_recipe_is_refused_in_a_few_words(text: str) -> None:
    with pytest.raises(BadInput, match="has the keys"):
        Recipe.from_json(text)


def test_recipes_that_cannot_be_made_are_refused() -> None:
    wrong: list[tuple[type[AmbergradeError], dict[str, Any]]] = [
        (BadSetting, {"coefficients": {"a": 0.8}}),
        (UnknownName, {"dtype": "half"}),
        (UnknownName, {"inputs": {"beta7": "0" * 64}}),
        (UnknownName, {"policies": {"vea": "base"}}),
        (BadSetting, {"policies": {"vae": "mrege"}}),
    ]
    for error, change in wrong:
        with pytest.raises(error):
            dataclasses.replace(RECIPE, **change)


def test_the_header_speaks_modelspec_and_a1111() -> None:
    header = metadata(RECIPE, architecture="stable-diffusion-xl-v1-base")
    assert all(isinstance(value, str) for value in header.values())
    must = {"sai_model_spec", "architecture", "implementation", "title"}  # ModelSpec 1.0.0, "MUST"
    assert {f"modelspec.{key}" for key in must} <= header.keys()
    assert header["modelspec.title"] == "gamma rev1"
    assert {digest: model["name"] for digest, model in json.loads(header["sd_merge_models"]).items()} == {
        digest: alias for alias, digest in INPUTS.items()
    }
    assert json.loads(header["sd_merge_recipe"])["coefficients"] == {"a": 0.8, "b": 0.5}
    assert not re.search(r"\d{4}-\d\d-\d\d|/", json.dumps(header).replace("stable-diffusion", ""))


@pytest.mark.parametrize("file", sorted((CONF / "merge").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_merge_yaml_makes_a_recipe(file: Path) -> None:
    settings = yaml.safe_load(file.read_text())
    for models in sorted((CONF / "models").glob("*.yaml")):
        aliases = [*yaml.safe_load(models.read_text()), "base7", "base8"]
        formula = Formula.parse(settings["formula"], aliases)
        inputs = dict.fromkeys(aliases, "0" * 64)
        Recipe(formula, settings["coefficients"], inputs, settings["dtype"], settings["policies"])


def test_the_card_line_is_shipped() -> None:
    settings = yaml.safe_load((CONF / "merge" / "gamma_rev1.yaml").read_text())
    assert Formula.parse(settings["formula"], MODELS) == GAMMA
    assert settings["coefficients"] == {"a": 0.8, "b": 0.5}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    family = runpy.run_path(str(Path(__file__).parents[1] / "family" / "conftest.py"))
    written: Path = family["write_tiny_config"](tmp_path_factory.mktemp("narrow"))
    return written


def test_the_live_merge_is_the_written_file_and_rebuilds_from_its_header(config: Path, tmp_path: Path) -> None:
    base = {name: tensor.clone() for name, tensor in sdxl.from_config(config, 1).tensors().items()}
    inputs: dict[str, dict[str, Tensor]] = {}
    for number, alias in enumerate(MODELS):
        random = torch.Generator().manual_seed(number)
        inputs[alias] = {
            name: (tensor + 0.01 * torch.randn(tensor.shape, generator=random)).half()
            if tensor.is_floating_point()
            else tensor
            for name, tensor in base.items()
        }
    recipe = Recipe(GAMMA, {"a": 0.8, "b": 0.5}, {alias: sdxl.weights_digest(inputs[alias]) for alias in MODELS})
    point = ResidentMerge(GAMMA, inputs).at(recipe.coefficients)
    live = sdxl.from_config(config, 2)
    live.assign(point)
    path = tmp_path / "gamma.safetensors"
    written = sdxl.write_checkpoint(path, point, metadata(recipe, architecture="sdxl_tiny"))
    loaded = sdxl.load(path, config)

    for name, module in live.modules().items():
        other = loaded.modules()[name].state_dict()
        assert all(torch.equal(value, other[key]) for key, value in module.state_dict().items()), name
    unmerged = inputs["beta7"]
    assert not torch.equal(point["model.diffusion_model.out.2.weight"], unmerged["model.diffusion_model.out.2.weight"])

    with safe_open(path, "pt") as file:
        header = file.metadata()
    told = Recipe.from_json(header["ambergrade.recipe"])
    assert told.inputs == {alias: sdxl.weights_digest(inputs[alias]) for alias in told.formula.models}
    again = ResidentMerge(told.formula, inputs, dtype=told.dtype).at(told.coefficients)
    rebuilt = tmp_path / "again.safetensors"
    assert sdxl.write_checkpoint(rebuilt, again, metadata(told, architecture="sdxl_tiny")) == written
    assert rebuilt.read_bytes() == path.read_bytes()


# --- made again ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three related models of no known family, and a merge of two of them that is an input like them."""
    folder = tmp_path_factory.mktemp("parents")
    random = np.random.default_rng(0)
    base = {"w": random.standard_normal((40, 30)), "b": random.standard_normal(7), "a.first": random.standard_normal(3)}
    paths = {}
    for name in ("x", "y", "z"):
        tensors = {
            key: (value + 0.01 * random.standard_normal(value.shape)).astype(np.float16) for key, value in base.items()
        }
        save_file({**tensors, "n": np.arange(5)}, folder / f"{name}.safetensors", {"title": f"the model {name}"})
        paths[name] = folder / f"{name}.safetensors"
    merged = {"formula": "m = x + 0.3 * (y - x)", "models": {name: str(paths[name]) for name in "xy"}}
    command.run_recipe(from_values(merged, folder), out=folder / "m.safetensors")
    return {**paths, "m": folder / "m.safetensors", "x again": paths["x"]}


FORMULA = "mine   = z + k*(m - y) + 0.25*(x again - x)"


@pytest.fixture(scope="module")
def released(parents: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release's recipe beside its model, of inputs that have recipes of their own and of one under two names."""
    folder = tmp_path_factory.mktemp("release")
    values = {
        "formula": FORMULA,
        "models": {alias: str(path) for alias, path in parents.items()},
        "coefficients": {"k": 0.5},
    }
    out = folder / "mine-v1.safetensors"
    command.run_recipe(from_values(values, folder), out=out)
    result = {"name": out.name, "bytes": out.stat().st_size, "file": hashlib.sha256(out.read_bytes()).hexdigest()}
    document = recipe_document(out, formula=FORMULA, names={alias: path.name for alias, path in parents.items()})
    document["result"] = result
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return folder


def save_anew(source: Path, target: Path) -> None:
    """Equal weights in other bytes: other metadata, the tensors in reverse order."""
    tensors = dict(reversed(load_file(source).items()))
    header: dict[str, Any] = {"__metadata__": {"saved": "anew"}}
    data = b""
    for name, value in tensors.items():
        word = {"float16": "F16", "int64": "I64"}[value.dtype.name]
        header[name] = {
            "dtype": word,
            "shape": list(value.shape),
            "data_offsets": [len(data), len(data) + value.nbytes],
        }
        data += value.tobytes()
    text = json.dumps(header).encode()
    target.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("anew", [(), ("y", "m"), ("x", "y", "z", "m")])
def test_a_releases_recipe_gives_the_releases_bytes_from_renamed_and_resaved_inputs(
    parents: dict[str, Path],
    released: Path,
    tmp_path: Path,
    anew: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    models, wanted = tmp_path / "models", released / "mine-v1.safetensors"
    (models / "deeper").mkdir(parents=True)
    for number, name in enumerate(("z", "m", "x", "y")):
        target = models / ("deeper" if number % 2 else "") / f"{number}.safetensors"
        (save_anew if name in anew else lambda a, b: b.write_bytes(a.read_bytes()))(parents[name], target)
    save_file({"w": np.ones(3)}, models / "another.safetensors")
    (models / "broken.safetensors").symlink_to(tmp_path / "nowhere")
    (models / "torn.safetensors").write_bytes(b"torn")
    recipe, out = released / "recipe.yaml", tmp_path / "out.safetensors"
    assert command.main(["merge", str(recipe), "--models", str(models), "--out", str(out)]) == 0
    assert out.read_bytes() == wanted.read_bytes()
    assert "the released file's bytes" in capsys.readouterr().out
    found = verify(wanted, models)
    assert found.same
    assert set(found.resaved) == {*anew, *(["x again"] if "x" in anew else [])}
    assert found.bytes_compared == wanted.stat().st_size
    # Without a name for the output it bears the release's, in the working folder; other coefficients, other bytes.
    monkeypatch.chdir(tmp_path)
    assert command.main(["merge", str(recipe), "k=0.25", "--models", str(models), "--out", "other.safetensors"]) == 0
    assert (tmp_path / "other.safetensors").read_bytes() != wanted.read_bytes()
    assert command.main(["merge", str(recipe), "--models", str(models)]) == 0
    assert (tmp_path / wanted.name).read_bytes() == wanted.read_bytes()


def test_what_a_releases_recipe_lacks_is_told(
    parents: dict[str, Path], released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    written = read_recipe(released / "recipe.yaml")
    with pytest.raises(BadSetting, match="--models DIR"):
        written.job()
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "x.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(MissingObject, match=r"(?s)y: sha256 [0-9a-f]{64} \(file\).*\(weights\).*broken link"):
        written.job(tmp_path / "models")
    values = yaml.safe_load((released / "recipe.yaml").read_text())
    for change in (
        {"models": {**values["models"], "x": {"weights": "0" * 63}}},
        {"models": {**values["models"], "x": {"name": "x.safetensors"}}},
        {"result": {"name": "../x.safetensors"}},
        {"result": {"bytes": -1}},
        {"ancestors": {"x": float("nan")}},
    ):
        with pytest.raises(BadInput, match=next(iter(change))):
            from_values({**values, **change}, tmp_path)


def test_a_result_that_is_not_the_releases_is_told(
    parents: dict[str, Path], released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = yaml.safe_load((released / "recipe.yaml").read_text())
    values["result"]["file"] = "0" * 64
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    out = tmp_path / "out.safetensors"
    assert command.main(["merge", str(recipe), "--models", str(parents["x"].parent), "--out", str(out)]) == 1
    assert "NOT the released file" in capsys.readouterr().err


def test_a_file_of_an_earlier_version_is_read_and_verified(parents: dict[str, Path], tmp_path: Path) -> None:
    """Its header names inputs by the sha256 of their files alone, and its digest is over those."""
    values = {"formula": "mine = x + k * (y - x)", "models": {name: str(parents[name]) for name in "xy"}}
    out = tmp_path / "out.safetensors"
    command.run_recipe(from_values({**values, "coefficients": {"k": 0.5}}, tmp_path), out=out)
    length = 8 + struct.unpack("<Q", out.read_bytes()[:8])[0]
    header = json.loads(out.read_bytes()[8:length])
    files = {name: hashlib.sha256(parents[name].read_bytes()).hexdigest() for name in "xy"}
    policies = {"cosmetic": "refuse", "ema": "drop", "missing": "refuse", "nonfinite": "refuse", "vae": "base"}
    document = {
        "coefficients": {"k": 0.5},
        "dtype": None,
        "formula": values["formula"],
        "inputs": files,
        "policies": policies,
    }
    header["__metadata__"] |= {
        "modelspec.prediction_type": "epsilon",  # as it was written of whatever was not known
        "ambergrade.recipe": canonical_json(document),
        "ambergrade.recipe_digest": digest(document),
        "sd_merge_recipe": canonical_json({**document, "type": "ambergrade", "custom_name": "mine"}),
    }
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    old = tmp_path / "old.safetensors"
    old.write_bytes(struct.pack("<Q", len(text)) + text + out.read_bytes()[length:])
    found = verify(old, parents["x"].parent, cache=tmp_path / "cache.json")
    assert found.same, found.first_difference
    assert {alias: found.recipe.model(alias) for alias in "xy"} == {
        name: {"file": sha256} for name, sha256 in files.items()
    }


BLOCKED = "torch hydra mlflow PIL pandas pyarrow scipy matplotlib diffusers transformers sklearn torchvision accelerate"


def test_merging_and_verifying_need_no_torch(released: Path, parents: dict[str, Path], tmp_path: Path) -> None:
    """Run where importing any of the heavy libraries fails."""
    program = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {set(BLOCKED.split())!r}:
            raise ImportError(f"{{name}} is not installed here")

sys.meta_path.insert(0, Blocker())
from ambergrade.door.files import main
sys.exit(main(sys.argv[1:]))
"""
    out, models = tmp_path / "out.safetensors", str(parents["x"].parent)
    for line in (
        ["merge", str(released / "recipe.yaml"), "--models", models, "--out", str(out)],
        ["verify", str(out), "--models", models],
        ["digest", str(out)],
    ):
        done = subprocess.run([sys.executable, "-c", program, *line], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert out.read_bytes() == (released / "mine-v1.safetensors").read_bytes()
