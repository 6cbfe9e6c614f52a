"""The stages before training: a caption set from a database, and its latents in the shared store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ambergrade import config
from ambergrade.captions.booru import open_booru
from ambergrade.captions.buckets import aspect_buckets
from ambergrade.captions.files import PictureFiles
from ambergrade.captions.manifest import build
from ambergrade.captions.pictures import decode_bytes
from ambergrade.captions.recipe import CaptionRecipe
from ambergrade.captions.selection import Selection, select_rows
from ambergrade.errors import BadInput
from ambergrade.family import sdxl
from ambergrade.identity import digest
from ambergrade.nouns import CaptionSet, Checkpoint
from ambergrade.store import Finished, Outputs, find_file
from ambergrade.train.latent_store import LatentStore

if TYPE_CHECKING:
    from stages import Chain

    from ambergrade.track.journal import Run

SPLITS = ("train", "heldout")


def dataset(chain: Chain) -> tuple[CaptionSet, CaptionSet]:
    """Captioned pictures to train on and, held out, to validate with."""
    done = dataset_stage(chain)
    return CaptionSet.read(done.files["train.jsonl"]), CaptionSet.read(done.files["heldout.jsonl"])


def dataset_stage(chain: Chain) -> Finished:
    """Manifests of both splits, and what became of every post."""
    data, family = chain.settings["data"], chain.settings["family"]
    buckets = aspect_buckets(*(family[key] for key in ("resolution", "bucket_step", "min_side", "max_side")))
    recipe = CaptionRecipe.from_dict(chain.settings["captions"])
    booru = open_booru(find_file(data["database"]), chain.ledger.root / "arrays")
    unwanted = frozenset(listed_ids(data.get("leave_out")))

    def work(scratch: Path, run: Run) -> Outputs:
        reports, counts, files = {}, {}, {}
        for split in SPLITS:
            chosen = config.settings(Selection, {**data["selection"], "split": split}, where="data.selection")
            posts = (post for post in booru.posts(select_rows(booru, chosen)) if post.id not in unwanted)
            workers = chain.settings["compute"]["workers"] if len(booru) > 20_000 else 1  # a process takes 2 s to start
            captions, report = build(posts, recipe, picture_files(chain), buckets, workers=workers)
            files[f"{split}.jsonl"] = scratch / f"{split}.jsonl"
            captions.write(files[f"{split}.jsonl"])
            reports[split], counts[split] = report.text, len(captions.pictures)
        return Outputs(files, {"report": reports, "pictures": counts})

    def journal(run: Run, done: Finished) -> None:
        run.note("\n\n".join(f"**{split}**\n```\n{text}\n```" for split, text in done.values["report"].items()))
        run.file(done.files["train.jsonl"], "captions")

    about = {"captions": chain.settings["captions"], "selection": data["selection"], "buckets": buckets}
    if unwanted:
        about["leave_out"] = digest(sorted(unwanted))
    return chain.stage("captions and buckets", "dataset", 2, about, {"database": booru.fingerprint}, work, journal)


def encode(
    chain: Chain, base: Checkpoint, weights: Mapping[str, torch.Tensor], captions: CaptionSet, validation: CaptionSet
) -> LatentStore:
    """The store, holding latents of both sets by the base's VAE; only those that are missing are made."""
    vae = vae_digest(weights)
    store = LatentStore(chain.ledger.root / "latents", vae)

    def fill() -> int:
        if not store.missing(captions) and not store.missing(validation):
            return 0
        networks = sdxl.load(base.path, chain.family_config, device=chain.device, only=["vae"])
        files = picture_files(chain)
        at_once = max(1, min(16, 16 * 512**2 // chain.settings["family"]["resolution"] ** 2))  # 10 GB in fp32 at most
        return sum(
            store.fill(networks.vae, chosen, lambda name: decode_bytes(files.read(name), name), batch=at_once)
            for chosen in (captions, validation)
        )

    inputs = {"vae": vae, "train": captions.digest, "heldout": validation.digest}
    done = chain.stage("latents", "latents", 2, {}, inputs, lambda scratch, run: Outputs({}, {"encoded": fill()}))
    if not done.fresh:
        fill()  # the store may have been cleared since
    return store


def prove_latents(chain: Chain, base: Checkpoint, captions: CaptionSet, validation: CaptionSet) -> None:
    """Hash every shard of the store, and encode some pictures of either set again. Raises BadInput naming what differs.

    Nothing is written: pictures without a latent are counted, and train.py makes their latents.
    """
    networks = sdxl.load(base.path, chain.family_config, device=chain.device, only=["vae"])
    store = LatentStore(chain.ledger.root / "latents", vae_digest(sdxl.read_checkpoint(base.path)))
    complaints = store.verify()
    print(f"  {len(list(store.folder.glob('*.safetensors')))} shard(s) hashed in {store.folder}")
    files = picture_files(chain)
    for name, chosen in zip(SPLITS, (captions, validation), strict=True):
        missing = set(store.missing(chosen))
        there = CaptionSet(tuple(p for n, p in enumerate(chosen.pictures) if n not in missing), chosen.recipe)
        count = min(len(there.pictures), chain.settings["compared"])
        told = f", {len(missing)} of them without a latent yet" if missing else ""
        print(f"  {name}: {len(chosen.pictures)} pictures{told}; {count} encoded again")
        if count and not complaints:
            complaints = store.verify(
                networks.vae, there, lambda name: decode_bytes(files.read(name), name), count=count
            )
    if complaints:
        raise BadInput("Latents are not what they should be:\n" + "\n".join(complaints))
    print("verify=latents holds")


def vae_digest(weights: Mapping[str, torch.Tensor]) -> str:
    """What the latents of a checkpoint's VAE are filed under."""
    return sdxl.weights_digest({key: value for key, value in weights.items() if key.startswith("first_stage_model.")})


def picture_files(chain: Chain) -> PictureFiles:
    return PictureFiles(Path(chain.settings["data"]["pictures"]), index=chain.ledger.root / "tars")


def listed_ids(path: str | None) -> Iterator[int]:
    """Post ids of a file, one a line, as `data.py action=lint` writes it."""
    if path is None:
        return
    for number, line in enumerate(find_file(path).read_text().split(), 1):
        if not line.isdigit():
            raise BadInput(f"{path}, line {number}: a post id is needed, found '{line}'.")
        yield int(line)
