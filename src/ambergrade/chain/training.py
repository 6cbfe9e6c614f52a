"""Fine-tunes the base: encodes latents, trains, and writes one file in the base's precision."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ambergrade.chain.context import Context, Stage
from ambergrade.chain.latents import encode
from ambergrade.chain.point import open_checkpoint
from ambergrade.chain.settings import DataSettings, FamilySettings
from ambergrade.errors import BadSetting
from ambergrade.family.digests import model_digests
from ambergrade.family.files import write_tensors
from ambergrade.family.load import Family
from ambergrade.family.load import family as load_family
from ambergrade.generate import stream
from ambergrade.generate.contact_sheet import picture_grid
from ambergrade.identity import file_digest, random_seed
from ambergrade.merge.inputs import Digests, default_cache
from ambergrade.nouns import CaptionSet, Checkpoint, PromptSet, SamplerSettings
from ambergrade.store import Finished, Outputs, copy_file, find_file
from ambergrade.track.journal import Run
from ambergrade.train import lora
from ambergrade.train.latent_store import LatentStore
from ambergrade.train.settings import TrainSettings
from ambergrade.train.trainer import HALF, LogRow, fine_tune, unfinished_run
from ambergrade.train.validation import ValidationLoss
from ambergrade.train.verify import verify_gradients, verify_resume
from ambergrade.train.worker import TrainingJob, launch

if TYPE_CHECKING:
    from ambergrade.family.networks import Networks

TRAIN = Stage("train", 3)


@dataclass(frozen=True)
class Subject:
    """What a training works on: who is trained, on what, and how its progress is shown."""

    name: str
    """The name of what comes out."""
    base: Checkpoint
    base_name: str
    family: FamilySettings
    data: DataSettings
    captions: CaptionSet
    validation: CaptionSet
    trainer: TrainSettings
    sampler: SamplerSettings
    samples: PromptSet | None = None
    """Prompts that are drawn on the way."""
    processes: int = 1

    @property
    def config(self) -> Path:
        return find_file(self.family.config)

    @property
    def loaded(self) -> Family:
        """The family's own functions."""
        return load_family(self.family.name)


def train(context: Context, subject: Subject) -> Checkpoint:
    """Fine-tune the base, and file what comes out: the checkpoint, and an adapter's own file where one is trained."""
    subject.trainer.check()
    weights = subject.loaded.read_checkpoint(subject.base.path)
    latents = _latents(context, subject, weights)
    trainer, name = subject.trainer, subject.name

    def work(scratch: Path, run: Run) -> Outputs:
        if subject.processes > 1:
            tuned, losses, seen = _train_apart(context, subject, latents, scratch, run)
        else:
            tuned, losses, seen = _train_here(context, subject, latents, scratch, run)
        kept = {key: value.to(weights[key].dtype) if key in weights else value for key, value in tuned.items()}
        about = {"modelspec.title": name, "modelspec.architecture": subject.loaded.architecture}
        if trainer.loss["name"] == "v":
            about["modelspec.prediction_type"] = "v"
        write_tensors(scratch / f"{name}.safetensors", kept, about)
        files = {"checkpoint": scratch / f"{name}.safetensors"}
        if trainer.lora is not None:
            files["lora"] = scratch / lora.FILE
        return Outputs(files, {"validation": losses, "images": seen})

    def journal(run: Run, done: Finished) -> None:
        losses = done.values["validation"]
        run.metrics({f"val_loss_{when}": losses[when]["mean"] for when in ("before", "after")})
        made = subject.loaded.weights_digest(done.files["checkpoint"])
        run.model(name, done.files["checkpoint"], made, parents={subject.base_name: subject.base.digest})
        if trainer.lora is not None:
            file = _adapter_file(context, subject, done)
            digest = model_digests(file, Digests(default_cache())).weights
            parents = {subject.base_name: subject.base.digest}
            run.model(file.stem, file, digest, kind=trainer.lora.kind, parents=parents, registered_as=file.stem)

    inputs = {
        "base": subject.base.digest,
        "train": subject.captions.digest,
        "heldout": subject.validation.digest,
        "latents": latents.open(subject.captions).digest,
        "heldout latents": latents.open(subject.validation).digest,
    }
    task = TRAIN.task(trainer.what, inputs)
    begun = context.ledger.root / "work" / TRAIN.kind
    left = unfinished_run(trainer, lambda other: begun / TRAIN.task(other.what, inputs).identity[:16])
    if left and task.find(context.ledger) is None:
        print(left)
    params = {**flat(trainer.what), "base": subject.base_name, "pictures": len(subject.captions.pictures)}
    done = context.run(task, f"train {name}", work, journal=journal, params=params)
    losses = done.values["validation"]
    print(f"    validation loss {losses['before']['mean']:.4f} -> {losses['after']['mean']:.4f}")
    if trainer.lora is not None:
        print(f"    {trainer.lora.kind} file  {_adapter_file(context, subject, done)}")
    return open_checkpoint(done.files["checkpoint"], subject.base.family)


def _adapter_file(context: Context, subject: Subject, done: Finished) -> Path:
    """The adapter's own file, under a name that other tools take: mlruns/adapters/<run>/<name>-<kind>.safetensors."""
    assert subject.trainer.lora is not None
    name = f"{subject.name}-{subject.trainer.lora.kind}.safetensors"
    file = context.ledger.root / "adapters" / done.identity[:12] / name
    if not file.exists() or file_digest(file) != done.digests["lora"]:
        copy_file(done.files["lora"], file)
    return file


def _latents(context: Context, subject: Subject, weights: Mapping[str, torch.Tensor]) -> LatentStore:
    return encode(context, subject.data, subject.family, subject.base, weights, subject.captions, subject.validation)


def _tell(run: Run, row: LogRow) -> None:
    rates = {f"lr_{part}": rate for part, rate in row.lr.items()}
    speed = {"images_per_second": row.images_per_second} | ({"mfu": row.mfu} if row.mfu is not None else {})
    parts = {f"loss_{quarter}": loss for quarter, loss in row.by_timestep.items()}
    run.metrics({"loss": row.loss, "grad_norm": row.grad_norm, **parts, **rates, **speed}, step=row.seen)


def _check(run: Run, loss: ValidationLoss, seen: int) -> None:
    found = {f"val_loss_{timestep}": value for timestep, value in loss.by_timestep.items()}
    run.metrics({"val_loss": loss.mean, **found}, step=seen)


Trained = tuple[Mapping[str, torch.Tensor], Mapping[str, object], int]
"""Tensors by their single-file names, validation losses before and after, images seen."""


def _train_here(context: Context, subject: Subject, latents: LatentStore, scratch: Path, run: Run) -> Trained:
    """Train in this process."""
    trainer, prompts = subject.trainer, subject.samples
    # bf16 weights are never in memory as fp32; the VAE, which draws samples, always is
    half = dict.fromkeys(subject.loaded.trained, torch.bfloat16) if trainer.precision in HALF else None
    networks = subject.loaded.networks.load(subject.base.path, subject.config, dtype=half, device=context.device)

    def show(live: Networks, seen: int) -> None:
        assert prompts is not None
        drawn = [picture.pixels for picture in stream.pictures(live, prompts, subject.sampler, progress=None)]
        run.picture(f"samples/{subject.name}", picture_grid(drawn, 4), step=seen)

    report = fine_tune(
        networks,
        subject.captions,
        latents.open(subject.captions),
        trainer,
        scratch=scratch,
        on_log=lambda row: _tell(run, row),
        on_sample=show,
        on_validation=lambda loss, seen: _check(run, loss, seen),
        validation=(subject.validation, latents.open(subject.validation)),
    )
    assert report.before is not None
    assert report.after is not None
    losses = {"before": asdict(report.before), "after": asdict(report.after)}
    return networks.tensors(), losses, report.seen


def _train_apart(context: Context, subject: Subject, latents: LatentStore, scratch: Path, run: Run) -> Trained:
    """Train in several processes of this machine; what they logged is journaled at the end."""
    job = training_job(context, subject, latents, scratch)
    launch(job, subject.processes, cpu=context.device == "cpu")
    made = json.loads((scratch / "report.json").read_text())
    for row in made["rows"]:
        _tell(run, LogRow(**row))
    for seen, loss in made["between"].items():
        _check(run, ValidationLoss(**loss), int(seen))
    losses = {when: made[when] for when in ("before", "after")}
    return subject.loaded.read_checkpoint(scratch / "trained.safetensors"), losses, made["seen"]


def training_job(context: Context, subject: Subject, latents: LatentStore, folder: Path) -> TrainingJob:
    """The training as a file that ranks read, with the sets beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    sets = {"train": subject.captions, "heldout": subject.validation}
    for split, chosen in sets.items():
        chosen.write(folder / f"{split}.jsonl")
    lists = {split: str(folder / f"{split}.jsonl") for split in sets}
    return TrainingJob(
        checkpoint=str(subject.base.path),
        family=subject.family.name,
        config=str(subject.config),
        captions=lists["train"],
        latents=str(latents.folder.parent),
        vae=latents.vae,
        settings=asdict(subject.trainer),
        out=str(folder),
        validation=lists["heldout"],
        threads=context.compute.threads or 1,
    )


def prove(context: Context, subject: Subject, what: str, *, steps: int, kills: int) -> None:
    """Prove exact `resume`, or whole `gradients`, on this machine. Raises BadSetting where it fails."""
    trainer = subject.trainer
    trainer.check()
    trainer = replace(trainer, images=steps * trainer.batch, save_every=2 * trainer.batch)
    subject = replace(subject, trainer=trainer)
    latents = _latents(context, subject, subject.loaded.read_checkpoint(subject.base.path))
    with tempfile.TemporaryDirectory() as folder:
        job = replace(training_job(context, subject, latents, Path(folder)), validation=None)
        cpu = context.device == "cpu"
        if what == "resume":
            draw = np.random.default_rng(random_seed(trainer.seed, "kills"))
            points = draw.choice(np.arange(1, steps), kills, replace=False)
            found = verify_resume(job, subject.processes, sorted(int(p) * trainer.batch for p in points), cpu=cpu)
            killed = ", ".join(map(str, found.kills))
            print(f"  {trainer.images} images on {subject.processes} process(es), killed after {killed}")
            print(f"  left alone {found.whole}\n  resumed    {found.resumed}")
            holds = found.holds
        else:
            compared = verify_gradients(job, subject.processes, cpu=cpu)
            passes = f"{subject.processes} process(es) x {compared.accumulation} passes"
            print(f"  gradient of {passes} against one of all at once")
            for part, value in compared.difference.items():
                print(f"  {part:<5} {value:.1e}")
            holds = compared.holds
    if not holds:
        raise BadSetting(f"verify={what} does not hold on this machine: do not train on it.")
    print(f"verify={what} holds")


def flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested settings as dotted keys, for a run's parameters."""
    found: dict[str, object] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found
