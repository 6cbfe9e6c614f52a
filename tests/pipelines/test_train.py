"""The training pipeline as a user runs it: help, plans and mistakes at once; proofs on the embedded world."""

import resource
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ambergrade.captions.recipe import CaptionRecipe
from ambergrade.captions.settings import Selection
from ambergrade.door.compose import compose, plain
from ambergrade.errors import BadSetting
from ambergrade.places import CONF
from ambergrade.train.plan import DEVICES, cache_gb, memory, plan, train_tflop
from ambergrade.train.settings import TrainSettings
from ambergrade.typed import settings as read_settings

REPOSITORY = Path(__file__).parents[2]
EXPERIMENTS = sorted(
    path.stem for path in (CONF / "experiment").glob("*.yaml") if "pipelines/train.py" in path.read_text()
)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "pipelines/train.py", *arguments]
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)


def composed(*overrides: str) -> dict:
    return plain(compose("train", overrides))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_accepted_and_planned(name: str) -> None:
    settings = composed(f"experiment={name}")
    trainer = TrainSettings.read(settings["trainer"])
    for processes in (1, 2, 4):
        assert trainer.accumulation(processes) * trainer.per_pass(processes) * processes == trainer.batch
    assert settings["base"] in settings["models"]
    read_settings(CaptionRecipe, settings["captions"])
    read_settings(Selection, {**settings["data"]["selection"], "split": "train"})
    assert "dollars" in plan(trainer, 2, "a100")


def test_the_tiny_base7_differs_from_the_card_s_only_in_family_data_and_size() -> None:
    tiny, card = (composed(f"experiment={name}") for name in ("base7_tiny", "base7"))
    assert tiny.keys() == card.keys()
    same = {key for key in tiny if tiny[key] == card[key]}
    assert {"captions", "base", "trained", "processes"} <= same
    size = {"images", "batch", "micro", "lr", "save_every", "log_every", "sample_every", "precision", "ema"}
    size |= {"schedule", "caption_dropout", "tag_dropout"}  # a short run on few pictures
    differ = {key for key in card["trainer"] if card["trainer"][key] != tiny["trainer"][key]}
    assert differ <= size
    assert tiny["trainer"].keys() == card["trainer"].keys()


@pytest.mark.parametrize("size", [24, 48, 80, 141])
def test_a_memory_preset_fits_its_card(size: int) -> None:
    trainer = TrainSettings.read(composed("experiment=base7", f"memory={size}gb")["trainer"])
    assert sum(part.gb for part in memory(trainer)) <= size
    assert trainer.batch == 128  # the card's: presets change where and how fast


def test_the_smallest_card_steps_within_the_backward_pass() -> None:
    trainer = TrainSettings.read(composed("experiment=base7", "memory=16gb")["trainer"])
    parts = {part.name: part.gb for part in memory(trainer)}
    assert sum(parts.values()) <= 16
    assert parts["trained weights"] == pytest.approx(6.77, abs=0.01)  # 2 bytes each of 3.385 billion
    assert parts["gradient, one tensor at a time"] == pytest.approx(2 * 49_408 * 1280 / 1e9)
    ordinary = memory(replace(trainer, in_backward=False))
    assert sum(part.gb for part in ordinary) - sum(parts.values()) == pytest.approx(6.64, abs=0.01)
    with pytest.raises(BadSetting, match=r"in_backward steps within one pass"):
        trainer.accumulation(2)


def test_floors_are_the_counted_ones() -> None:
    card = TrainSettings.read(composed("experiment=base7")["trainer"])
    assert train_tflop(card) == pytest.approx(20.62, abs=0.01)
    long = TrainSettings.read(composed("experiment=base7", "trainer.lr.te1=2e-6", "+trainer.tokens=225")["trainer"])
    assert train_tflop(long) == pytest.approx(21.78, abs=0.01)
    assert cache_gb(1, resolution=1024) / 0.962 == pytest.approx(131_072 / 1e9, rel=1e-6)
    states = [part.gb for part in memory(card)[:3]]
    assert sum(states) == pytest.approx(54.2, abs=0.1)  # 16 bytes each of 3.385 billion


def test_the_card_s_line_and_budget_come_out_of_one_command() -> None:
    start = time.monotonic()
    done = command("experiment=base7", "plan=true", "processes=2", "gpu=a100")
    assert time.monotonic() - start < 12  # under 3 s on a quiet machine
    assert "128 = 4 x 16 x 2" in done.stdout
    assert "one epoch of 3M to 6M images" in done.stdout
    assert "378.3 GB of latents" in done.stdout
    assert all(device.name in done.stdout for device in DEVICES.values())
    row = next(line for line in done.stdout.splitlines() if "H100" in line and " USD" in line)
    low, high = (int(word) for word in row.replace(",", "").split("USD")[0].split()[-3::2])
    assert low < 2000 < high < 10_000  # the card's range lies across ours


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["experiment=base7_tniy"], "base7_tiny"),
        (["trainer.micro=5"], "set trainer.micro to one of 1, 2, 4"),
        (["processes=3"], "set trainer.batch to a multiple of 3, such as 30 or 33"),
        (["trainer.images=33"], "the nearest is 32"),
        (["base=beta8"], "beta7"),
        (["verify=resum"], "resume"),
        (["trainer.images=32", "memory=16gb", "processes=2"], "in_backward steps within one pass"),
        (["experiment=base7", "plan=true", "gpu=h10"], "h100"),
        (["plan=true"], "SDXL"),
        (["experiment=base7"], "checkpoints/kohaku-xl-beta7.safetensors"),
        (["trainer.precision=half"], "Known: bf16, bf16-plain, bf16-sr, fp32"),
        (["trainer.clip=x", "trainer.ema=null"], "trainer.clip=x: a number is needed"),
        (["trainer.ema=null"], "trainer.ema: a number is needed, found None"),
        (["trainer.seed=1.5"], "trainer.seed: a whole number is needed, found 1.5"),
        (['trainer.shuffle="false"'], "true or false is needed"),
    ],
)
def test_a_mistake_is_told_in_a_few_lines_and_without_torch(arguments: list[str], told: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU seconds, which a busy machine stretches less than the clock; torch alone would take most of that
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 6
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 10


def test_no_torch_is_loaded_for_a_plan() -> None:
    script = "import sys, ambergrade.chain.plan, ambergrade.door.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_a_plan_refuses_what_cannot_run() -> None:
    card = TrainSettings.read(composed("experiment=base7")["trainer"])
    with pytest.raises(BadSetting, match="multiple of 3"):
        plan(card, 3, "h100")
    with pytest.raises(BadSetting, match="at least one"):
        plan(card, 0, "h100")


TINY = ["data.draw.count=80", "data.draw.prompts=4", "data.draw.references=8", "trainer.batch=8", "trainer.micro=4"]


@pytest.mark.slow
@pytest.mark.parametrize("proof", ["resume", "gradients"])
def test_both_proofs_hold_on_the_embedded_world(proof: str, tmp_path: Path) -> None:
    done = command(
        "experiment=base7_tiny", f"verify={proof}", f"root={tmp_path}", "processes=2", *TINY, "trainer.images=80"
    )
    assert done.returncode == 0, done.stderr
    assert f"verify={proof} holds" in done.stdout


@pytest.mark.slow
def test_stored_latents_are_proven_and_damage_is_told(tmp_path: Path) -> None:
    run = ["experiment=base7_tiny", f"root={tmp_path}", *TINY, "trainer.images=16", "trainer.log_every=8"]
    run += ["+trainer.validate_every=8", "processes=2"]
    none_yet = command(*run, "verify=latents")
    assert none_yet.returncode == 0, none_yet.stderr
    assert "without a latent yet; 0 encoded again" in none_yet.stdout
    done = command(*run)
    assert done.returncode == 0, done.stderr
    with sqlite3.connect(tmp_path / "mlruns" / "mlflow.db") as journal:  # which two ranks wrote through their parent
        rows = set(journal.execute("SELECT DISTINCT key, step FROM metrics"))
    journal.close()
    assert {("loss", 8), ("loss", 16), ("val_loss", 8), ("val_loss_100", 8), ("val_loss_900", 8)} <= rows
    assert ("val_loss", 16) not in rows  # that is the loss after
    whole = command(*run, "verify=latents", "compared=3")
    assert whole.returncode == 0, whole.stderr
    assert "3 encoded again" in whole.stdout
    assert "without a latent" not in whole.stdout
    shard = next((tmp_path / "mlruns" / "latents").glob("*/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    damaged = command(*run, "verify=latents")
    assert damaged.returncode == 1
    assert shard.name in damaged.stderr
    assert "Traceback" not in damaged.stderr
