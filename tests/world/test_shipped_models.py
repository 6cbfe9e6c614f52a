"""The shipped weights do what docs/models.md says, on scenes that nothing was trained on."""

import csv
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from ambergrade.score.metrics.tag_adherence import TagAdherence
from ambergrade.store import BUILTIN
from ambergrade.world import corpus, grammar, scorers

FIRST = 50_000


@pytest.fixture(scope="module")
def held_out() -> tuple[list[grammar.Scene], np.ndarray]:
    scenes = corpus.scenes(0, FIRST, 500)
    return scenes, corpus.pictures(scenes)


def test_tagger_reaches_its_mean_average_precision(held_out: tuple[list[grammar.Scene], np.ndarray]) -> None:
    scenes, pictures = held_out
    found = TagAdherence("builtin://tagger").probabilities(list(pictures))
    truth = np.stack([scorers.labels(scene) for scene in scenes])
    seen = np.flatnonzero(truth.any(axis=0))
    assert np.mean([average_precision_score(truth[:, i], found[:, i]) for i in seen]) >= 0.98


def test_clip_finds_the_picture_of_its_caption(held_out: tuple[list[grammar.Scene], np.ndarray]) -> None:
    """Chance is 0.002."""
    import open_clip

    scenes, pictures = held_out
    folder = BUILTIN / "clip"
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", require_pretrained=True)
    captions = [", ".join(scorers.clip_words(scene)) for scene in scenes]
    assert scorers.retrieval_at_1(model.eval(), folder, pictures, captions) >= 0.90


def test_tagger_rates_are_recorded_for_every_general_tag() -> None:
    with (BUILTIN / "tagger" / "rates.csv").open() as file:
        rates = {row["tag"]: row for row in csv.DictReader(file)}
    assert set(grammar.VISIBLE) <= rates.keys()
    assert all(0 <= float(row["fpr"]) <= float(row["tpr"]) <= 1 for row in rates.values())


def test_weights_are_safetensors_only() -> None:
    assert not [path for path in Path(BUILTIN).rglob("*") if path.suffix in {".bin", ".pt", ".ckpt", ".npz"}]
