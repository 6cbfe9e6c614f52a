"""Settings: mistakes are told in words, and every yaml in conf/trainer composes into settings that fit."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from ambergrade.errors import BadSetting, UnknownName
from ambergrade.train.settings import TrainSettings, check_parts, plug

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
    if settings.optimizer["name"].endswith("8bit"):
        with pytest.raises(BadSetting, match="bitsandbytes"):
            settings.check()
    else:
        settings.check()


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
    plain = TrainSettings.read(GOOD)
    where = {"save_every", "log_every", "sample_every", "validate_every", "checkpointing", "in_backward"}
    assert not where & set(plain.what)
    changed = {"validate_every": 64, "checkpointing": "full", "in_backward": True, "clip": 0.0}
    assert TrainSettings.read({**GOOD, **changed}).what == {**plain.what, "clip": 0.0}
    assert TrainSettings.read({**GOOD, "micro": 64}).what == TrainSettings.read({**GOOD, "micro": 32}).what
    assert TrainSettings.read({**GOOD, "micro": 16}).what != TrainSettings.read({**GOOD, "micro": 32}).what
    assert set(plain.what) == {
        *("images", "batch", "micro", "lr", "schedule", "loss", "optimizer", "clip", "shuffle", "caption_dropout"),
        *("tag_dropout", "group_dropout", "tokens", "loss_weights", "noise_offset", "pyramid_noise", "input_noise"),
        *("zero_terminal_snr", "ema", "precision", "compile", "lora", "seed", "channels_last", "train_embeddings"),
    }


def test_all_faults_are_told_at_once():
    with pytest.raises(BadSetting) as caught:
        TrainSettings.read({**GOOD, "images": 65, "lr": {"unet": 0.0}, "caption_dropout": 1.5})
    message = str(caught.value)
    assert "the nearest is 64" in message
    assert "lr needs a rate above 0" in message
    assert "caption_dropout" in message


def test_each_part_of_a_family_has_a_learning_rate():
    check_parts(TrainSettings.read(GOOD), ("unet", "te1", "te2"))
    with pytest.raises(BadSetting, match=r"trainer\.lr needs unet, te1, found unet, te1, te2"):
        check_parts(TrainSettings.read(GOOD), ("unet", "te1"))


def test_misspelt_names_are_told_with_the_nearest():
    with pytest.raises(BadSetting, match=r"trainer\.caption_dropuot[\s\S]*trainer\.caption_dropout"):
        TrainSettings.read({**GOOD, "caption_dropuot": 0.1})
    with pytest.raises(UnknownName, match=r"trainer\.schedule 'constnat'[\s\S]*constant"):
        plug("schedule", {"name": "constnat"})
    with pytest.raises(BadSetting, match=r"trainer\.schedule\.warm_up[\s\S]*trainer\.schedule\.warmup"):
        plug("schedule", {"name": "constant", "warm_up": 3})


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("clip", "x", "a number is needed, found 'x'"),
        ("ema", None, "a number is needed, found None"),
        ("clip", float("nan"), "a finite number is needed"),
        ("shuffle", "false", "true or false is needed, found 'false'"),
        ("seed", 1.5, "a whole number is needed, found 1.5"),
        ("images", True, "a whole number is needed, found True"),
        ("lr", {"unet": "1e-4", "te1": 0, "te2": 0}, r"a number is needed, found '1e-4'"),
        ("tokens", 100, "Known: 150, 225, 75"),
        ("precision", "half", "Known: bf16, bf16-plain, bf16-sr, fp32"),
        ("checkpointing", None, "Known: full, none, selective"),
        ("loss_weights", {"solo": None}, "a number is needed, found None"),
        ("schedule", "constant", "a mapping is needed"),
    ],
)
def test_values_of_a_wrong_type_are_told_with_their_key(key, value, told):
    with pytest.raises(BadSetting, match=told) as caught:
        TrainSettings.read({**GOOD, key: value})
    assert f"trainer.{key}" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "chosen", "told"),
    [
        ("schedule", {"name": "constant", "warmup": "x"}, r"trainer\.schedule\.warmup: a whole number is needed"),
        ("schedule", {"name": "constant", "warmup": -64}, r"trainer\.schedule gives -0\.5 of the"),
        ("schedule", {"name": "cosine", "floor": 3}, r"trainer\.schedule gives 2 of the"),
        ("loss", {"name": "eps", "min_snr": "five"}, r"trainer\.loss\.min_snr: a number or null is needed"),
        ("loss", {"name": "eps", "min_snr": 0}, "trainer.loss gives 0 for a wrong prediction"),
        ("optimizer", {"name": "adamw", "betas": [0.9]}, r"trainer\.optimizer\.betas: 2 values are needed"),
        ("optimizer", {"name": "adamw", "betas": 0.9}, r"trainer\.optimizer\.betas: a list is needed"),
        ("optimizer", {"name": "adamw", "eps": None}, r"trainer\.optimizer\.eps: a number is needed"),
        ("optimizer", {"name": "adamw", "eps": -1}, r"trainer\.optimizer: Invalid epsilon value"),
    ],
)
def test_parameters_of_what_is_named_are_checked_before_anything_slow(kind, chosen, told):
    with pytest.raises(BadSetting, match=told):
        TrainSettings.read({**GOOD, kind: chosen}).check()


def test_what_does_not_go_together_is_told_before_anything_slow():
    with pytest.raises(BadSetting, match="zero_terminal_snr=true needs a v-prediction loss"):
        TrainSettings.read({**GOOD, "zero_terminal_snr": True}).check()
    TrainSettings.read({**GOOD, "zero_terminal_snr": True, "loss": {"name": "v"}}).check()
