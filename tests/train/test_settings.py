"""Settings: mistakes are told in words, and every yaml in conf/trainer composes into settings that fit."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ambergrade.errors import BadSetting, UnknownName
from ambergrade.train.settings import TrainSettings, plug

CONF = Path(__file__).parents[2] / "conf"
GOOD = {
    "images": 64,
    "batch": 32,
    "micro": 4,
    "lr": {"unet": 1e-4, "te1": 0, "te2": 0},
    "schedule": {"name": "constant"},
    "loss": {"name": "eps"},
    "optimizer": {"name": "adamw"},
}


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "trainer").glob("*.yaml")))
def test_every_trainer_yaml_makes_settings(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        values = OmegaConf.to_container(compose(overrides=[f"+trainer={name}"]).trainer, resolve=True)
    settings = TrainSettings.read(values)
    assert settings.accumulation(1) == settings.batch // settings.micro
    assert plug("schedules", "factor", settings.schedule)(settings.images, settings.images) > 0
    plug("losses", "loss", settings.loss)
    plug("optimizers", "optimizer", settings.optimizer)


@pytest.mark.parametrize("kind", ["schedule", "loss", "optimizer"])
def test_each_yaml_has_its_file_and_each_file_its_yaml(kind):
    folder = CONF.parent / "src" / "ambergrade" / "train" / {"loss": "losses"}.get(kind, f"{kind}s")
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert files == {path.stem for path in (CONF / kind).glob("*.yaml")}


def test_the_cards_batch_is_divided_as_the_card_says():
    settings = TrainSettings.read({**GOOD, "images": 128, "batch": 128, "micro": 4})
    assert settings.accumulation(processes=2) == 16
    with pytest.raises(BadSetting, match=r"set trainer\.micro to one of 1, 2, 4, 8, 16, 32, 64"):
        TrainSettings.read({**GOOD, "images": 128, "batch": 128, "micro": 3}).accumulation(2)
    with pytest.raises(BadSetting, match=r"set trainer\.batch to a multiple of 3, such as 126 or 129"):
        settings.accumulation(3)


@pytest.mark.parametrize(("processes", "share"), [(1, 32), (2, 16), (4, 8), (32, 1)])
def test_a_share_below_micro_is_one_pass(processes, share):
    settings = TrainSettings.read({**GOOD, "micro": 32})
    assert settings.per_pass(processes) == share
    assert settings.accumulation(processes) == 1
    with pytest.raises(BadSetting, match=r"set trainer\.batch to a multiple of 33, such as 33\."):
        settings.accumulation(33)


def test_settings_that_change_no_result_are_in_no_identity():
    """What names a finished run is what it was before these settings were there."""
    plain = TrainSettings.read(GOOD)
    where = {"save_every", "log_every", "sample_every", "validate_every", "checkpointing", "in_backward"}
    assert not where & set(plain.what)
    changed = {"validate_every": 64, "checkpointing": "full", "in_backward": True, "clip": 0.0}
    assert TrainSettings.read({**GOOD, **changed}).what == {**plain.what, "clip": 0.0}
    later = {"channels_last": False, "train_embeddings": False}
    assert TrainSettings.read({**GOOD, **later}).what == {**plain.what, **later}
    assert set(plain.what) == {
        *("images", "batch", "micro", "lr", "schedule", "loss", "optimizer", "clip", "shuffle", "caption_dropout"),
        *("tag_dropout", "group_dropout", "tokens", "loss_weights", "noise_offset", "pyramid_noise", "input_noise"),
        *("zero_terminal_snr", "ema", "precision", "compile", "lora", "seed"),
    }


def test_all_faults_are_told_at_once():
    with pytest.raises(BadSetting) as caught:
        TrainSettings.read({**GOOD, "images": 65, "lr": {"unet": 1e-4}, "caption_dropout": 1.5})
    message = str(caught.value)
    assert "the nearest is 64" in message
    assert "lr needs unet, te1, te2" in message
    assert "caption_dropout" in message


def test_misspelt_names_are_told_with_the_nearest():
    with pytest.raises(UnknownName, match="caption_dropout"):
        TrainSettings.read({**GOOD, "caption_dropuot": 0.1})
    with pytest.raises(UnknownName, match="constant"):
        plug("schedules", "factor", {"name": "constnat"})
    with pytest.raises(UnknownName, match="warmup"):
        plug("schedules", "factor", {"name": "constant", "warm_up": 3})
