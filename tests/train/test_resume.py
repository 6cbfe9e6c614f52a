"""Exact resume, proven with real kills: one process and two, five random points each, EMA, dropout and shuffle on."""

import hashlib
import json
import random
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
import torch

from ambergrade.family import sdxl
from ambergrade.family.files import read_tensors, tensor_bytes, write_tensors
from ambergrade.nouns import CaptionSet
from ambergrade.train.latent_store import VERSION, LatentStore, key_of
from ambergrade.train.settings import TrainSettings
from ambergrade.train.verify import verify_gradients, verify_resume
from ambergrade.train.worker import TrainingJob, launch

STEPS, BATCH = 14, 4
SETTINGS = TrainSettings(
    images=STEPS * BATCH,
    batch=BATCH,
    micro=1,
    lr={"unet": 1e-3, "te1": 5e-4, "te2": 5e-4},
    schedule={"name": "cosine", "warmup": 8},
    loss={"name": "eps", "min_snr": 5},
    optimizer={"name": "adamw"},
    shuffle=True,
    caption_dropout=0.2,
    tag_dropout=0.2,
    group_dropout=0.1,
    ema=0.9,
    noise_offset=0.03,
    save_every=2 * BATCH,
)


@pytest.fixture
def job(tiny_config, beginning, captions: CaptionSet, latents, tmp_path) -> TrainingJob:
    sdxl.write_checkpoint(tmp_path / "begin.safetensors", beginning, {})
    captions.write(tmp_path / "captions.jsonl")
    vae = "0" * 64
    folder = tmp_path / "latents" / f"{vae[:16]}-fp16-{VERSION}"
    folder.mkdir(parents=True)
    held = {}
    for bucket, positions in latents.positions.items():
        for row, position in enumerate(positions.tolist()):
            held[key_of(captions.pictures[position])] = latents.rows(bucket, [row])[0].half()
    hashes = {key: hashlib.sha256(tensor_bytes(value)).hexdigest() for key, value in held.items()}
    write_tensors(folder / "shard.safetensors", held, hashes)
    stored = LatentStore(tmp_path / "latents", vae).open(captions)
    for bucket in latents.positions:
        torch.testing.assert_close(stored.rows(bucket, [1, 0]), latents.rows(bucket, [1, 0]), atol=2e-3, rtol=1e-3)
    return TrainingJob(
        checkpoint=str(tmp_path / "begin.safetensors"),
        family="sdxl_tiny",
        config=str(tiny_config),
        captions=str(tmp_path / "captions.jsonl"),
        latents=str(tmp_path / "latents"),
        vae=vae,
        settings=asdict(SETTINGS),
        out=str(tmp_path / "out"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_five_kills_at_random_points_cost_nothing(job, processes):
    points = sorted(random.Random(processes).sample(range(1, STEPS), 5))
    found = verify_resume(job, processes, [point * BATCH for point in points])
    assert len(found.kills) == 5
    assert found.holds, found


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(job):
    found = verify_gradients(job, 2)
    assert found.accumulation == 2
    assert found.difference.keys() == {"unet", "te1", "te2"}
    assert found.holds, found
    assert max(found.difference.values()) < 1e-9


@pytest.mark.slow
def test_two_processes_leave_one_lora_file_that_the_report_names(job):
    settings = {**job.settings, "images": 8, "lora": {"rank": 2, "alpha": 1}}
    assert launch(replace(job, settings=settings), 2) == 0
    out = Path(job.out)
    file = read_tensors(out / json.loads((out / "report.json").read_text())["lora"])
    assert any(name.endswith("lora_up.weight") and value.any() for name, value in file.items())
    assert {name.split("_")[1] for name in file} == {"unet", "te1", "te2"}


@pytest.mark.slow
def test_no_rank_is_left_when_the_command_is_killed(job):
    """Two ranks and torchrun between them: SIGKILL of the command gives it no chance to end them."""
    line = "import json, sys; from ambergrade.train.worker import TrainingJob, launch; "
    line += "launch(TrainingJob(**json.loads(sys.argv[1])), 2)"
    long = replace(job, settings={**job.settings, "images": 100_000, "save_every": 0})
    with subprocess.Popen([sys.executable, "-c", line, json.dumps(asdict(long))]) as command:
        log, deadline = Path(job.out) / "ranks.log", time.monotonic() + 300
        while not (log.exists() and "images, loss" in log.read_text()):
            assert command.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        started = psutil.Process(command.pid).children(recursive=True)
        assert len(started) >= 3
        command.kill()
    deadline = time.monotonic() + 60
    while left := [process for process in started if alive(process)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
