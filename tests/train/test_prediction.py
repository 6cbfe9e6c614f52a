"""What a model predicts travels with its weights: into the file, out of it, and into the sampler."""

from dataclasses import replace

import pytest

from ambergrade.errors import BadSetting
from ambergrade.family import sdxl
from ambergrade.generate.samplers import euler
from ambergrade.train.settings import TrainSettings
from ambergrade.train.trainer import fine_tune

SETTINGS = TrainSettings(
    images=4,
    batch=4,
    micro=4,
    lr={"unet": 1e-3, "te1": 0, "te2": 0},
    schedule={"name": "constant"},
    loss={"name": "v", "min_snr": 5},
    optimizer={"name": "adamw"},
)


@pytest.mark.parametrize("terminal", [False, True])
def test_a_v_prediction_model_stays_one(tiny_config, captions, latents, tmp_path, terminal):
    networks = sdxl.from_config(tiny_config, seed=7)
    assert networks.scheduler_config["prediction_type"] == "epsilon"
    settings = replace(SETTINGS, zero_terminal_snr=terminal)
    report = fine_tune(networks, captions, latents, settings, scratch=tmp_path, validation=(captions, latents))
    assert report.after.mean > 0
    marks = {"v_pred", "ztsnr"} if terminal else {"v_pred"}
    assert {key for key, value in networks.tensors().items() if not value.numel()} == marks  # as others mark it
    sdxl.write_checkpoint(tmp_path / "v.safetensors", networks.tensors(), {})

    again = sdxl.load(tmp_path / "v.safetensors", tiny_config)  # whose own scheduler says epsilon
    assert again.scheduler_config["prediction_type"] == "v_prediction"
    assert bool(again.scheduler_config.get("rescale_betas_zero_snr")) is terminal
    sampler = euler.scheduler(again.scheduler_config)
    assert sampler.config.prediction_type == "v_prediction"
    assert bool(sampler.config.rescale_betas_zero_snr) is terminal
    sampler.set_timesteps(10)
    assert int(sampler.timesteps[0]) == (999 if terminal else 901)  # all noise, or SDXL's own beginning
    live = sdxl.from_config(tiny_config, seed=8)
    live.assign(again.tensors())
    assert live.scheduler_config == again.scheduler_config
    with pytest.raises(BadSetting, match=r"Take loss@trainer\.loss=v"):
        fine_tune(again, captions, latents, replace(settings, loss={"name": "eps"}), scratch=tmp_path / "unlearn")


def test_an_epsilon_model_has_no_mark(networks, captions, latents, tmp_path):
    settings = replace(SETTINGS, loss={"name": "eps"})
    fine_tune(networks, captions, latents, settings, scratch=tmp_path)
    assert not {"v_pred", "ztsnr"} & networks.tensors().keys()


def test_all_noise_at_the_end_needs_v(tiny_config, captions, latents, tmp_path):
    settings = replace(SETTINGS, loss={"name": "eps"}, zero_terminal_snr=True)
    with pytest.raises(BadSetting, match="loss=v"):
        fine_tune(sdxl.from_config(tiny_config, seed=7), captions, latents, settings, scratch=tmp_path)
