"""Latents by content: shards shared by all experiments, filled once, resumable, checkable.

    <folder>/<VAE>-fp16-1/<sha256 of the file>.safetensors      some thousand pictures' latents, each under its key

A latent's key is the digest of what it is made of: the picture file's bytes, bucket and crop. The VAE, the precision
and the version of the preprocessing name the folder. So an edited picture, another crop or another VAE never meets a
stale latent, and a picture in two experiments is encoded once. A shard is renamed into place when it is whole: a kill
costs at most one.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ambergrade.errors import BadInput, BadSetting, MissingObject
from ambergrade.family.files import entries, write_tensors
from ambergrade.identity import digest, file_digest, random_seed
from ambergrade.nouns import CaptionedPicture, CaptionSet
from ambergrade.train.latents import encode_pictures, group_by_bucket

VERSION = 1
"""Of the preprocessing: raise it when the same picture would give other latents."""
SHARD = 1 << 30
"""Bytes of latents in a file: 8192 pictures of 1024²."""
CHANNELS, SHRINK = 4, 8
"""Of SDXL's autoencoder."""
BYTES = 2
CLOSE = 4e-3
"""Relative distance of a latent encoded again: fp16 rounding, and sums in another order on another machine."""


@dataclass(frozen=True, eq=False)
class StoredLatents:
    """Latents of a caption set where they lie; nothing is read before it is used."""

    positions: dict[tuple[int, int], Tensor]
    """Bucket (width, height in pixels) to (N,) positions in the caption set, rising."""
    shards: tuple[Path, ...]
    places: dict[tuple[int, int], np.ndarray[tuple[int, int], np.dtype[np.int64]]]
    """Bucket to (N, 2): number of the shard, byte in it."""

    def rows(self, bucket: tuple[int, int], rows: list[int]) -> Tensor:
        """(len(rows), C, H, W) fp32."""
        shape = CHANNELS, bucket[1] // SHRINK, bucket[0] // SHRINK
        found = []
        for shard, start in self.places[bucket][rows].tolist():
            with self.shards[shard].open("rb") as file:
                file.seek(start)
                found.append(np.frombuffer(file.read(BYTES * int(np.prod(shape))), np.float16).reshape(shape))
        return torch.from_numpy(np.stack(found)).float()


class LatentStore:
    """The latents that one VAE gives, below `folder`."""

    def __init__(self, folder: Path, vae: str) -> None:
        """`vae` is the digest of its weights."""
        self.vae = vae
        self.folder = folder / f"{vae[:16]}-fp16-{VERSION}"

    def missing(self, captions: CaptionSet) -> list[int]:
        """Positions in the caption set of pictures without a latent here; of equal ones the first."""
        there = {key for shard in self._shards() for key in entries(shard)}
        found: dict[str, int] = {}
        for position, picture in enumerate(captions.pictures):
            key = key_of(picture)
            if key not in there:
                found.setdefault(key, position)
        return sorted(found.values())

    def fill(
        self,
        vae: AutoencoderKL,
        captions: CaptionSet,
        open_picture: Callable[[str], Image.Image],
        *,
        batch: int = 16,
        readers: int = 4,
        told: Callable[[str], None] = print,
    ) -> int:
        """Encode what is missing; returns how many pictures that were.

        `open_picture(file_name)` gives an upright RGB picture; `readers` threads open and cut pictures, `batch` of them
        make a forward pass. The GB are told before, the hours after the first pass. Every pass has the same shape,
        so that a latent's bits do not depend on its neighbours. Raises BadInput, naming the post, for a picture
        that does not cover its bucket and for latents that are not finite; BadSetting where the disk is too small.
        """
        missing = self.missing(captions)
        if not missing:
            return 0
        chosen = CaptionSet(tuple(captions.pictures[position] for position in missing), captions.recipe)
        size = sum(map(latent_bytes, chosen.pictures))
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        there = len(captions.pictures) - len(missing)
        told(f"  latents: {len(missing):,} pictures to encode ({there:,} are there), {amount(size)}")
        if size > 0.95 * free:
            raise BadSetting(
                f"{size / 1e9:,.1f} GB of latents do not fit: {free / 1e9:,.1f} GB are free at {self.folder}.\n"
                "Make room, or choose another root or fewer posts; what is encoded already is kept."
            )
        held: dict[str, Tensor] = {}
        started, done = time.monotonic(), 0
        with (
            ThreadPoolExecutor(max(1, readers)) as pool,
            tqdm(total=len(missing), desc="latents", unit="img", disable=None) as bar,
        ):
            for pictures, latents in _encoded(vae, chosen, open_picture, batch, pool):
                held |= {key_of(p): latent for p, latent in zip(pictures, latents, strict=True)}
                if not done and len(missing) > len(pictures):
                    seconds = (time.monotonic() - started) * len(missing) / len(pictures)
                    told(f"  latents: about {duration(seconds)} (by the pace of the first {len(pictures)})")
                done += len(pictures)
                bar.update(len(pictures))
                if sum(latent.nbytes for latent in held.values()) >= SHARD:
                    self._write(held)
                    held = {}
        if held:
            self._write(held)
        return len(missing)

    def open(self, captions: CaptionSet) -> StoredLatents:
        """The latents of a caption set. Raises MissingObject where some are not there."""
        shards = tuple(self._shards())
        where: dict[str, tuple[int, int]] = {}
        for number, shard in enumerate(shards):
            where |= {key: (number, entry.start) for key, entry in entries(shard).items()}
        groups = group_by_bucket(captions)
        keys = {bucket: [key_of(captions.pictures[n]) for n in positions] for bucket, positions in groups.items()}
        absent = sum(key not in where for group in keys.values() for key in group)
        if absent:
            raise MissingObject(
                f"{absent:,} of {len(captions.pictures):,} pictures have no latent in {self.folder}.\n"
                "Fill the store first: the training pipeline does it before it trains."
            )
        places = {bucket: np.array([where[key] for key in group], np.int64) for bucket, group in keys.items()}
        return StoredLatents({b: torch.tensor(positions) for b, positions in groups.items()}, shards, places)

    def verify(
        self,
        vae: AutoencoderKL | None = None,
        captions: CaptionSet | None = None,
        open_picture: Callable[[str], Image.Image] | None = None,
        *,
        count: int = 8,
        seed: int = 0,
    ) -> list[str]:
        """Complaints, none for a sound store: shards that are not the bytes of their name, and, with a VAE, latents of
        `count` random pictures that are not what it gives now."""
        wrong = []
        for shard in tqdm(self._shards(), "hashing latents", disable=None, unit="shard"):
            if file_digest(shard) != shard.stem:
                wrong.append(f"{shard.name} is damaged: its bytes are not those of its name; remove it and run again")
        if wrong or vae is None or captions is None or open_picture is None:
            return wrong
        stored = self.open(captions)
        order = sorted(range(len(captions.pictures)), key=lambda n: random_seed(seed, "verify latents", n))[:count]
        for bucket, positions in stored.positions.items():
            for row, position in enumerate(positions.tolist()):
                if position in order:
                    picture = captions.pictures[position]
                    fresh = encode_pictures(vae, [picture], open_picture, map)[0]
                    kept = stored.rows(bucket, [row])[0]
                    apart = float((fresh - kept).norm() / fresh.norm())
                    if apart > CLOSE:
                        wrong.append(
                            f"post {picture.post_id} ({picture.file_name}): {apart:.1%} from what its file gives"
                        )
        return wrong

    def _shards(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors"))

    def _write(self, held: dict[str, Tensor]) -> None:
        aside = self.folder / f".{digest(sorted(held))[:16]}.part"
        try:
            write_tensors(aside, held, {"vae": self.vae, "version": str(VERSION)})
            aside.rename(self.folder / f"{file_digest(aside)}.safetensors")
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise MissingObject(
                f"Latents cannot be written to {self.folder}: {error.strerror or error}.\n"
                "Make room and run the same command again; the shards before are whole and stay."
            ) from error


def key_of(picture: CaptionedPicture) -> str:
    """What a latent is made of, the VAE and this module's version aside."""
    return digest([picture.sha256, picture.bucket, picture.crop])


def duration(seconds: float) -> str:
    """In the unit that suits it, for estimates.

    >>> [duration(x) for x in (4.68, 59, 200, 5400, 360_000)]
    ['4.7 s', '59 s', '3.3 min', '1.5 h', '100 h']
    """
    unit, name = (1, "s") if seconds < 60 else (60, "min") if seconds < 3600 else (3600, "h")
    value = seconds / unit
    return f"{value:.{1 if value < 10 else 0}f} {name}"


def amount(size: int) -> str:
    """Bytes in the unit that suits them.

    >>> [amount(x) for x in (83_600, 5_400_000, 393_216_000_000)]
    ['84 KB', '5.4 MB', '393 GB']
    """
    unit, name = (1e3, "KB") if size < 1e6 else (1e6, "MB") if size < 1e9 else (1e9, "GB")
    value = size / unit
    return f"{value:,.{1 if value < 10 else 0}f} {name}"


def latent_bytes(picture: CaptionedPicture) -> int:
    """131,072 for a 1024² picture."""
    return CHANNELS * BYTES * (picture.bucket[0] // SHRINK) * (picture.bucket[1] // SHRINK)


def _encoded(
    vae: AutoencoderKL,
    captions: CaptionSet,
    open_picture: Callable[[str], Image.Image],
    batch: int,
    pool: ThreadPoolExecutor,
) -> Iterator[tuple[Sequence[CaptionedPicture], Tensor]]:
    """Pictures and their latents, (B, C, H, W) fp16, a bucket after the other."""
    for positions in group_by_bucket(captions).values():
        for start in range(0, len(positions), batch):
            pictures = [captions.pictures[n] for n in positions[start : start + batch]]
            filled = pictures + [pictures[-1]] * (batch - len(pictures))
            latents = encode_pictures(vae, filled, open_picture, pool.map)[: len(pictures)].half()
            if not latents.isfinite().all():
                raise BadInput(f"Latents of post {pictures[0].post_id} and its neighbours do not fit into fp16.")
            yield pictures, latents
