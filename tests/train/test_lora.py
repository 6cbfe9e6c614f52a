"""Adapters of every kind: they begin at the base, are all that moves, resume, and load back through a merge."""

import runpy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from ambergrade.errors import BadSetting
from ambergrade.family import sdxl
from ambergrade.family.files import read_tensors
from ambergrade.merge import lora as merging
from ambergrade.train.denoiser import Denoiser
from ambergrade.train.lora import Adapters
from ambergrade.train.settings import LoraSettings, TrainSettings
from ambergrade.train.trainer import fine_tune

SETTINGS = TrainSettings(
    images=8,
    batch=4,
    micro=4,
    lr={"unet": 1e-3, "te1": 1e-3, "te2": 1e-3},
    schedule={"name": "constant"},
    loss={"name": "eps"},
    optimizer={"name": "adamw"},
)
KINDS = {
    "lora": LoraSettings(rank=4, alpha=2),
    "locon": LoraSettings(kind="locon", rank=4, alpha=2),
    "loha": LoraSettings(kind="loha", rank=4, alpha=2),
    "lokr": LoraSettings(kind="lokr", rank=2, alpha=1, factor=4),
    "lokr, whole factors": LoraSettings(kind="lokr", rank=100_000, alpha=1),
}


def shapes(tensors):
    return {name: tuple(value.shape) for name, value in tensors.items()}


@pytest.fixture(scope="module")
def sdxl_config(tmp_path_factory):
    """SDXL's whole topology, narrow: a merge knows a family by its keys."""
    write = runpy.run_path(str(Path(__file__).parents[1] / "family" / "conftest.py"))["write_tiny_config"]
    return write(tmp_path_factory.mktemp("sdxl_deep"))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_trained_is_what_a_merge_reads_back(sdxl_config, captions, latents, tmp_path, kind):
    networks = sdxl.from_config(sdxl_config, seed=7)
    beginning = {key: value.clone() for key, value in networks.tensors().items()}
    report = fine_tune(networks, captions, latents, replace(SETTINGS, lora=KINDS[kind]), scratch=tmp_path)
    trained, file = networks.tensors(), read_tensors(report.lora)
    with safe_open(report.lora, "np") as opened:
        assert opened.metadata()["ss_network_dim"] == str(KINDS[kind].rank)
    assert trained.keys() == beginning.keys()  # nothing of the adapters is left in the modules
    wanted = merging.targets(shapes(file), shapes(beginning))
    moved = {key for key, value in trained.items() if not torch.equal(value, beginning[key])}
    assert moved
    assert moved <= set(wanted)
    for part in ("model.diffusion_model.", "conditioner.embedders.0.", "conditioner.embedders.1."):
        assert any(key.startswith(part) for key in moved)
    for key in wanted:
        difference = merging.difference(key, {name: file[name] for name in wanted[key]}, beginning[key])
        size = float((trained[key] - beginning[key]).abs().max())
        torch.testing.assert_close(difference, trained[key] - beginning[key], atol=1e-3 * size + 2e-7, rtol=1e-3)


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_a_killed_run_resumes(networks, beginning, tiny_config, captions, latents, tmp_path, kind, kill_at, killed):
    settings = replace(SETTINGS, lora=KINDS[kind], save_every=4)
    fine_tune(networks, captions, latents, settings, scratch=tmp_path / "whole")
    expected = sdxl.weights_digest(networks.tensors())

    for on_log in (kill_at(8), None):
        fresh = sdxl.from_config(tiny_config, seed=7)  # as in a new process
        fresh.assign(beginning)
        try:
            fine_tune(fresh, captions, latents, settings, scratch=tmp_path, on_log=on_log)
        except killed:
            assert on_log
    assert sdxl.weights_digest(fresh.tensors()) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_training_begins_at_the_base(tiny_config, beginning, kind):
    fresh = sdxl.from_config(tiny_config, seed=7)
    fresh.assign(beginning)
    given = {
        "noisy": torch.ones(1, 4, 8, 8),
        "timesteps": torch.tensor([300]),
        "ids": [torch.zeros(1, 77, dtype=torch.int64)] * 2,
        "time_ids": torch.ones(1, 6),
    }
    denoiser = Denoiser(fresh).eval()
    with torch.no_grad():
        before = denoiser(**given)
        Adapters(denoiser, SETTINGS.lr, 0, KINDS[kind])
        torch.testing.assert_close(denoiser(**given), before, atol=1e-5, rtol=1e-5)
    assert {name.split(".")[0] for name, p in denoiser.named_parameters() if p.requires_grad} == {"unet", "te1", "te2"}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"rank": 4}, "trainer.lora.alpha: no value given"),
        ({"rank": "4", "alpha": 1}, "trainer.lora.rank: a whole number is needed, found '4'"),
        ({"rank": 0, "alpha": 1}, "rank and alpha must be above 0"),
        ({"rank": 4, "alpha": 1, "kind": "lorka"}, "trainer.lora.kind 'lorka' is not known"),
        ({"rank": 4, "alpha": 1, "x": 1}, "trainer.lora.x"),
    ],
)
def test_what_is_no_adapter_is_refused(wrong, told):
    with pytest.raises(BadSetting, match=told):
        TrainSettings.read({**asdict(SETTINGS), "lora": wrong})
