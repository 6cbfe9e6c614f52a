"""Trap 15, a tagger that likes what it taught: a second tagger's word beside it; Cohen's kappa against sklearn's."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import cohen_kappa_score

from ambergrade.errors import BadSetting
from ambergrade.nouns import Picture, Prompt, PromptSet
from ambergrade.score.comparison import aggregates, differences, remarks
from ambergrade.score.metrics.tag_adherence import TagAdherence
from ambergrade.score.metrics.tagger_agreement import TaggerAgreement
from ambergrade.score.scoring import score
from ambergrade.score.tagger import TimmTagger

MAKE = runpy.run_path(str(Path(__file__).with_name("tiny_scorers.py")))
PROMPTS = PromptSet(
    "thirty",
    tuple(Prompt(f"p{k}", "", k, tags=("1girl", "red_hair"), unwanted=("blue_hair",)) for k in range(30)),
)


class Reads(torch.nn.Module):
    """Says of tag t what the pixel in column t says; `blind` tags are always seen."""

    def __init__(self, blind: tuple[int, ...] = (), row: int = 0) -> None:
        super().__init__()
        self.blind, self.row = blind, row

    def forward(self, bgr: torch.Tensor) -> torch.Tensor:
        logits = 4 * bgr[:, 0, self.row, :10]
        logits[:, list(self.blind)] = 4.0
        return logits


def metric(folders: Any, tmp_path: Path, first: torch.nn.Module, second: torch.nn.Module) -> TaggerAgreement:
    made = TaggerAgreement(str(folders.tagger), str(MAKE["make_tagger"](tmp_path / "second", seed=3)))
    for tagger, network in zip(made._taggers, (first, second), strict=True):
        assert isinstance(tagger.backend, TimmTagger)
        tagger.backend.folder = dataclasses.replace(tagger.backend.folder, network=network)
    return made


def pictures(seed: int) -> list[Picture]:
    """Random answers for both taggers: the first reads row 0, the second row 1, three of four times the same."""
    rng = np.random.default_rng(seed)
    shown = []
    for prompt in PROMPTS.prompts:
        pixels = rng.integers(0, 2, (32, 32, 3)).astype(np.uint8) * 255
        same = rng.random(32) < 0.75
        pixels[1, same] = pixels[0, same]
        shown.append(Picture(prompt.id, prompt.seed, pixels))
    return shown


def test_agreement_and_kappa_are_sklearns(folders: Any, tmp_path: Path) -> None:
    shown = pictures(0)
    agreement = metric(folders, tmp_path, Reads(), Reads(row=1))
    sheet = score(shown, PROMPTS, [agreement])
    judged = [4, 5, 7]  # 1girl, red_hair, blue_hair of tiny_scorers.TAGS
    one, other = (np.stack([picture.pixels[row, judged, 2] > 0 for picture in shown]) for row in (0, 1))
    np.testing.assert_allclose(sheet.columns["tagger_agreement"], (one == other).mean(1))
    np.testing.assert_allclose(sheet.columns["second_tag_recall"], other[:, :2].mean(1))
    seen = 1 / (1 + np.exp(-4 * np.where(other[:, :2], 1.0, -1.0)))
    np.testing.assert_allclose(sheet.columns["second_tag_prob"], seen.mean(1), rtol=1e-5)
    found = aggregates(sheet)["tagger_kappa"]
    assert found.value == pytest.approx(cohen_kappa_score(one.ravel(), other.ravel()))
    assert found.low < found.value < found.high
    assert found.n == 30
    again = score(pictures(1), PROMPTS, [agreement])
    moved = differences(again, sheet)["tagger_kappa"]
    assert moved.value == pytest.approx(aggregates(again)["tagger_kappa"].value - found.value)


def test_a_model_that_learned_one_taggers_error_is_better_by_that_tagger_alone(folders: Any, tmp_path: Path) -> None:
    """The first tagger sees red hair everywhere; pictures that never show it please it and not the second."""
    blank = np.full((32, 32, 3), 255, dtype=np.uint8)
    blank[:, 5] = 0  # no red hair
    shown = [Picture(prompt.id, prompt.seed, blank) for prompt in PROMPTS.prompts]
    agreement = metric(folders, tmp_path, Reads(blind=(5,)), Reads())
    adherence = TagAdherence(str(folders.tagger))
    backend = adherence._tagger.backend
    assert isinstance(backend, TimmTagger)
    backend.folder = dataclasses.replace(backend.folder, network=Reads(blind=(5,)))
    sheet = score(shown, PROMPTS, [adherence, agreement])
    assert sheet.columns["tag_recall"].mean() == 1
    assert sheet.columns["second_tag_recall"].mean() == 0.5
    assert sheet.columns["tagger_agreement"].mean() == pytest.approx(2 / 3)


def test_a_tagger_does_not_second_itself(folders: Any, tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="first one's weights"):
        TaggerAgreement(str(folders.tagger), str(folders.tagger))
    strangers = MAKE["make_tagger"](tmp_path / "strangers", [("moon", 0)], seed=2)
    with pytest.raises(BadSetting, match="no tag in common"):
        TaggerAgreement(str(folders.tagger), str(strangers))


def test_taggers_that_never_differ_have_no_kappa_and_say_so(folders: Any, tmp_path: Path) -> None:
    everything = tuple(range(10))
    sheet = score(pictures(0), PROMPTS, [metric(folders, tmp_path, Reads(everything), Reads(everything))])
    assert np.isnan(aggregates(sheet)["tagger_kappa"].value)
    assert any("tagger_kappa" in line for line in remarks(sheet))
