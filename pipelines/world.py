"""Rebuild the embedded world's models: draw pictures, train, write src/ambergrade/world/weights anew.

Examples:
    python pipelines/world.py build=booru booru.folder=/tmp/booru     draw a mini-booru to look at
    python pipelines/world.py build=vae                               one model; `build=` names what
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ambergrade import config
from ambergrade.errors import UnknownName
from ambergrade.store import link_or_copy


@config.main("world")
def main(cfg: Any) -> None:
    settings = config.plain(cfg)
    if settings["build"] not in BUILDS:
        raise UnknownName("build", settings["build"], BUILDS)
    import torch

    torch.set_num_threads(settings["compute"]["threads"] or torch.get_num_threads())
    BUILDS[settings["build"]](settings)


def build_booru(settings: dict[str, Any]) -> None:
    """A mini-booru in a folder, to look at."""
    from ambergrade.world.booru import write_booru

    booru = settings["booru"]
    write_booru(Path(booru["folder"]), seed=booru["seed"], count=booru["posts"], workers=settings["workers"])
    print(f"{booru['posts']} posts in {booru['folder']}")


def build_vae(settings: dict[str, Any]) -> None:
    """The autoencoder: all of it first, then its decoder alone (which leaves latents as they are)."""
    from ambergrade.world import autoencoder

    scenes, pictures = _corpus(settings)
    held = settings["corpus"]["heldout"]
    # Noise cannot be learned: of the most damaged pictures one in three is enough.
    kept = [place for place, scene in enumerate(scenes[:-held]) if scene.quality > 0.45 or place % 3 == 0]
    folder, held_out, pictures = Path(settings["work"]) / "vae", pictures[-held:], pictures[kept]
    vae = autoencoder.train(pictures, steps=settings["vae"]["steps"], on_log=_tell)
    autoencoder.fit_scale(vae, pictures)
    vae.save_pretrained(folder)  # latents are settled: what trains on them may begin
    print(f"encoder done, PSNR {autoencoder.psnr(vae, held_out):.2f} dB", flush=True)
    vae = autoencoder.train(
        pictures,
        steps=settings["vae"]["decoder_steps"],
        seed=1,
        rate=1.5e-3,
        hint_weight=0.0,
        start=vae,
        decoder_only=True,
        on_log=_tell,
    )
    vae.save_pretrained(folder)
    print(f"PSNR {autoencoder.psnr(vae, held_out):.2f} dB")


def _tell(step: int, values: dict[str, float]) -> None:
    """A line now and then, for a log that is not a terminal."""
    if step % 250 == 0:
        print(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()), flush=True)


def build_family(settings: dict[str, Any]) -> None:
    """Config folder and tokenizer."""
    from diffusers import AutoencoderKL

    from ambergrade.world.family import write_config

    vae = AutoencoderKL.from_pretrained(Path(settings["work"]) / "vae")
    write_config(Path(settings["out"]) / "sdxl_tiny", vae.config.scaling_factor)


def build_tagger(settings: dict[str, Any]) -> None:
    """The tagger, in the layout of WD v3; it also sees what the autoencoder gives back, as generated pictures are."""
    import numpy as np
    import torch
    from diffusers import AutoencoderKL

    from ambergrade.world import autoencoder, scorers

    scenes, pictures = _corpus(settings)
    chosen, held = settings["tagger"], settings["corpus"]["heldout"]
    truth = np.stack([scorers.labels(scene) for scene in scenes])
    torch.manual_seed(chosen["seed"])
    model = scorers.backbone(chosen["channels"], len(scorers.LABELS))
    vae = AutoencoderKL.from_pretrained(Path(settings["work"]) / "vae").eval()
    soft = autoencoder.round_trip(vae, pictures[: chosen["soft"]])
    seen, known = np.concatenate([pictures[:-held], soft]), np.concatenate([truth[:-held], truth[: chosen["soft"]]])
    scorers.fit(model, seen, known, steps=chosen["steps"], seed=chosen["seed"], bgr=True, name="tagger")
    folder = Path(settings["out"]) / "tagger"
    scorers.write_timm(folder, model, chosen["channels"], len(scorers.LABELS))
    found = scorers.outputs(model, pictures[-held:], bgr=True)
    thresholds = scorers.balanced_thresholds(truth[-held:], found)
    scorers.write_tags(folder, scorers.counts(truth), thresholds)
    scorers.write_rates(folder / "rates.csv", scorers.rates(truth[-held:], found, thresholds))


def build_features(settings: dict[str, Any]) -> None:
    """The feature extractor for FID: another network, another seed, and told of style and damage too."""
    import numpy as np
    import torch

    from ambergrade.world import scorers

    scenes, pictures = _corpus(settings)
    chosen, held = settings["features"], settings["corpus"]["heldout"]
    truth = np.stack([scorers.appearance(scene) for scene in scenes])
    torch.manual_seed(chosen["seed"])
    model = scorers.backbone(chosen["channels"], truth.shape[1])
    weight = np.ones(truth.shape[1], dtype=np.float32)
    weight[len(scorers.LABELS) :] = 5  # quality, year, artist: a distance must see how a picture looks, not only what
    fit = {"steps": chosen["steps"], "seed": chosen["seed"], "weight": weight, "soften": False, "name": "features"}
    scorers.fit(model, pictures[:-held], truth[:-held], **fit)
    scorers.write_timm(Path(settings["out"]) / "features", model, chosen["channels"], truth.shape[1])


def build_clip(settings: dict[str, Any]) -> None:
    """The open_clip model."""
    from ambergrade.world import scorers

    scenes, pictures = _corpus(settings)
    chosen, held = settings["clip"], settings["corpus"]["heldout"]
    captions = [scorers.clip_words(scene) for scene in scenes]
    folder = Path(settings["out"]) / "clip"
    scorers.write_clip_shell(folder)
    model = scorers.fit_clip(folder, pictures[:-held], captions[:-held], steps=chosen["steps"], seed=chosen["seed"])
    scorers.save_half(folder / "open_clip_model.safetensors", model)


def build_beta7(settings: dict[str, Any]) -> None:
    """The base: from random weights, on a booru whose uploaders guess some tags; then on two that are tagged better."""
    from diffusers import AutoencoderKL

    from ambergrade.family import sdxl

    config, early = Path(settings["out"]) / "sdxl_tiny", Path(settings["work"]) / "early.safetensors"
    if not early.exists():
        networks = sdxl.from_config(config, seed=settings["beta7"]["seed"])
        networks.vae.load_state_dict(AutoencoderKL.from_pretrained(Path(settings["work"]) / "vae").state_dict())
        _fit(settings, networks, "beta7", settings["guess"], {}, settings["trainer"], out=early)
    start = early
    for number, later in enumerate(settings["later"], start=1):
        out = Path(settings["work"]) / f"later-{number}.safetensors"
        if not out.exists():
            trainer = {**settings["trainer"], **settings["late"], "images": later["images"]}
            booru = {"posts": later["posts"], "seed": later["seed"]}
            networks = sdxl.load(start, config)
            _fit({**settings, out.stem: booru}, networks, out.stem, later["guess"], {}, trainer, out=out, title="beta7")
        start = out
    link_or_copy(start, _weights(settings, "beta7"))


def build_anxl(settings: dict[str, Any]) -> None:
    """anxl2 from beta7 without accessories, then anxl3 from anxl2 with well-captioned ones."""
    from ambergrade.family import sdxl

    weights = Path(settings["out"])
    trainer = {**settings["trainer"], **settings["finetune"], "ema": 0.0}
    trainer["optimizer"] = {**trainer["optimizer"], "betas": [0.9, 0.999]}
    for name, start in (("anxl2", "beta7"), ("anxl3", "anxl2")):
        networks = sdxl.load(_weights(settings, start), weights / "sdxl_tiny")
        chosen = settings[name]
        images = {"images": chosen["images"]} if "images" in chosen else {}
        guess = {tag: settings["guess"][tag] for tag in chosen["guess"]}
        selection = {key: tuple(chosen[key]) for key in ("tags_any", "tags_none") if key in chosen}
        _fit(settings, networks, name, guess, selection, {**trainer, **images}, out=_weights(settings, name))


def build_card(settings: dict[str, Any]) -> None:
    """Measure everything on held-out data and write docs/models.md."""
    from models_card import write_models_card

    write_models_card(settings)


def _fit(
    settings: dict[str, Any],
    networks: Any,
    name: str,
    guess: dict[str, float],
    selection: dict[str, Any],
    trainer: dict[str, Any],
    *,
    out: Path,
    title: str = "",
) -> None:
    """Draw a booru for `name`, train `networks` on it and write the single file `out` in fp16."""
    import torch

    from ambergrade.captions.booru import read_posts
    from ambergrade.captions.buckets import aspect_buckets
    from ambergrade.captions.manifest import build
    from ambergrade.captions.pictures import open_picture
    from ambergrade.captions.recipe import CaptionRecipe
    from ambergrade.captions.selection import Selection, select
    from ambergrade.family import sdxl
    from ambergrade.generate.contact_sheet import picture_grid, write_png
    from ambergrade.generate.stream import pictures
    from ambergrade.nouns import CaptionSet, PromptSet, SamplerSettings
    from ambergrade.train.latents import cache_latents, read_latents
    from ambergrade.train.settings import TrainSettings
    from ambergrade.train.trainer import fine_tune
    from ambergrade.world.booru import write_booru

    booru, scratch = Path(settings["work"]) / f"booru_{name}", Path(settings["work"]) / name
    chosen = settings[name]
    if not booru.exists():
        write_booru(booru, seed=chosen["seed"], count=chosen["posts"], tag_noise=guess, workers=settings["workers"])
    manifest, latents = scratch / "captions.jsonl", scratch / "latents.safetensors"
    if not manifest.exists():
        posts = select(read_posts(booru / "booru.sqlite"), Selection(**selection))
        recipe = CaptionRecipe.from_dict(settings["captions"])
        found, report = build(posts, recipe, booru / "pictures", aspect_buckets(128, 32, 96, 160))
        print(report.text)
        scratch.mkdir(parents=True, exist_ok=True)
        found.write(manifest)
    captions = CaptionSet.read(manifest)
    if not latents.exists():
        cache_latents(networks.vae, captions, lambda file: open_picture(booru / "pictures" / file), latents)
    sampler = SamplerSettings(**settings["sampler"])
    prompts = PromptSet.read(booru / "prompts" / "heldout.jsonl").first(16)

    def show(live: Any, seen: int) -> None:
        drawn = [picture.pixels for picture in pictures(live, prompts, sampler, progress=None)]
        write_png(scratch / f"samples-{seen:07d}.png", picture_grid(drawn, 8))

    def tell(row: Any) -> None:
        print(f"{name} {row.seen} images, loss {row.loss:.4f}, gradient {row.grad_norm:.2f}", flush=True)

    if chosen.get("text_steps"):
        _teach_text(networks, captions, chosen["text_steps"], scratch / "text.safetensors")
    fine_tune(
        networks,
        captions,
        read_latents(latents),
        TrainSettings.read(trainer),
        scratch=scratch,
        on_log=tell,
        on_sample=show,
    )
    half = {key: value.half() if value.is_floating_point() else value for key, value in sdxl.tensors(networks).items()}
    about = {"modelspec.title": title or name, "modelspec.architecture": "stable-diffusion-xl-v1-base"}
    assert all(torch.isfinite(value).all() for value in half.values() if value.is_floating_point())
    sdxl.write_checkpoint(out, half, about)


def _weights(settings: dict[str, Any], name: str) -> Path:
    return Path(settings["out"]) / f"{name}.safetensors"


def _teach_text(networks: Any, captions: Any, steps: int, path: Path) -> None:
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


def _corpus(settings: dict[str, Any]) -> tuple[Any, Any]:
    """(scenes, pictures) that the autoencoder and the scorers share; drawn once. The last ones are held out."""
    import numpy as np

    from ambergrade.world import corpus

    chosen = settings["corpus"]
    scenes = corpus.scenes(chosen["seed"], 0, chosen["pictures"])
    path = Path(settings["work"]) / f"corpus-{chosen['seed']}-{chosen['pictures']}.npy"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".part.npy")
        np.save(aside, corpus.pictures(scenes, workers=settings["workers"]))
        aside.rename(path)
    return scenes, np.load(path, mmap_mode="r")


BUILDS = {
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

if __name__ == "__main__":
    main()
