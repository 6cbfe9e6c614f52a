"""Exact resume, proven with real kills: one process and two, five random points each, EMA, dropout and shuffle on."""

import hashlib
import random
from dataclasses import asdict

import pytest
import torch

from ambergrade.family import sdxl
from ambergrade.family.files import tensor_bytes, write_tensors
from ambergrade.nouns import CaptionSet
from ambergrade.train.latent_store import VERSION, LatentStore, key_of
from ambergrade.train.settings import TrainSettings
from ambergrade.train.verify import verify_gradients, verify_resume
from ambergrade.train.worker import TrainingJob

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
