"""Encodes a caption set: every picture goes from the original straight to its bucket and through the VAE, once."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ambergrade.errors import BadInput
from ambergrade.family.files import read_tensors, write_tensors
from ambergrade.nouns import CaptionedPicture, CaptionSet
from ambergrade.pictures import cut, decode_bytes


@dataclass(frozen=True)
class PictureReader:
    """Opens the pictures of a caption set, from the bytes that the set was made of and no others."""

    read: Callable[[str], bytes]
    """Gives a file's bytes by its name."""
    decode: Callable[[bytes, str], Image.Image] = decode_bytes
    """Makes an upright RGB picture of bytes; the name is for complaints."""

    def open(self, picture: CaptionedPicture) -> Image.Image:
        """Open one picture. Raises BadInput, naming the post, where its bytes are not the caption set's."""
        data = self.read(picture.file_name)
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != picture.sha256:
            raise BadInput(
                f"Post {picture.post_id} ({picture.file_name}) is another file than the caption set was made of: "
                f"sha256 {sha256[:12]}… instead of {picture.sha256[:12]}….\n"
                "Put the file back, or build the caption set again."
            )
        return self.decode(data, picture.file_name)


class Cached(Protocol):
    """Gives the latents of a caption set, wherever they are kept; a picture is named by its position in the set."""

    @property
    def positions(self) -> dict[tuple[int, int], Tensor]:
        """Map buckets (width, height in pixels) to (N,) positions in the caption set, rising."""

    def rows(self, bucket: tuple[int, int], rows: list[int]) -> Tensor:
        """Return (len(rows), C, H, W) fp32."""


@dataclass(frozen=True, eq=False)
class Latents:
    """Holds latents in memory, by bucket."""

    by_bucket: dict[tuple[int, int], Tensor]
    """Bucket (width, height in pixels) to (N, C, height/8, width/8), times the VAE's scaling factor."""
    positions: dict[tuple[int, int], Tensor]
    """Bucket to (N,) positions in the caption set, rising."""

    def rows(self, bucket: tuple[int, int], rows: list[int]) -> Tensor:
        """Return (len(rows), C, H, W) fp32."""
        return self.by_bucket[bucket][torch.tensor(rows)].float()


def cache_latents(
    vae: AutoencoderKL,
    captions: CaptionSet,
    pictures: PictureReader,
    target: Path,
    *,
    batch: int = 16,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the latents of all pictures to one safetensors file.

    What is stored is the posterior's mean times the scaling factor, not one random draw frozen for ever. Raises
    BadInput, naming the post, for a file that is not the caption set's, for a picture that does not cover its bucket
    and for latents that are not finite. `batch` is pictures per forward pass.
    """
    tensors: dict[str, Tensor] = {}
    with tqdm(total=len(captions.pictures), desc="latents", unit="img", disable=None) as bar:
        for bucket, positions in group_by_bucket(captions).items():
            found = []
            for start in range(0, len(positions), batch):
                chosen = [captions.pictures[i] for i in positions[start : start + batch]]
                found.append(encode_pictures(vae, chosen, pictures).to(dtype))
                bar.update(len(chosen))
            name = f"{bucket[0]}x{bucket[1]}"
            tensors[f"{name}.latents"] = torch.cat(found)
            tensors[f"{name}.positions"] = torch.tensor(positions)
    write_tensors(target, tensors, {"captions": captions.digest})


def encode_pictures(
    vae: AutoencoderKL,
    chosen: Sequence[CaptionedPicture],
    pictures: PictureReader,
    mapped: Callable[..., Iterable[Tensor]] = map,
) -> Tensor:
    """Encode pictures of one bucket: (B, C, H, W) fp32 on the CPU, the posterior's means times the scaling factor.

    `mapped` opens and cuts them, perhaps in threads. Raises BadInput as `cache_latents` does.
    """

    def pixels_of(picture: CaptionedPicture) -> Tensor:
        name = f"Post {picture.post_id} ({picture.file_name})"
        return _pixels(cut(pictures.open(picture), picture.bucket, picture.crop, name))

    return _encode(vae, torch.stack(list(mapped(pixels_of, chosen))), chosen).float().cpu()


def read_latents(path: Path) -> Latents:
    """Read what `cache_latents` wrote."""
    tensors = read_tensors(path)
    names = sorted(key.removesuffix(".latents") for key in tensors if key.endswith(".latents"))
    buckets = {name: (int(name.split("x")[0]), int(name.split("x")[1])) for name in names}
    return Latents(
        {bucket: tensors[f"{name}.latents"] for name, bucket in buckets.items()},
        {bucket: tensors[f"{name}.positions"] for name, bucket in buckets.items()},
    )


def group_by_bucket(captions: CaptionSet) -> dict[tuple[int, int], list[int]]:
    """Map buckets to positions in the caption set, both rising."""
    groups = defaultdict(list)
    for position, picture in enumerate(captions.pictures):
        groups[picture.bucket].append(position)
    return dict(sorted(groups.items()))


def _pixels(image: Image.Image) -> Tensor:
    """Make (3, H, W) in -1..1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def _encode(vae: AutoencoderKL, pixels: Tensor, pictures: Sequence[CaptionedPicture]) -> Tensor:
    mean: Tensor = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mean
    finite = mean.isfinite().flatten(1).all(dim=1)
    if not finite.all():
        bad = [str(p.post_id) for p, fine in zip(pictures, finite.tolist(), strict=True) if not fine]
        raise BadInput(f"The VAE gives values that are not finite for post {', '.join(bad)}.\nEncode in fp32 or bf16.")
    return mean * float(vae.config.scaling_factor)
