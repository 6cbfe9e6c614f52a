"""Encodes pictures once: latents of both sets, by the base's VAE, in the shared store of latents."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ambergrade.chain.context import Context, Stage
from ambergrade.chain.dataset import SPLITS, picture_files
from ambergrade.chain.settings import DataSettings, FamilySettings
from ambergrade.errors import BadInput
from ambergrade.family.files import weights_digest
from ambergrade.family.load import family as load_family
from ambergrade.nouns import CaptionSet, Checkpoint
from ambergrade.store import Outputs, find_file
from ambergrade.train.latent_store import LatentStore
from ambergrade.train.latents import PictureReader

LATENTS = Stage("latents", 3)


def encode(
    context: Context,
    data: DataSettings,
    family: FamilySettings,
    base: Checkpoint,
    weights: Mapping[str, torch.Tensor],
    captions: CaptionSet,
    validation: CaptionSet,
) -> LatentStore:
    """Return the store with latents of both sets by the base's VAE; only those that are missing are made."""
    vae = vae_digest(weights)
    store = LatentStore(context.ledger.root / "latents", vae)
    pictures = PictureReader(picture_files(context, data).read)

    def fill() -> int:
        if not store.missing(captions) and not store.missing(validation):
            return 0
        loaded = load_family(family.name)
        networks = loaded.networks.load(base.path, find_file(family.config), device=context.device, only=["vae"])
        at_once = max(1, min(16, 16 * 512**2 // family.resolution**2))  # 10 GB in fp32 at most
        return sum(store.fill(networks.vae, chosen, pictures, batch=at_once) for chosen in (captions, validation))

    task = LATENTS.task({}, {"vae": vae, "train": captions.digest, "heldout": validation.digest})
    done = context.run(task, "latents", lambda scratch, run: Outputs({}, {"encoded": fill()}))
    if not done.fresh:
        fill()  # the store may have been cleared since
    return store


def prove_latents(
    context: Context,
    data: DataSettings,
    family: FamilySettings,
    base: Checkpoint,
    captions: CaptionSet,
    validation: CaptionSet,
    compared: int,
) -> None:
    """Hash every shard of the store, and encode some pictures of either set again. Raises BadInput naming what differs.

    Nothing is written: pictures without a latent are counted, and a training makes their latents.
    """
    loaded = load_family(family.name)
    networks = loaded.networks.load(base.path, find_file(family.config), device=context.device, only=["vae"])
    store = LatentStore(context.ledger.root / "latents", vae_digest(loaded.read_checkpoint(base.path)))
    complaints = store.verify()
    print(f"  {len(list(store.folder.glob('*.safetensors')))} shard(s) hashed in {store.folder}")
    pictures = PictureReader(picture_files(context, data).read)
    for name, chosen in zip(SPLITS, (captions, validation), strict=True):
        missing = set(store.missing(chosen))
        there = CaptionSet(tuple(p for n, p in enumerate(chosen.pictures) if n not in missing), chosen.recipe)
        count = min(len(there.pictures), compared)
        told = f", {len(missing)} of them without a latent yet" if missing else ""
        print(f"  {name}: {len(chosen.pictures)} pictures{told}; {count} encoded again")
        if count and not complaints:
            complaints = store.verify(networks.vae, there, pictures, count=count)
    if complaints:
        raise BadInput("Latents are not what they should be:\n" + "\n".join(complaints))
    print("verify=latents holds")


def vae_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """What the latents of a checkpoint's VAE are filed under."""
    return weights_digest({key: value for key, value in weights.items() if key.startswith("first_stage_model.")})
