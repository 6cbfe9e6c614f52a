"""The autoencoder's training goes on where it was killed, and its measures tell what they say."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from ambergrade.world import autoencoder, corpus


@pytest.fixture(scope="module")
def pictures() -> corpus.Pixels:
    return corpus.pictures(corpus.scenes(3, 0, 8, undamaged=1.0))


def test_a_killed_training_goes_on_and_ends_in_the_same_weights(
    pictures: corpus.Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = autoencoder.train(pictures, state=tmp_path / "whole.pt", steps=6, batch=2, crop=16)
    clock = itertools.count(step=1000)  # seconds: the state is written after every step
    monkeypatch.setattr(autoencoder.time, "monotonic", lambda: next(clock))
    crops, left = autoencoder._crops, iter((True, True, True))

    def killed(*arguments: object) -> torch.Tensor:
        next(left)
        return crops(*arguments)

    monkeypatch.setattr(autoencoder, "_crops", killed)
    with pytest.raises(StopIteration):
        autoencoder.train(pictures, state=tmp_path / "part.pt", steps=6, batch=2, crop=16)
    monkeypatch.setattr(autoencoder, "_crops", crops)
    part = autoencoder.train(pictures, state=tmp_path / "part.pt", steps=6, batch=2, crop=16)
    for (name, one), other in zip(whole.state_dict().items(), part.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_the_decoder_alone_leaves_latents_as_they_are(pictures: corpus.Pixels, tmp_path: Path) -> None:
    start = autoencoder.train(pictures, state=tmp_path / "whole.pt", steps=1, batch=2, crop=16)
    shown = autoencoder.as_tensor(pictures[:2])
    with torch.inference_mode():
        before, drawn = start.encode(shown).latent_dist.mean, start.decode(torch.ones(1, 4, 2, 2)).sample
    after = autoencoder.train(
        pictures, state=tmp_path / "decoder.pt", steps=2, batch=2, crop=16, start=start, decoder_only=True
    )
    with torch.inference_mode():
        assert torch.equal(after.encode(shown).latent_dist.mean, before)
        assert not torch.equal(after.decode(torch.ones(1, 4, 2, 2)).sample, drawn)


def test_edges_kept_is_one_for_the_picture_itself_and_falls_with_contrast(pictures: corpus.Pixels) -> None:
    half = (pictures // 2).astype(np.uint8)
    assert autoencoder.edges_kept(pictures, pictures) == 1
    assert autoencoder.edges_kept(half, pictures) == pytest.approx(0.5, abs=0.03)
    assert autoencoder.edges_kept(np.full_like(pictures, 128), pictures) == 0
