"""A family by its name: what it is made of, what it loads, and what it refuses by name."""

import re

import pytest
import torch

from ambergrade.errors import BadInput, BadSetting, UnknownName
from ambergrade.family import sd15, sdxl
from ambergrade.family.convert import open_checkpoint
from ambergrade.family.files import write_tensors
from ambergrade.family.load import families, family
from ambergrade.store import BUILTIN

ROOT = BUILTIN.parents[1]


def test_every_family_answers_to_its_name():
    for name in ("sdxl", "sdxl_tiny", "sd15"):
        assert family(name).name == name
    with pytest.raises(UnknownName, match="Did you mean 'sdxl'"):
        family("sdlx")
    assert [each.name for each in families()] == ["sd15", "sdxl"]  # a file does not tell sdxl_tiny from sdxl


def test_blocks_and_parts_are_those_of_the_original_code():
    assert family("sdxl").parts == family("sdxl_tiny").parts == ("unet", "te1", "te2")
    assert family("sd15").parts == ("unet", "te1")
    for each in families():
        numbers = {name.split(".")[3] for name in each.published if ".input_blocks." in name}
        assert len(numbers) == each.blocks == max(map(int, numbers)) + 1
    assert family("sdxl").block_names[:2] + family("sdxl").block_names[-2:] == ("IN00", "IN01", "OUT07", "OUT08")


def test_networks_are_loaded_by_the_family(tiny_config, tmp_path):
    tiny = family("sdxl_tiny")
    networks = tiny.networks.from_config(tiny_config, seed=5)
    weights = networks.tensors()
    digest = write_tensors(tmp_path / "x.safetensors", weights, {})
    loaded = tiny.networks.load(tmp_path / "x.safetensors", tiny_config)
    assert torch.equal(loaded.unet.conv_in.weight, networks.unet.conv_in.weight)
    assert tiny.weights_digest(tmp_path / "x.safetensors") == digest
    assert tiny.read_checkpoint(tmp_path / "x.safetensors").keys() == weights.keys()


def test_what_is_trained_and_drawn_with_is_asked_of_the_networks_alone():
    """Another family is one file and one yaml: no room names SDXL's module."""
    rooms = [ROOT / room for room in ("train", "generate", "merge", "score", "captions", "search", "track")]
    told = [
        file
        for room in rooms
        for file in room.rglob("*.py")
        if "family.sdxl" in (text := file.read_text())
        or "import sdxl" in text
        or ("text_encoder_2" in text and room.name in ("train", "generate"))
    ]
    assert told == []
    assert family("sdxl").trained == ("unet", "text_encoder", "text_encoder_2")


def test_what_a_family_cannot_do_is_refused_by_name(tiny_config, tmp_path):
    with pytest.raises(BadSetting, match=r"family sd15 cannot be loaded.*\n.*family=sdxl, sdxl_tiny"):
        family("sd15").networks.load(tmp_path / "x.safetensors", tiny_config)


def test_a_file_of_another_family_is_told_by_its_keys():
    file = BUILTIN / "beta7.safetensors"
    with pytest.raises(BadInput) as caught:
        open_checkpoint(file, sd15.FAMILY)
    assert "beta7.safetensors is of family sdxl, not sd15: it has" in str(caught.value)
    assert "'conditioner.embedders.0.transformer" in str(caught.value)
    assert re.search(r"and lacks \d+ such as 'cond_stage_model\.", str(caught.value))
    assert "Say family=sdxl" in str(caught.value)
    assert open_checkpoint(file, family("sdxl_tiny")).layout.family is sdxl.FAMILY
