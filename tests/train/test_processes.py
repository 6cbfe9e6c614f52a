"""Two processes train as one does: the same images, gradients reduced over all three networks."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from ambergrade.family import sdxl
from ambergrade.family.files import read_tensors, write_tensors
from ambergrade.train.settings import TrainSettings

SETTINGS = TrainSettings(
    images=8,
    batch=4,
    micro=2,
    lr={"unet": 1e-3, "te1": 1e-3, "te2": 1e-3},
    schedule={"name": "constant"},
    loss={"name": "eps"},
    # Adam's first steps are the gradient's signs, which tell nothing of its size; a large eps keeps the size.
    optimizer={"name": "adamw", "eps": 1.0},
    save_every=4,
)

WORKER = """
import json, sys
from pathlib import Path
import torch
from ambergrade.family import sdxl
from ambergrade.nouns import CaptionSet
from ambergrade.train.latents import read_latents
from ambergrade.train.settings import TrainSettings
from ambergrade.train.trainer import fine_tune

torch.set_num_threads(1)
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
networks = sdxl.load(folder / "begin.safetensors", Path(sys.argv[3]))
report = fine_tune(
    networks,
    CaptionSet.read(folder / "captions.jsonl"),
    read_latents(folder / "latents.safetensors"),
    TrainSettings(**json.loads(sys.argv[4])),
    scratch=out,
)
if int(__import__("os").environ.get("RANK", 0)) == 0:
    sdxl.write_checkpoint(out / "end.safetensors", networks.tensors(), {"loss": repr(report.rows[-1].loss)})
"""


@pytest.mark.slow
def test_two_processes_equal_one(tiny_config, beginning, captions, latents, tmp_path):
    sdxl.write_checkpoint(tmp_path / "begin.safetensors", beginning, {})
    captions.write(tmp_path / "captions.jsonl")
    named = {}
    for (width, height), value in latents.by_bucket.items():
        named[f"{width}x{height}.latents"] = value
        named[f"{width}x{height}.positions"] = latents.positions[width, height]
    write_tensors(tmp_path / "latents.safetensors", named, {})
    (tmp_path / "worker.py").write_text(WORKER)

    ends = []
    for processes, micro in ((1, 4), (2, 1)):
        out = tmp_path / f"of {processes}"
        settings = json.dumps(asdict(replace(SETTINGS, micro=micro)))
        launch = (
            ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
        )
        subprocess.run(
            [sys.executable, *launch, tmp_path / "worker.py", tmp_path, out, tiny_config, settings],
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
            check=True,
            timeout=1500,
        )
        ends.append(read_tensors(out / "end.safetensors"))
    one, two = ends
    moved = {
        key: float((one[key] - begin).abs().max()) for key, begin in beginning.items() if begin.is_floating_point()
    }
    for part in ("model.diffusion_model.", "conditioner.embedders.0.", "conditioner.embedders.1."):
        assert max(value for key, value in moved.items() if key.startswith(part)) > 1e-7
        scale = max(value for key, value in moved.items() if key.startswith(part))
        for key, value in one.items():
            if key.startswith(part):
                torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-3 * scale)


RANK = "from ambergrade.train.worker import end_with_parent; end_with_parent(); print('up', flush=True)"


def test_a_rank_that_is_done_ends_well():
    with subprocess.Popen([sys.executable, "-c", RANK], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as rank:
        assert rank.wait(60) == 0


def test_a_rank_ends_when_the_process_that_started_it_is_gone():
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", f"{RANK}; import time; time.sleep(120)"], **pipes) as rank:
        assert rank.stdout.readline() == b"up\n"
        assert rank.poll() is None
        rank.stdin.close()
        assert rank.wait(20) == -signal.SIGKILL
