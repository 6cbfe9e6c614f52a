"""The latent store: half precision means by content, filled once, resumed, checked, never stale."""

import hashlib
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from ambergrade.errors import BadInput, BadSetting, MissingObject
from ambergrade.nouns import Caption, CaptionedPicture, CaptionSet
from ambergrade.train import latent_store
from ambergrade.train.latent_store import LatentStore, latent_bytes
from ambergrade.train.latents import PictureReader, cache_latents, read_latents

VAE = "a" * 64


def captioned(number, bucket, crop=(0, 0)):
    name = f"{number}.png"
    sha256 = hashlib.sha256(read(name)).hexdigest()
    return CaptionedPicture(number, name, sha256, Caption((), ()), (128, 96), bucket, crop)


def read(name):
    draw, file = np.random.default_rng(int(name.split(".")[0])), io.BytesIO()
    Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((128, 96)).save(file, "png")
    return file.getvalue()


def decode(data, name):
    return Image.open(io.BytesIO(data)).convert("RGB")


PICTURES = PictureReader(read, decode)


CAPTIONS = CaptionSet((*(captioned(n, (64, 64), (n, 0)) for n in range(5)), captioned(5, (96, 64))), "test")


def fill(store, vae, captions=CAPTIONS, pictures=PICTURES, **options):
    return store.fill(vae, captions, pictures, batch=2, tell=lambda line: None, **options)


def test_latents_are_those_of_the_plain_cache_in_half_precision(live_networks, tmp_path):
    store = LatentStore(tmp_path, VAE)
    assert fill(store, live_networks.vae) == 6
    stored = store.open(CAPTIONS)
    cache_latents(live_networks.vae, CAPTIONS, PICTURES, tmp_path / "plain", batch=2)
    plain = read_latents(tmp_path / "plain")
    for bucket, positions in plain.positions.items():
        assert torch.equal(stored.positions[bucket], positions)
        rows = list(range(len(positions)))[::-1]
        torch.testing.assert_close(stored.rows(bucket, rows), plain.rows(bucket, rows), atol=2e-3, rtol=2e-3)
    kept = sum(latent_bytes(picture) for picture in CAPTIONS.pictures)
    assert kept < sum(p.stat().st_size for p in store.folder.iterdir()) < kept + 4000
    assert latent_bytes(captioned(0, (1024, 1024))) == 131_072


def test_only_what_is_new_is_encoded_and_nothing_stale_is_met(live_networks, tmp_path):
    store = LatentStore(tmp_path, VAE)
    assert fill(store, live_networks.vae, CaptionSet(CAPTIONS.pictures[:3], "test")) == 3
    first = store.open(CaptionSet(CAPTIONS.pictures[:3], "test")).rows((64, 64), [0, 1, 2])
    assert fill(store, live_networks.vae) == 3
    assert fill(store, live_networks.vae) == 0
    assert torch.equal(store.open(CAPTIONS).rows((64, 64), [0, 1, 2]), first)
    for changed in ({"sha256": "9" * 64}, {"crop": (9, 0)}, {"bucket": (96, 64)}):
        other = CaptionSet((replace(CAPTIONS.pictures[0], **changed),), "test")
        with pytest.raises(MissingObject, match="1 of 1 pictures have no latent"):
            store.open(other)
    assert LatentStore(tmp_path, "b" * 64).missing(CAPTIONS) == [0, 1, 2, 3, 4, 5]
    renamed = replace(CAPTIONS.pictures[0], file_name="moved.png", caption=Caption(("other",), ()))
    assert not store.missing(CaptionSet((renamed,), "test"))  # the same pixels


def test_a_kill_costs_at_most_a_shard(live_networks, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_store, "SHARD", 1)  # every pass is a shard
    store, opened = LatentStore(tmp_path, VAE), []

    def dies(name):
        opened.append(name)
        if len(opened) > 4:
            raise KeyboardInterrupt
        return read(name)

    with pytest.raises(KeyboardInterrupt):
        fill(store, live_networks.vae, pictures=PictureReader(dies, decode), readers=1)
    assert len(store.missing(CAPTIONS)) == 2
    assert fill(store, live_networks.vae) == 2
    whole = LatentStore(tmp_path / "other", VAE)
    fill(whole, live_networks.vae)
    for bucket, positions in whole.open(CAPTIONS).positions.items():
        rows = list(range(len(positions)))
        assert torch.equal(store.open(CAPTIONS).rows(bucket, rows), whole.open(CAPTIONS).rows(bucket, rows))


def test_verify_finds_damage_and_changed_files(live_networks, tmp_path):
    store = LatentStore(tmp_path, VAE)
    fill(store, live_networks.vae)
    assert store.verify(live_networks.vae, CAPTIONS, PICTURES, count=6) == []

    def darker(data, name):  # as another version of a decoder might be
        picture = decode(data, name)
        return picture.point(lambda value: value // 2) if data == read("3.png") else picture

    (complaint,) = store.verify(live_networks.vae, CAPTIONS, PictureReader(read, darker), count=6)
    assert complaint.startswith("post 3 (3.png)")
    shard = next(store.folder.iterdir())
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (complaint,) = store.verify()
    assert shard.name in complaint


def test_a_damaged_latent_is_told_when_it_is_read_and_made_again(live_networks, tmp_path):
    store = LatentStore(tmp_path, VAE)
    fill(store, live_networks.vae)
    stored = store.open(CAPTIONS)
    shard = next(store.folder.iterdir())
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    told = []
    for bucket, positions in stored.positions.items():
        for row in range(len(positions)):
            try:
                stored.rows(bucket, [row])
            except BadInput as error:
                told.append(str(error))
    (complaint,) = told  # one bit is one latent's
    assert f"{shard} is damaged" in complaint
    assert "Remove that file and run the same command again" in complaint
    shard.write_bytes(whole[:-100])
    with pytest.raises(BadInput, match="not a whole shard of latents"):
        store.missing(CAPTIONS)
    shard.unlink()
    assert fill(store, live_networks.vae) == 6
    assert store.open(CAPTIONS).digest == stored.digest


def test_the_digest_names_the_latents_bytes(live_networks, tmp_path):
    """In the order of the caption set, however they came to lie in shards."""
    store, other = (LatentStore(tmp_path / name, VAE) for name in "ab")
    fill(store, live_networks.vae)
    for end in (3, 6):
        fill(other, live_networks.vae, CaptionSet(CAPTIONS.pictures[:end], "test"))
    stored = store.open(CAPTIONS)
    assert other.open(CAPTIONS).digest == stored.digest
    by_position = {}
    for bucket, positions in stored.positions.items():
        for row, position in enumerate(positions.tolist()):
            by_position[position] = stored.rows(bucket, [row]).half().numpy().tobytes()
    hashes = b"".join(hashlib.sha256(by_position[position]).digest() for position in sorted(by_position))
    assert stored.digest == hashlib.sha256(hashes).hexdigest()
    assert store.open(CaptionSet(CAPTIONS.pictures[::-1], "test")).digest != stored.digest


def test_latents_are_made_of_the_caption_set_s_files_only(live_networks, tmp_path):
    store = LatentStore(tmp_path, VAE)
    edited = PictureReader(lambda name: read("77.png" if name == "4.png" else name), decode)
    with pytest.raises(BadInput, match=r"Post 4 \(4\.png\) is another file"):
        fill(store, live_networks.vae, pictures=edited)
    assert fill(store, live_networks.vae) == 6


def test_gb_and_hours_are_told_and_a_small_disk_is_refused_before_it_starts(live_networks, tmp_path, monkeypatch):
    told = []
    LatentStore(tmp_path, VAE).fill(live_networks.vae, CAPTIONS, PICTURES, batch=2, tell=told.append)
    assert "6 pictures to encode (0 are there)" in told[0]
    assert "3.3 KB" in told[0]  # (5 x 8 x 8 + 12 x 8) x 4 channels x 2 bytes
    assert "s (by the pace" in told[1]
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(latent_store.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BadSetting, match="do not fit"):
        fill(LatentStore(tmp_path, "c" * 64), live_networks.vae)


def test_a_disk_that_fills_up_is_told_and_what_was_written_stays(live_networks, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_store, "SHARD", 1)
    store, real, written = LatentStore(tmp_path, VAE), latent_store.write_tensors, []

    def full(path, tensors, about):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        return real(path, tensors, about)

    monkeypatch.setattr(latent_store, "write_tensors", full)
    with pytest.raises(MissingObject, match="No space left on device"):
        fill(store, live_networks.vae)
    assert [path.suffix for path in store.folder.iterdir()] == [".safetensors"]
    assert len(store.missing(CAPTIONS)) == 4
    assert store.verify() == []


def test_a_picture_that_changed_its_shape_names_the_post(live_networks, tmp_path):
    with pytest.raises(BadInput, match="Post 4"):
        fill(
            LatentStore(tmp_path, VAE),
            live_networks.vae,
            pictures=PictureReader(
                read, lambda data, name: Image.new("RGB", (64, 64)) if name == "4.png" else decode(data, name)
            ),
        )
