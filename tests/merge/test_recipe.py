"""Recipes: what enters the digest, what the file's header says, and that a file rebuilds from its own header."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import Tensor

from ambergrade.errors import AmbergradeError, BadInput, BadSetting, UnknownName
from ambergrade.family import sdxl
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
    ],
)
def test_all_that_makes_a_merge_enters_the_digest(change: dict[str, Any]) -> None:
    assert dataclasses.replace(RECIPE, **change).digest != RECIPE.digest


def test_what_makes_no_merge_stays_out_of_the_digest() -> None:
    spelled = Formula.parse("gamma   rev1 = beta7+a*(anxl3-anxl2)+(b)*(base7-beta7)", [*MODELS, "unused"])
    same = Recipe(spelled, {"b": 0.5, "a": 0.8}, {"unused": "9" * 64, **dict(reversed(INPUTS.items()))}, policies={})
    assert same.digest == RECIPE.digest


def test_json_there_and_back() -> None:
    again = Recipe.from_json(RECIPE.to_json())
    assert again == RECIPE
    assert again.digest == RECIPE.digest
    with pytest.raises(BadInput, match="has the keys"):
        Recipe.from_json('{"formula": "x"}')


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
    base = {name: tensor.clone() for name, tensor in sdxl.tensors(sdxl.from_config(config, 1)).items()}
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
    sdxl.assign(live, point)
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
