"""The stages that pipelines are made of: each runs once per identity, is journaled, and says what it did.

Only here do rooms meet: a stage hands one room's output to the next, and decides nothing else.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from common import cut as cut
from common import draw_world as draw_world
from common import label_of as label_of
from PIL import Image

from ambergrade import config
from ambergrade.errors import BadSetting
from ambergrade.family import sdxl
from ambergrade.family.files import read_tensors
from ambergrade.generate import stream
from ambergrade.generate.contact_sheet import picture_grid, write_png
from ambergrade.generate.texts import TextEncoder
from ambergrade.identity import digest, file_digest, random_seed
from ambergrade.merge.engine import merge
from ambergrade.merge.formula import Formula
from ambergrade.merge.job import Job as MergeJob
from ambergrade.merge.job import open_job
from ambergrade.merge.passes import placed
from ambergrade.merge.recipe import Recipe
from ambergrade.merge.resident import ResidentMerge
from ambergrade.nouns import CaptionSet, Checkpoint, Picture, PromptSet, SamplerSettings
from ambergrade.score.comparison import aggregates, remarks
from ambergrade.score.scoring import load_metric, score
from ambergrade.score.sheet import ScoreSheet
from ambergrade.search.load import search
from ambergrade.store import Finished, Ledger, Outputs, find_file, link_or_copy
from ambergrade.track.journal import Journal, Run

if TYPE_CHECKING:  # what training needs takes seconds to import; a sweep needs none of it
    from ambergrade.train.latent_store import LatentStore
    from ambergrade.train.settings import TrainSettings
    from ambergrade.train.trainer import LogRow
    from ambergrade.train.validation import ValidationLoss
    from ambergrade.train.worker import Job

Point = Mapping[str, float]


@dataclass
class Chain:
    """What every stage of one pipeline shares."""

    settings: dict[str, Any]
    journal: Journal
    parent: Run
    networks: sdxl.Networks | None = None
    """The one set of live networks that pictures are drawn with; a merge changes its weights in place."""
    texts: tuple[Any, TextEncoder] | None = None
    """What the text encoders were made of when prompts were last encoded, and the encoded prompts."""

    started: float = field(default_factory=time.time)

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(Path(self.settings["root"]) / "mlruns")

    @cached_property
    def family_config(self) -> Path:
        return find_file(self.settings["family"]["config"])

    @cached_property
    def sampler(self) -> SamplerSettings:
        return config.settings(SamplerSettings, self.settings["sampler"], where="sampler")

    @cached_property
    def metrics(self) -> list[Any]:
        """The suite's scorers, loaded when the first picture needs them and then kept."""
        return [load_metric(**chosen, device=self.device) for chosen in self.settings["suite"]["metrics"].values()]

    @cached_property
    def device(self) -> str:
        chosen: str = self.settings["compute"]["device"]
        return ("cuda" if torch.cuda.is_available() else "cpu") if chosen == "auto" else chosen

    @cached_property
    def scorers(self) -> str:
        """Digest of the suite: what every scorer says it is made of."""
        return digest({metric.name: metric.fingerprint for metric in self.metrics})

    def stage(
        self,
        title: str,
        kind: str,
        version: int,
        settings: Any,
        inputs: Mapping[str, str],
        work: Callable[[Path, Run], Outputs],
        journal: Callable[[Run, Finished], None] = lambda run, done: None,
        params: Mapping[str, Any] | None = None,
        told: str = "",
        journaled_as: str = "",
    ) -> Finished:
        """Run a stage unless its record is there; journal it either way, and print a line (`told`, else the title).

        `journaled_as`: the kind of its run, where that is not the stage's.
        """
        identity = Ledger.identity(kind, version, settings, inputs)
        shown = journaled_as or kind
        with self.journal.run(title, key=identity, kind=shown, parent=self.parent, params=params) as run:
            done = self.ledger.once(kind, version, settings, inputs, lambda scratch: work(scratch, run))
            new = done.fresh or self.ledger.finished_since(kind, identity, self.started)  # by the second process
            if not run.done:
                if not new:
                    run.hit()
                run.datasets(inputs)
                journal(run, done)
        how = f"{done.seconds:8.1f} s" if new else "  finished before"
        print(f"  {told or title:<34}{how:<18}{done.identity[:12]}", flush=True)
        return done


def dataset(chain: Chain) -> tuple[CaptionSet, CaptionSet]:
    """Captions to train on, and held out (preparing.py)."""
    from preparing import dataset as prepared

    return prepared(chain)


def train(chain: Chain, base: Checkpoint, captions: CaptionSet, validation: CaptionSet) -> Checkpoint:
    """Fine-tune the base: cache latents, train, write the single file in the base's precision."""
    from preparing import encode

    from ambergrade.train.settings import TrainSettings
    from ambergrade.train.trainer import HALF, TRAINED, LogRow, fine_tune
    from ambergrade.train.validation import ValidationLoss
    from ambergrade.train.worker import launch

    name = chain.settings["trained"]
    trainer = TrainSettings.read(chain.settings["trainer"])
    prompts = read_prompts(chain, "sweep").first(8) if trainer.sample_every else None  # told before hours of encoding
    weights = sdxl.read_checkpoint(base.path)
    latents = encode(chain, base, weights, captions, validation)
    processes = int(chain.settings.get("processes", 1))

    def fit(scratch: Path, run: Run) -> Outputs:
        def tell(row: LogRow) -> None:
            rates = {f"lr_{part}": rate for part, rate in row.lr.items()}
            speed = {"images_per_second": row.images_per_second} | ({"mfu": row.mfu} if row.mfu is not None else {})
            parts = {f"loss_{quarter}": loss for quarter, loss in row.by_timestep.items()}
            run.metrics({"loss": row.loss, "grad_norm": row.grad_norm, **parts, **rates, **speed}, step=row.seen)

        def check(loss: ValidationLoss, seen: int) -> None:
            found = {f"val_loss_{timestep}": value for timestep, value in loss.by_timestep.items()}
            run.metrics({"val_loss": loss.mean, **found}, step=seen)

        if processes > 1:
            job = training_job(chain, base, captions, validation, latents, trainer, scratch)
            launch(job, processes, cpu=chain.device == "cpu")
            made = json.loads((scratch / "report.json").read_text())
            for row in made["rows"]:
                tell(LogRow(**row))
            for seen, loss in made["between"].items():
                check(ValidationLoss(**loss), int(seen))
            tuned, losses = sdxl.read_checkpoint(scratch / "trained.safetensors"), made
            return written(scratch, tuned, losses, made["seen"])
        # bf16 weights are never in memory as fp32; the VAE, which draws samples, always is
        half = dict.fromkeys(TRAINED, torch.bfloat16) if trainer.precision in HALF else None
        networks = sdxl.load(base.path, chain.family_config, dtype=half, device=chain.device)

        def show(live: sdxl.Networks, seen: int) -> None:
            assert prompts is not None
            drawn = [picture.pixels for picture in stream.pictures(live, prompts, chain.sampler, progress=None)]
            run.picture(f"samples/{name}", picture_grid(drawn, 4), step=seen)

        report = fine_tune(
            networks,
            captions,
            latents.open(captions),
            trainer,
            scratch=scratch,
            on_log=tell,
            on_sample=show,
            on_validation=check,
            validation=(validation, latents.open(validation)),
        )
        assert report.before is not None
        assert report.after is not None
        losses = {"before": asdict(report.before), "after": asdict(report.after)}
        return written(scratch, sdxl.tensors(networks), losses, report.seen)

    def written(scratch: Path, tuned: Mapping[str, torch.Tensor], losses: Mapping[str, Any], seen: int) -> Outputs:
        kept = {key: value.to(weights[key].dtype) if key in weights else value for key, value in tuned.items()}
        about = {"modelspec.title": name, "modelspec.architecture": "stable-diffusion-xl-v1-base"}
        if trainer.loss["name"] == "v":
            about["modelspec.prediction_type"] = "v"
        sdxl.write_checkpoint(scratch / f"{name}.safetensors", kept, about)
        both = {when: losses[when] for when in ("before", "after")}
        return Outputs({"checkpoint": scratch / f"{name}.safetensors"}, {"validation": both, "images": seen})

    def journal(run: Run, done: Finished) -> None:
        losses = done.values["validation"]
        run.metrics({f"val_loss_{when}": losses[when]["mean"] for when in ("before", "after")})
        made = sdxl.weights_digest(sdxl.read_checkpoint(done.files["checkpoint"]))
        run.model(name, done.files["checkpoint"], made, parents={chain.settings["base"]: base.digest})

    about = trainer.what
    inputs = {"base": base.digest, "train": captions.digest, "heldout": validation.digest, "latents": latents.vae}
    params = {**_flat(about), "base": chain.settings["base"], "pictures": len(captions.pictures)}
    done = chain.stage(f"train {name}", "train", 2, about, inputs, fit, journal, params)
    losses = done.values["validation"]
    print(f"    validation loss {losses['before']['mean']:.4f} -> {losses['after']['mean']:.4f}")
    return open_checkpoint(done.files["checkpoint"], base.family)


def training_job(
    chain: Chain,
    base: Checkpoint,
    captions: CaptionSet,
    validation: CaptionSet,
    latents: LatentStore,
    trainer: TrainSettings,
    folder: Path,
) -> Job:
    """The training as a file that ranks read, with the sets beside it."""
    from ambergrade.train.worker import Job

    folder.mkdir(parents=True, exist_ok=True)
    sets = {"train": captions, "heldout": validation}
    for split, chosen in sets.items():
        chosen.write(folder / f"{split}.jsonl")
    lists = {split: str(folder / f"{split}.jsonl") for split in sets}
    return Job(
        checkpoint=str(base.path),
        config=str(chain.family_config),
        captions=lists["train"],
        latents=str(latents.folder.parent),
        vae=latents.vae,
        settings=asdict(trainer),
        out=str(folder),
        validation=lists["heldout"],
        threads=chain.settings["compute"]["threads"] or 1,
    )


def prove(chain: Chain, base: Checkpoint, captions: CaptionSet, validation: CaptionSet) -> None:
    """Exact resume, or whole gradients, on this machine with these settings. Raises BadSetting where it fails."""
    from preparing import encode

    from ambergrade.train.settings import TrainSettings
    from ambergrade.train.verify import verify_gradients, verify_resume

    settings, processes = chain.settings, chain.settings["processes"]
    trainer = TrainSettings.read(settings["trainer"])
    images = settings["steps"] * trainer.batch
    trainer = replace(trainer, images=images, save_every=2 * trainer.batch)
    latents = encode(chain, base, sdxl.read_checkpoint(base.path), captions, validation)
    with tempfile.TemporaryDirectory() as folder:
        job = training_job(chain, base, captions, validation, latents, trainer, Path(folder))
        job = replace(job, validation=None)
        cpu = chain.device == "cpu"
        if settings["verify"] == "resume":
            draw = np.random.default_rng(random_seed(trainer.seed, "kills"))
            points = draw.choice(np.arange(1, settings["steps"]), settings["kills"], replace=False)
            found = verify_resume(job, processes, sorted(int(p) * trainer.batch for p in points), cpu=cpu)
            print(f"  {images} images on {processes} process(es), killed after {', '.join(map(str, found.kills))}")
            print(f"  left alone {found.whole}\n  resumed    {found.resumed}")
            holds = found.holds
        else:
            compared = verify_gradients(job, processes, cpu=cpu)
            print(f"  gradient of {processes} process(es) x {compared.accumulation} passes against one of all at once")
            for part, value in compared.difference.items():
                print(f"  {part:<5} {value:.1e}")
            holds = compared.holds
    if not holds:
        raise BadSetting(f"verify={settings['verify']} does not hold on this machine: do not train on it.")
    print(f"verify={settings['verify']} holds")


class Merger:
    """The formula over its models: read once, then merged live at any point."""

    def __init__(self, chain: Chain, models: Mapping[str, Checkpoint], formula: str = "") -> None:
        self.chain = chain
        self.formula = Formula.parse(formula or chain.settings["merge"]["formula"], models)
        self.loras = {alias: find_file(path) for alias, path in self.formula.lora_paths.items()}
        self.inputs = {alias: models[alias].digest for alias in self.formula.models}
        self.inputs |= {alias: file_digest(path) for alias, path in self.loras.items()}
        self._models = models

    def handed_to(self, chain: Chain) -> Merger:
        """The same merge for a chain with other settings around it; what lies in memory goes along."""
        chain.networks, chain.texts, self.chain = self.chain.networks, self.chain.texts, chain
        return self

    @cached_property
    def resident(self) -> ResidentMerge:
        inputs = {alias: sdxl.read_checkpoint(self._models[alias].path) for alias in self.formula.models}
        inputs |= {alias: read_tensors(path) for alias, path in self.loras.items()}
        chosen = self.chain.settings["merge"]
        inputs = placed(inputs, self.chain.device)
        return ResidentMerge(self.formula, inputs, dtype=chosen["dtype"], policies=chosen["policies"])

    def recipe(self, point: Point) -> Recipe:
        chosen = self.chain.settings["merge"]
        return Recipe(self.formula, point, self.inputs, chosen["dtype"], chosen["policies"])

    def job(self, point: Point) -> MergeJob:
        chosen = self.chain.settings["merge"]
        paths = {alias: self._models[alias].path for alias in self.formula.models} | self.loras
        return open_job(self.formula, paths, coefficients=point, dtype=chosen["dtype"], policies=chosen["policies"])

    def live(self, point: Point) -> sdxl.Networks:
        """The networks with this point's weights in them; no file is written."""
        if self.chain.networks is None:
            first = self._models[self.formula.models[0]]
            self.chain.networks = sdxl.load(first.path, self.chain.family_config, device=self.chain.device)
        self.resident.assign(self.chain.networks.modules(), point)
        return self.chain.networks

    def texts(self, point: Point, prompts: PromptSet) -> TextEncoder:
        """The point's text encoders, after `live`: what they made of these prompts before, while they were the same.

        Keyed by the prompts and the batch too: in another batch a text's last bits may differ, and with them a picture.
        """
        chain, chosen = self.chain, self.chain.settings["merge"]
        encoders = self.resident.made_of(point, "te1", "te2")
        key = (self.inputs, chosen["dtype"], encoders, prompts.digest, chain.sampler.batch)
        if chain.texts is None or chain.texts[0] != key:
            assert chain.networks is not None
            chain.texts = (key, TextEncoder(chain.networks))
        return chain.texts[1]


def evaluate(
    chain: Chain,
    merger: Merger,
    point: Point,
    prompts: PromptSet,
    title: str,
    told: str = "",
    *,
    pictured: bool = True,
) -> Finished:
    """Pictures of one point on a prompt set, and their score sheet. `pictured=False`: the caller's run shows them."""

    def work(scratch: Path, run: Run) -> Outputs:
        shown: list[Picture] = []

        def kept(pictures: Any) -> Any:
            for picture in pictures:
                shown.append(picture)
                yield picture

        networks = merger.live(point)
        texts = merger.texts(point, prompts)
        drawn = stream.pictures(networks, prompts, chain.sampler, progress=None, texts=texts)
        sheet = score(kept(drawn), _among(chain, prompts), chain.metrics, sampler=chain.sampler, progress=title)
        sheet.write(scratch / "scores.parquet")
        strip = np.concatenate([picture.pixels for picture in shown[: chain.settings["sheet"]]], axis=1)
        write_png(scratch / "pictures.png", strip)
        found = {name: asdict(value) for name, value in aggregates(sheet).items()}
        return Outputs(
            {"scores": scratch / "scores.parquet", "pictures": scratch / "pictures.png"},
            {"aggregates": found, "remarks": remarks(sheet)},
        )

    def journal(run: Run, done: Finished) -> None:
        run.metrics(aggregates(ScoreSheet.read(done.files["scores"])))
        if not pictured:
            return
        for prompt, pixels in zip(prompts.prompts, cut(done.files["pictures"], chain.sampler.width), strict=False):
            run.picture(f"{prompts.name}/{prompt.id}", Image.fromarray(pixels))

    kind, about, inputs = filed_under(chain, merger, point, prompts)
    shown = "" if pictured else "scoring"  # the caller's run is the point
    return chain.stage(title, kind, 1, about, inputs, work, journal, dict(point), told, shown)


def filed_under(
    chain: Chain, merger: Merger, point: Point, prompts: PromptSet
) -> tuple[str, dict[str, Any], dict[str, str]]:
    """Stage, settings and inputs of a point's scores: its identity in the ledger."""
    about = {"recipe": merger.recipe(point).document, "sampler": asdict(chain.sampler)}
    inputs = {"prompts": prompts.digest, "scorers": chain.scorers}
    if prompts.name == "rung":
        inputs["among"] = _among(chain, prompts).digest
    return {"sweep": "point", "rung": "rung"}.get(prompts.name, "evaluation"), about, inputs


def _among(chain: Chain, prompts: PromptSet) -> PromptSet:
    """The prompts that a score is to be seen among: a rung's sheet must know every tag that the others ask for."""
    return read_prompts(chain, "sweep") if prompts.name == "rung" else prompts


def sweep(
    chain: Chain, merger: Merger, models: Mapping[str, Checkpoint], prompts: PromptSet
) -> dict[tuple[float, ...], ScoreSheet]:
    """Score every point that the search proposes; the sheets by point.

    With `compute.workers` above 1 a second process works through the points from the other end. It writes records
    only; this one meets them as finished. A point's bits do not depend on who drew it.
    """
    chosen = search(**chain.settings["search"])
    sheets: dict[tuple[float, ...], ScoreSheet] = {}
    if chain.settings["compute"]["workers"] > 1 and _waiting(chain, merger, prompts) > 1:
        shared = (chain.settings, dict(models), prompts, os.getpid())
        spawn = multiprocessing.get_context("spawn")
        spawn.Process(target=_sweep_backwards, args=shared, daemon=True).start()
    while point := chosen.ask():
        label, place = label_of(point), f"point {len(sheets) + 1:2}/{len(chosen)}"
        done = evaluate(chain, merger, point, prompts, label, f"{place}: {label}")
        sheet = ScoreSheet.read(done.files["scores"])
        chosen.tell(point, done.values["aggregates"][chosen.objective]["value"])
        sheets[tuple(point.values())] = sheet
    return sheets


def _waiting(chain: Chain, merger: Merger, prompts: PromptSet) -> int:
    """Points without a record: a second process costs ten seconds of imports, and a finished sweep needs none."""
    filed = (filed_under(chain, merger, point, prompts) for point in iter(search(**chain.settings["search"]).ask, None))
    return sum(chain.ledger.find(kind, Ledger.identity(kind, 1, *about)) is None for kind, *about in filed)


def _sweep_backwards(settings: dict[str, Any], models: dict[str, Checkpoint], prompts: PromptSet, parent: int) -> None:
    """The second process of a sweep: silent, not journaled, gone when its parent is."""
    for stream_number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream_number)
    use_threads(settings["compute"])
    journal = Journal(None, "", "", Path(settings["root"]))
    chain = Chain(settings, journal, Run(journal, "", "", "", done=False, resumed=False))
    merger = Merger(chain, models)
    for point in reversed(list(iter(search(**settings["search"]).ask, None))):
        if os.getppid() != parent:
            return
        evaluate(chain, merger, point, prompts, label_of(point))


def write_merge(chain: Chain, merger: Merger, point: Point, folder: Path) -> tuple[Checkpoint, Finished]:
    """The checkpoint of one point, written once."""
    recipe = merger.recipe(point)

    def work(scratch: Path, run: Run) -> Outputs:
        # From the files, so that the header names them by sha256 and `verify` rebuilds it; the bits are the live ones.
        merge(merger.job(point), scratch / "merged.safetensors", threads=chain.settings["compute"]["threads"] or None)
        return Outputs({"checkpoint": scratch / "merged.safetensors"})

    done = chain.stage("merge the winner", "merge", 2, recipe.document, merger.inputs, work, params=dict(point))
    file = folder / "merged.safetensors"
    link_or_copy(done.files["checkpoint"], file)
    return open_checkpoint(file, chain.settings["family"]["name"]), done


def read_prompts(chain: Chain, which: str) -> PromptSet:
    chosen = chain.settings["prompts"]
    return PromptSet.read(find_file(chosen[which]), which).first(chosen[f"{which}_count"])


def open_checkpoint(path: Path, family: str) -> Checkpoint:
    return Checkpoint(path, family, sdxl.weights_digest(sdxl.read_checkpoint(path)))


def use_threads(compute: Mapping[str, Any]) -> None:
    if compute["threads"]:
        torch.set_num_threads(compute["threads"])


def parameters(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What the chain's row shows in MLflow; the whole configuration is an artifact."""
    chosen = {key: settings[key] for key in ("base", "trained")}
    chosen |= {"formula": settings["merge"]["formula"], "objective": settings["search"]["objective"]}
    chosen |= {"captions": settings["captions"]["name"], "family": settings["family"]["name"]}
    return {**chosen, **_flat(settings["sampler"], "sampler.")}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
