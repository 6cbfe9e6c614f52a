"""Rebuilds the embedded world's models: draws pictures, trains, writes src/ambergrade/world/weights anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ambergrade.captions.recipe import CaptionRecipe
from ambergrade.chain.context import torch_device
from ambergrade.chain.settings import Compute
from ambergrade.nouns import SamplerSettings
from ambergrade.store import link_or_copy
from ambergrade.train.settings import TrainSettings

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

    from ambergrade.family.networks import Networks as Live
    from ambergrade.family.sdxl import Networks
    from ambergrade.nouns import CaptionSet
    from ambergrade.train.trainer import LogRow
    from ambergrade.world.corpus import Pixels
    from ambergrade.world.grammar import Scene

SIDES = (128, 32, 96, 160)
"""Area's root, step, shortest and longest side of the buckets, as conf/family/sdxl_tiny.yaml has them."""


@dataclass(frozen=True)
class Corpus:
    """Drawn pictures of 128 px with their scenes; the last `heldout` are trained on by nobody."""

    seed: int
    pictures: int
    heldout: int
    undamaged: float = 0.25
    """Share of them without blur, noise and mosaic."""


@dataclass(frozen=True)
class VaeSettings:
    corpus: Corpus
    steps: int
    decoder_steps: int
    decoder_rate: float
    seed: int = 0


@dataclass(frozen=True)
class ScorerSettings:
    """Declares the settings of the tagger, the features and the CLIP model."""

    steps: int
    seed: int
    channels: tuple[int, ...] = ()
    soft: int = 0
    """So many pictures are seen a second time, as the autoencoder gives them back."""


@dataclass(frozen=True)
class ModelSettings:
    """A checkpoint: the booru it is trained on, and how."""

    seed: int
    posts: int
    images: int
    guess: Mapping[str, float] = field(default_factory=dict)
    """Tag to the share of posts whose uploader guesses it."""
    text_steps: int = 0


@dataclass(frozen=True)
class Finetune:
    """What anxl2 and anxl3 are trained with, instead of the pretraining's settings."""

    lr: Mapping[str, float]
    schedule: Mapping[str, float | str]
    betas: tuple[float, float]
    ema: float


@dataclass(frozen=True)
class BooruSettings:
    folder: Path
    seed: int
    posts: int


@dataclass(frozen=True)
class WorldSettings:
    """conf/world.yaml."""

    root: Path
    build: Literal["booru", "vae", "family", "tagger", "features", "clip", "beta7", "anxl", "card"]
    out: Path
    work: Path
    workers: int
    corpus: Corpus
    undamaged: float
    vae: VaeSettings
    tagger: ScorerSettings
    features: ScorerSettings
    clip: ScorerSettings
    beta7: ModelSettings
    anxl2: ModelSettings
    anxl3: ModelSettings
    finetune: Finetune
    booru: BooruSettings
    trainer: TrainSettings
    captions: CaptionRecipe
    sampler: SamplerSettings
    compute: Compute
    debug: bool = False

    @property
    def config(self) -> Path:
        """The family's folder of configs and tokenizers."""
        return self.out / "sdxl_tiny"

    def weights(self, name: str) -> Path:
        return self.out / f"{name}.safetensors"


def run(settings: WorldSettings) -> None:
    """Build what `settings.build` names."""
    import torch

    torch.set_num_threads(settings.compute.threads or torch.get_num_threads())
    BUILDS[settings.build](settings)


def build_booru(settings: WorldSettings) -> None:
    """A mini-booru in a folder, to look at."""
    from ambergrade.world.booru import write_booru

    booru = settings.booru
    write_booru(booru.folder, seed=booru.seed, count=booru.posts, workers=settings.workers)
    print(f"{booru.posts} posts in {booru.folder}")


def build_vae(settings: WorldSettings) -> None:
    """The autoencoder: all of it first, then its decoder alone (which leaves latents as they are)."""
    from ambergrade.world import autoencoder

    chosen, folder = settings.vae, settings.work / "vae"
    _, pictures = _drawn(settings, chosen.corpus)
    held_out, pictures = pictures[-chosen.corpus.heldout :], pictures[: -chosen.corpus.heldout]

    def tell(step: int, vae: AutoencoderKL, parts: Mapping[str, float]) -> None:
        told = ", ".join(f"{name} {value:.4f}" for name, value in parts.items())
        print(f"step {step}: {told}; held out {_fidelity(vae, held_out[:32])}", flush=True)

    folder.mkdir(parents=True, exist_ok=True)
    device = torch_device(settings.compute)
    vae = autoencoder.train(
        pictures, state=folder / "whole.pt", steps=chosen.steps, seed=chosen.seed, device=device, on_log=tell
    )
    autoencoder.fit_scale(vae, pictures)
    vae.save_pretrained(folder)  # latents are settled: what trains on them may begin
    print(f"encoder done: {_fidelity(vae, held_out)}", flush=True)
    vae = autoencoder.train(
        pictures,
        state=folder / "decoder.pt",
        steps=chosen.decoder_steps,
        rate=chosen.decoder_rate,
        seed=chosen.seed + 1,
        hint_weight=0.0,
        start=vae,
        decoder_only=True,
        device=device,
        on_log=tell,
    )
    vae.save_pretrained(folder)
    print(f"decoder done: {_fidelity(vae, held_out)}")


def build_family(settings: WorldSettings) -> None:
    """Config folder and tokenizer."""
    from ambergrade.world.family import write_config

    write_config(settings.config, _vae(settings).config.scaling_factor)


def build_tagger(settings: WorldSettings) -> None:
    """The tagger, in the layout of WD v3; it also sees what the autoencoder gives back, as generated pictures are."""
    import numpy as np
    import torch

    from ambergrade.world import autoencoder, scorers

    scenes, pictures = _drawn(settings, settings.corpus)
    chosen, held = settings.tagger, settings.corpus.heldout
    truth = np.stack([scorers.labels(scene) for scene in scenes])
    torch.manual_seed(chosen.seed)
    model = scorers.backbone(chosen.channels, len(scorers.LABELS))
    soft = autoencoder.round_trip(_vae(settings), pictures[: chosen.soft])
    seen, known = np.concatenate([pictures[:-held], soft]), np.concatenate([truth[:-held], truth[: chosen.soft]])
    scorers.fit(model, seen, known, steps=chosen.steps, seed=chosen.seed, bgr=True, name="tagger")
    folder = settings.out / "tagger"
    scorers.write_timm(folder, model, chosen.channels, len(scorers.LABELS))
    found = scorers.outputs(model, pictures[-held:], bgr=True)
    thresholds = scorers.balanced_thresholds(truth[-held:], found)
    scorers.write_tags(folder, scorers.counts(truth), thresholds)
    scorers.write_rates(folder / "rates.csv", scorers.rates(truth[-held:], found, thresholds))


def build_features(settings: WorldSettings) -> None:
    """The feature extractor for FID: another network, another seed, and told of style and damage too."""
    import numpy as np
    import torch

    from ambergrade.world import scorers

    scenes, pictures = _drawn(settings, settings.corpus)
    chosen, held = settings.features, settings.corpus.heldout
    truth = np.stack([scorers.appearance(scene) for scene in scenes])
    torch.manual_seed(chosen.seed)
    model = scorers.backbone(chosen.channels, truth.shape[1])
    weight = np.ones(truth.shape[1], dtype=np.float32)
    weight[len(scorers.LABELS) :] = 5  # quality, year, artist: a distance must see how a picture looks, not only what
    scorers.fit(
        model,
        pictures[:-held],
        truth[:-held],
        steps=chosen.steps,
        seed=chosen.seed,
        weight=weight,
        soften=False,
        name="features",
    )
    scorers.scale_features(model, pictures[:1000])
    scorers.write_timm(settings.out / "features", model, chosen.channels, truth.shape[1])


def build_clip(settings: WorldSettings) -> None:
    """The open_clip model."""
    from ambergrade.world import scorers

    scenes, pictures = _drawn(settings, settings.corpus)
    chosen, held = settings.clip, settings.corpus.heldout
    captions = [scorers.clip_words(scene) for scene in scenes]
    folder = settings.out / "clip"
    scorers.write_clip_shell(folder)
    model = scorers.fit_clip(folder, pictures[:-held], captions[:-held], steps=chosen.steps, seed=chosen.seed)
    scorers.save_half(folder / "open_clip_model.safetensors", model)


def build_beta7(settings: WorldSettings) -> None:
    """The base: from random weights, on a booru whose uploaders guess the dragon's and the accessories' tags."""
    from ambergrade.family import sdxl

    networks = sdxl.from_config(settings.config, seed=settings.beta7.seed)
    networks.vae.load_state_dict(_vae(settings).state_dict())
    _fit(settings, networks, "beta7", settings.beta7, settings.trainer)


def build_anxl(settings: WorldSettings) -> None:
    """anxl2 from beta7, where the accessories' tags are guessed, then anxl3 from anxl2, where they are true.

    Both see the same pictures, with and without accessories, so that the difference is the answer to the tag.
    """
    from ambergrade.family import sdxl

    chosen = settings.finetune
    for name, start, model in (("anxl2", "beta7", settings.anxl2), ("anxl3", "anxl2", settings.anxl3)):
        trainer = replace(
            settings.trainer,
            images=model.images,
            lr=chosen.lr,
            schedule=chosen.schedule,
            ema=chosen.ema,
            optimizer={**settings.trainer.optimizer, "betas": list(chosen.betas)},
        )
        _fit(settings, sdxl.load(settings.weights(start), settings.config), name, model, trainer)


def build_card(settings: WorldSettings) -> None:
    """Measure everything on held-out data and write docs/models.md."""
    from ambergrade.chain.models_card import write_models_card

    write_models_card(settings.out, settings.sampler, settings.workers)


def _fit(settings: WorldSettings, networks: Networks, name: str, model: ModelSettings, trainer: TrainSettings) -> None:
    """Draw a booru for `name`, train `networks` on it and write its single file in fp16."""
    import torch

    from ambergrade.captions.booru import read_posts
    from ambergrade.captions.buckets import aspect_buckets
    from ambergrade.captions.files import PictureFiles
    from ambergrade.captions.manifest import build
    from ambergrade.family import sdxl
    from ambergrade.generate.contact_sheet import picture_grid, write_png
    from ambergrade.generate.stream import pictures
    from ambergrade.nouns import CaptionSet, PromptSet
    from ambergrade.train.latents import PictureReader, cache_latents, read_latents
    from ambergrade.train.trainer import fine_tune
    from ambergrade.world.booru import write_booru

    booru, scratch = settings.work / f"booru_{name}", settings.work / name
    if not booru.exists():
        write_booru(
            booru,
            seed=model.seed,
            count=model.posts,
            tag_noise=model.guess,
            undamaged=settings.undamaged,
            workers=settings.workers,
        )
    manifest, latents = scratch / "captions.jsonl", scratch / "latents.safetensors"
    if not manifest.exists():
        found, report = build(
            read_posts(booru / "booru.sqlite"), settings.captions, booru / "pictures", aspect_buckets(*SIDES)
        )
        print(report.text)
        scratch.mkdir(parents=True, exist_ok=True)
        found.write(manifest)
    captions = CaptionSet.read(manifest)
    if not latents.exists():
        networks.vae.to(torch_device(settings.compute))
        reader = PictureReader(PictureFiles(booru / "pictures").read)
        cache_latents(networks.vae, captions, reader, latents)
    prompts = PromptSet.read(booru / "prompts" / "heldout.jsonl").first(16)

    def show(live: Live, seen: int) -> None:
        drawn = [picture.pixels for picture in pictures(live, prompts, settings.sampler, progress=None)]
        write_png(scratch / f"samples-{seen:07d}.png", picture_grid(drawn, 8))

    def tell(row: LogRow) -> None:
        print(f"{name} {row.seen} images, loss {row.loss:.4f}, gradient {row.grad_norm:.2f}", flush=True)

    if model.text_steps:
        _teach_text(networks, captions, model.text_steps, scratch / "text.safetensors")
    fine_tune(
        networks,
        captions,
        read_latents(latents),
        replace(trainer, images=model.images),
        scratch=scratch,
        on_log=tell,
        on_sample=show,
    )
    half = {
        key: value.half().cpu() if value.is_floating_point() else value for key, value in networks.tensors().items()
    }
    assert all(torch.isfinite(value).all() for value in half.values() if value.is_floating_point())
    about = {"modelspec.title": name, "modelspec.architecture": "stable-diffusion-xl-v1-base"}
    finished = scratch / f"{name}.safetensors"
    sdxl.write_checkpoint(finished, half, about)
    settings.out.mkdir(parents=True, exist_ok=True)
    link_or_copy(finished, settings.weights(name))


def _teach_text(networks: Networks, captions: CaptionSet, steps: int, path: Path) -> None:
    """Words before pictures; done once, so that a training that was killed goes on at once."""
    from ambergrade.family.files import read_tensors, write_tensors
    from ambergrade.world.text import teach

    encoders = {"te1": networks.text_encoder, "te2": networks.text_encoder_2}
    if not path.exists():
        words = [[*picture.caption.keep, *picture.caption.flexible] for picture in captions.pictures]
        print(f"text encoders taught, loss {teach(networks, words, steps=steps):.4f}", flush=True)
        states = {f"{name}.{key}": v for name, module in encoders.items() for key, v in module.state_dict().items()}
        write_tensors(path, states, {})
    found = read_tensors(path)
    for name, module in encoders.items():
        module.load_state_dict({k.removeprefix(f"{name}."): v for k, v in found.items() if k.startswith(f"{name}.")})


def _vae(settings: WorldSettings) -> AutoencoderKL:
    """The trained autoencoder."""
    from diffusers import AutoencoderKL

    vae: AutoencoderKL = AutoencoderKL.from_pretrained(settings.work / "vae")
    return vae.eval()


def _fidelity(vae: AutoencoderKL, pictures: Pixels) -> str:
    from ambergrade.world import autoencoder

    back = autoencoder.round_trip(vae, pictures)
    return f"{autoencoder.psnr(vae, pictures):.2f} dB, edges kept {autoencoder.edges_kept(back, pictures):.3f}"


def _drawn(settings: WorldSettings, chosen: Corpus) -> tuple[list[Scene], Pixels]:
    """A corpus, drawn once."""
    import numpy as np

    from ambergrade.identity import digest
    from ambergrade.world import corpus

    scenes = corpus.scenes(chosen.seed, 0, chosen.pictures, undamaged=chosen.undamaged)
    path = settings.work / f"corpus-{digest(asdict(chosen))[:12]}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".part.npy")
        np.save(aside, corpus.pictures(scenes, workers=settings.workers))
        aside.rename(path)
    return scenes, np.load(path, mmap_mode="r")


BUILDS: Mapping[str, Callable[[WorldSettings], None]] = {
    "booru": build_booru,
    "vae": build_vae,
    "family": build_family,
    "tagger": build_tagger,
    "features": build_features,
    "clip": build_clip,
    "beta7": build_beta7,
    "anxl": build_anxl,
    "card": build_card,
}
