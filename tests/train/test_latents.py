"""The latent cache: the right pixels of the right files, the posterior's mean, the same bytes every time."""

import hashlib
import io

import numpy as np
import pytest
import torch
from PIL import Image

from ambergrade.errors import BadInput
from ambergrade.nouns import Caption, CaptionedPicture, CaptionSet
from ambergrade.train.latents import PictureReader, cache_latents, read_latents


def captioned(number, bucket, crop=(0, 0)):
    name = f"{number}.png"
    sha256 = hashlib.sha256(read(name)).hexdigest()
    return CaptionedPicture(number, name, sha256, Caption(("1girl",), ()), (128, 96), bucket, crop)


def read(name):
    """The bytes of a 128 x 96 picture of the file's own."""
    draw, file = np.random.default_rng(int(name.split(".")[0])), io.BytesIO()
    Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((128, 96)).save(file, "png")
    return file.getvalue()


def decode(data, name):
    return Image.open(io.BytesIO(data)).convert("RGB")


PICTURES = PictureReader(read, decode)


CAPTIONS = CaptionSet(
    (captioned(0, (64, 64), (10, 0)), captioned(1, (96, 64)), captioned(2, (64, 64)), captioned(3, (64, 64), (21, 0))),
    "test",
)


@pytest.fixture(scope="module")
def cached(live_networks, tmp_path_factory):
    path = tmp_path_factory.mktemp("latents") / "latents.safetensors"
    cache_latents(live_networks.vae, CAPTIONS, PICTURES, path, batch=2)
    return path


def test_a_latent_is_the_scaled_mean_of_the_cropped_picture(cached, live_networks):
    latents = read_latents(cached)
    assert {bucket: tuple(x.shape) for bucket, x in latents.by_bucket.items()} == {
        (64, 64): (3, 4, 8, 8),
        (96, 64): (1, 4, 8, 12),
    }
    assert latents.positions[64, 64].tolist() == [0, 2, 3]
    # By hand: 128 x 96 covers 64 x 64 at 85 x 64; 10 px are cut from the left.
    pixels = np.asarray(decode(read("0.png"), "").resize((85, 64), Image.Resampling.LANCZOS))[:, 10:74].astype(
        np.float32
    )
    with torch.no_grad():
        sent = torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)[None]
        expected = live_networks.vae.encode(sent).latent_dist.mode() * 0.13025
    torch.testing.assert_close(latents.rows((64, 64), [0]), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(latents.rows((64, 64), [2, 0])[1], latents.rows((64, 64), [0])[0])


def test_the_file_is_the_same_bytes_again(cached, live_networks, tmp_path):
    cache_latents(live_networks.vae, CAPTIONS, PICTURES, tmp_path / "again", batch=2)
    assert (tmp_path / "again").read_bytes() == cached.read_bytes()


def test_half_precision_halves_the_file(cached, live_networks, tmp_path):
    cache_latents(live_networks.vae, CAPTIONS, PICTURES, tmp_path / "half", dtype=torch.float16)
    half = read_latents(tmp_path / "half")
    assert half.by_bucket[64, 64].dtype == torch.float16
    torch.testing.assert_close(half.rows((64, 64), [1]), read_latents(cached).rows((64, 64), [1]), atol=2e-3, rtol=2e-3)


def test_latents_that_are_not_finite_name_the_post(live_networks, tmp_path):
    class Overflowing:
        device, dtype, config = torch.device("cpu"), torch.float32, live_networks.vae.config

        def encode(self, pixels):
            posterior = live_networks.vae.encode(pixels)
            posterior.latent_dist.mean[1] = float("nan")
            return posterior

    with pytest.raises(BadInput, match="post 2"):
        cache_latents(Overflowing(), CAPTIONS, PICTURES, tmp_path / "x", batch=2)


@pytest.mark.parametrize("other", [b"", b"cut", "1.png"])
def test_no_latent_is_made_of_a_file_that_is_not_the_caption_set_s(live_networks, tmp_path, other):
    changed = PictureReader(
        lambda name: read(name) if name != "2.png" else read(other) if other == "1.png" else other, decode
    )
    with pytest.raises(BadInput, match=r"Post 2 \(2\.png\) is another file than the caption set was made of"):
        cache_latents(live_networks.vae, CAPTIONS, changed, tmp_path / "x")
    assert not (tmp_path / "x").exists()
