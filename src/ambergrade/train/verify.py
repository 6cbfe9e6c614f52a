"""Proves on a user's own machines, before he pays for a run, that resume is exact and gradients are whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ambergrade.errors import BadSetting
from ambergrade.family.files import read_tensors
from ambergrade.identity import file_digest
from ambergrade.train.settings import TrainSettings
from ambergrade.train.worker import TrainingJob, launch

CLOSE = 1e-6
"""Largest relative difference of two gradients that counts as none."""


@dataclass(frozen=True)
class Resumed:
    """Compares a run killed and resumed with the same run left alone."""

    kills: tuple[int, ...]
    """Images seen at each SIGKILL."""
    whole: str
    """sha256 of the checkpoint of the run left alone."""
    resumed: str

    @property
    def holds(self) -> bool:
        return self.whole == self.resumed


def verify_resume(job: TrainingJob, processes: int, kills: Sequence[int], *, cpu: bool = True) -> Resumed:
    """Train the job's run twice, once killed with SIGKILL whenever `kills` images were seen, and compare the files.

    Each killed run goes on from the newest state it had written, which may lie well before the kill.
    """
    trainer = TrainSettings.read(job.settings)
    batch, images = trainer.batch, trainer.images
    if not kills or not all(batch <= kill < images for kill in kills):
        raise BadSetting(
            f"A run of {images} images can be killed from {batch} to {images - batch}; asked: {list(kills)}."
        )
    folder = Path(job.out)
    quiet = replace(job, settings={**job.settings, "log_every": batch, "sample_every": 0})
    launch(replace(quiet, out=str(folder / "whole")), processes, cpu=cpu)
    for kill in sorted(kills):
        status = launch(replace(quiet, out=str(folder / "killed"), kill_at=kill), processes, cpu=cpu)
        if not status:
            raise BadSetting(f"The run that was to be killed after {kill} images ended by itself.")
    launch(replace(quiet, out=str(folder / "killed")), processes, cpu=cpu)
    files = [folder / run / "trained.safetensors" for run in ("whole", "killed")]
    return Resumed(tuple(sorted(kills)), *map(file_digest, files))


@dataclass(frozen=True)
class Gradients:
    """Compares the gradient of many processes with that of one."""

    processes: int
    accumulation: int
    difference: Mapping[str, float]
    """‖g - g'‖ / ‖g‖ by part."""

    @property
    def holds(self) -> bool:
        return all(value <= CLOSE for value in self.difference.values())


def verify_gradients(job: TrainingJob, processes: int, *, cpu: bool = True) -> Gradients:
    """Compare one step's gradient by `processes` ranks with accumulation and by one rank with the whole batch at once.

    In double precision, so that sums in another order agree to 1e-12 and a missing reduction stands out.
    """
    trainer = TrainSettings.read(job.settings)
    folder, batch = Path(job.out), trainer.batch
    once = {**job.settings, "images": batch, "clip": 0.0, "ema": 0.0, "save_every": 0, "precision": "fp32"}
    once["in_backward"] = False  # it leaves no gradient to compare
    asked = trainer.micro
    micro = next((n for n in range(min(asked, batch // processes), 0, -1) if batch % (n * processes) == 0), None)
    if micro is None:
        raise BadSetting(f"batch {batch} cannot be shared by {processes} processes.")
    one = replace(job, settings={**once, "micro": batch}, out=str(folder / "one"), gradients=True)
    many = replace(job, settings={**once, "micro": micro}, out=str(folder / "many"), gradients=True)
    launch(one, 1, cpu=cpu)
    launch(many, processes, cpu=cpu)
    a, b = (read_tensors(folder / run / "gradients.safetensors") for run in ("one", "many"))
    if a.keys() != b.keys():
        raise BadSetting(f"Gradients of {len(a.keys() ^ b.keys())} tensors are there in one run only.")
    difference = {}
    for part in trainer.lr:
        names = [name for name in a if name.startswith(f"{part}.")]
        if names:
            apart = torch.stack([(a[name] - b[name]).square().sum() for name in names]).sum().sqrt()
            size = torch.stack([a[name].square().sum() for name in names]).sum().sqrt()
            difference[part] = float(apart / size)
    return Gradients(processes, batch // (micro * processes), difference)
