"""Keeps latents by content: in shards that all experiments share, filled once, resumable, checkable.

    <folder>/<VAE>-fp16-2/<sha256 of the file>.safetensors      some thousand pictures' latents, each under its key

A latent's key is the digest of what it is made of: the picture file's bytes, bucket and crop. The VAE, the precision
and the version of the store name the folder. So an edited picture, another crop or another VAE never meets a stale
latent, and a picture in two experiments is encoded once. A shard's metadata name the sha256 of each latent's bytes, and
a latent is checked against it whenever it is read. A shard is renamed into place when it is whole: a kill costs at most
one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from ambergrade.errors import BadInput, BadSetting, MissingObject
from ambergrade.family.files import entries, tensor_bytes, write_tensors
from ambergrade.family.header import Entry
from ambergrade.identity import digest, file_digest, random_seed
from ambergrade.nouns import CaptionedPicture, CaptionSet
from ambergrade.train.latents import PictureReader, encode_pictures, group_by_bucket

VERSION = 2
"""The store's version: raise it when the same picture would give other latents. Before 2, files were not checked."""
SHARD = 1 << 30
"""Bytes of latents in a file: 8192 pictures of 1024²."""
CHANNELS, SHRINK = 4, 8
"""SDXL's autoencoder makes so many channels, and shrinks each side by so much."""
BYTES = 2
CLOSE = 4e-3
"""Relative distance of a latent encoded again: fp16 rounding, and sums in another order on another machine."""

REMEDY = "Remove that file and run the same command again; only its pictures are encoded again."


@dataclass(frozen=True, eq=False)
class StoredLatents:
    """Reads the latents of a caption set from where they lie, none before it is used."""

    positions: dict[tuple[int, int], Tensor]
    """Bucket (width, height in pixels) to (N,) positions in the caption set, rising."""
    shards: tuple[Path, ...]
    places: dict[tuple[int, int], np.ndarray[tuple[int, int], np.dtype[np.int64]]]
    """Bucket to (N, 2): number of the shard, byte in it."""
    hashes: dict[tuple[int, int], np.ndarray[tuple[int, int], np.dtype[np.uint8]]]
    """Bucket to (N, 32): sha256 of each latent's bytes."""

    def rows(self, bucket: tuple[int, int], rows: list[int]) -> Tensor:
        """Read (len(rows), C, H, W) fp32. Raises BadInput for a latent whose bytes are not those of its record."""
        shape = CHANNELS, bucket[1] // SHRINK, bucket[0] // SHRINK
        found = []
        for (number, start), expected in zip(
            self.places[bucket][rows].tolist(), self.hashes[bucket][rows], strict=True
        ):
            with self.shards[number].open("rb") as file:
                file.seek(start)
                data = file.read(BYTES * int(np.prod(shape)))
            if hashlib.sha256(data).digest() != expected.tobytes():
                raise BadInput(
                    f"{self.shards[number]} is damaged: a latent's bytes are not those of its record.\n{REMEDY}"
                )
            found.append(np.frombuffer(data, np.float16).reshape(shape))
        return torch.from_numpy(np.stack(found)).float()

    @cached_property
    def digest(self) -> str:
        """Digest the latents' bytes in the order of the caption set, from their records: nothing is read."""
        positions = np.concatenate([positions.numpy() for positions in self.positions.values()])
        return hashlib.sha256(np.concatenate(list(self.hashes.values()))[np.argsort(positions)].tobytes()).hexdigest()


class LatentStore:
    """Fills, opens and checks the latents that one VAE gives, below `folder`."""

    def __init__(self, folder: Path, vae: str) -> None:
        """`vae` is the digest of its weights."""
        self.vae = vae
        self.folder = folder / f"{vae[:16]}-fp16-{VERSION}"

    def missing(self, captions: CaptionSet) -> list[int]:
        """Find the pictures without a latent here: positions in the caption set, of equal pictures the first."""
        there = {key for shard in self._shards() for key in _keys(shard)}
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
        pictures: PictureReader,
        *,
        batch: int = 16,
        readers: int = 4,
        tell: Callable[[str], None] = print,
    ) -> int:
        """Encode what is missing; returns how many pictures that were.

        `readers` threads open and cut pictures, `batch` of them make a forward pass. `tell` hears the GB before, the
        hours after the first pass. Every pass has the same shape, so that a latent's bits do not depend on its
        neighbours. Raises BadInput, naming the post, for a file that is not the caption set's, for a picture that does
        not cover its bucket and for latents that are not finite; BadSetting where the disk is too small.
        """
        missing = self.missing(captions)
        if not missing:
            return 0
        chosen = CaptionSet(tuple(captions.pictures[position] for position in missing), captions.recipe)
        size = sum(map(latent_bytes, chosen.pictures))
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        there = len(captions.pictures) - len(missing)
        tell(f"  latents: {len(missing):,} pictures to encode ({there:,} are there), {amount(size)}")
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
            for encoded, latents in _encoded(vae, chosen, pictures, batch, pool):
                held |= {key_of(p): latent for p, latent in zip(encoded, latents, strict=True)}
                if not done and len(missing) > len(encoded):
                    seconds = (time.monotonic() - started) * len(missing) / len(encoded)
                    tell(f"  latents: about {duration(seconds)} (by the pace of the first {len(encoded)})")
                done += len(encoded)
                bar.update(len(encoded))
                if sum(latent.nbytes for latent in held.values()) >= SHARD:
                    self._write(held)
                    held = {}
        if held:
            self._write(held)
        return len(missing)

    def open(self, captions: CaptionSet) -> StoredLatents:
        """Find the latents of a caption set. Raises MissingObject where some are not there."""
        shards = tuple(self._shards())
        where: dict[str, tuple[int, int]] = {}
        hashes: dict[str, str] = {}
        for number, shard in enumerate(shards):
            where |= {key: (number, entry.start) for key, entry in _keys(shard).items()}
            with safe_open(shard, "np") as file:
                hashes |= file.metadata()
        groups = group_by_bucket(captions)
        keys = {bucket: [key_of(captions.pictures[n]) for n in positions] for bucket, positions in groups.items()}
        absent = sum(key not in where for group in keys.values() for key in group)
        if absent:
            raise MissingObject(
                f"{absent:,} of {len(captions.pictures):,} pictures have no latent in {self.folder}.\n"
                "Fill the store first: the training pipeline does it before it trains."
            )
        places = {bucket: np.array([where[key] for key in group], np.int64) for bucket, group in keys.items()}
        sums = {
            bucket: np.frombuffer(bytes.fromhex("".join(hashes[key] for key in group)), np.uint8).reshape(-1, 32)
            for bucket, group in keys.items()
        }
        return StoredLatents({b: torch.tensor(positions) for b, positions in groups.items()}, shards, places, sums)

    def verify(
        self,
        vae: AutoencoderKL | None = None,
        captions: CaptionSet | None = None,
        pictures: PictureReader | None = None,
        *,
        count: int = 8,
        seed: int = 0,
    ) -> list[str]:
        """List complaints, none for a sound store.

        They are of shards that are not the bytes of their name and, with a VAE, of latents of `count` random pictures
        that are not what it gives now.
        """
        wrong = []
        for shard in tqdm(self._shards(), "hashing latents", disable=None, unit="shard"):
            if file_digest(shard) != shard.stem:
                wrong.append(f"{shard.name} is damaged: its bytes are not those of its name. {REMEDY}")
        if wrong or vae is None or captions is None or pictures is None:
            return wrong
        stored = self.open(captions)
        order = sorted(range(len(captions.pictures)), key=lambda n: random_seed(seed, "verify latents", n))[:count]
        for bucket, positions in stored.positions.items():
            for row, position in enumerate(positions.tolist()):
                if position in order:
                    picture = captions.pictures[position]
                    fresh = encode_pictures(vae, [picture], pictures)[0]
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
        aside = self.folder / f".{digest(sorted(held))[:16]}.{os.getpid()}.part"
        hashes = {key: hashlib.sha256(tensor_bytes(latent)).hexdigest() for key, latent in held.items()}
        try:
            write_tensors(aside, held, {"vae": self.vae, "version": str(VERSION), **hashes})
            aside.rename(self.folder / f"{file_digest(aside)}.safetensors")
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise MissingObject(
                f"Latents cannot be written to {self.folder}: {error.strerror or error}.\n"
                "Make room and run the same command again; the shards before are whole and stay."
            ) from error


def _keys(shard: Path) -> dict[str, Entry]:
    try:
        return entries(shard)
    except BadInput as error:
        raise BadInput(f"{shard} is not a whole shard of latents ({error}).\n{REMEDY}") from error


def key_of(picture: CaptionedPicture) -> str:
    """Digest what a latent is made of, the VAE and this module's version aside."""
    return digest([picture.sha256, picture.bucket, picture.crop])


def duration(seconds: float) -> str:
    """Write seconds in the unit that suits them, for estimates.

    >>> [duration(x) for x in (4.68, 59, 200, 5400, 360_000)]
    ['4.7 s', '59 s', '3.3 min', '1.5 h', '100 h']
    """
    unit, name = (1, "s") if seconds < 60 else (60, "min") if seconds < 3600 else (3600, "h")
    value = seconds / unit
    return f"{value:.{1 if value < 10 else 0}f} {name}"


def amount(size: int) -> str:
    """Write bytes in the unit that suits them.

    >>> [amount(x) for x in (83_600, 5_400_000, 393_216_000_000)]
    ['84 KB', '5.4 MB', '393 GB']
    """
    unit, name = (1e3, "KB") if size < 1e6 else (1e6, "MB") if size < 1e9 else (1e9, "GB")
    value = size / unit
    return f"{value:,.{1 if value < 10 else 0}f} {name}"


def latent_bytes(picture: CaptionedPicture) -> int:
    """Count the bytes of a picture's latent: 131,072 for 1024²."""
    return CHANNELS * BYTES * (picture.bucket[0] // SHRINK) * (picture.bucket[1] // SHRINK)


def _encoded(
    vae: AutoencoderKL,
    captions: CaptionSet,
    pictures: PictureReader,
    batch: int,
    pool: ThreadPoolExecutor,
) -> Iterator[tuple[Sequence[CaptionedPicture], Tensor]]:
    """Yield pictures and their latents, (B, C, H, W) fp16, a bucket after the other."""
    for positions in group_by_bucket(captions).values():
        for start in range(0, len(positions), batch):
            chosen = [captions.pictures[n] for n in positions[start : start + batch]]
            filled = chosen + [chosen[-1]] * (batch - len(chosen))
            latents = encode_pictures(vae, filled, pictures, pool.map)[: len(chosen)].half()
            if not latents.isfinite().all():
                raise BadInput(f"Latents of post {chosen[0].post_id} and its neighbours do not fit into fp16.")
            yield chosen, latents
