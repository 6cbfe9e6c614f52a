"""Pictures, prompts and scorers that are not as they should be: told by name, counted, never scored 0."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ambergrade.errors import BadInput
from ambergrade.nouns import Picture, Prompt, PromptSet
from ambergrade.pictures import read_rgb
from ambergrade.score.adherence import per_tag, rating_confusion
from ambergrade.score.comparison import aggregates, differences, remarks, winners
from ambergrade.score.features import feature_source
from ambergrade.score.metrics.clip_score import ClipScore
from ambergrade.score.metrics.tag_adherence import TagAdherence
from ambergrade.score.scoring import Metric, load_metric, score
from ambergrade.score.sheet import ScoreSheet

NOTHING = np.empty((0, 0, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def metrics(folders: Any) -> list[Metric]:
    real = {
        "extractor": str(folders.features),
        "reference": str(folders.reference),
        "pictures": str(folders.pictures),
    }
    return [
        load_metric("clip_score", model=str(folders.clip)),
        load_metric("tag_adherence", tagger=str(folders.tagger)),
        load_metric("fid", **real, few=True),
        load_metric("mind", **real),
    ]


@pytest.fixture(scope="module")
def many(prompts: PromptSet) -> list[Picture]:
    """204 pictures, 17 of each prompt: one faulty one is less than 0.5 %."""
    rng = np.random.default_rng(7)
    return [
        Picture(prompt.id, seed, rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        for prompt in prompts.prompts
        for seed in range(17)
    ]


def broken(pictures: list[Picture], *places: int) -> list[Picture]:
    found = list(pictures)
    for place in places:
        found[place] = dataclasses.replace(found[place], pixels=NOTHING, fault="NaN")
    return found


def test_a_faulty_picture_is_counted_by_name_and_in_no_number(
    metrics: list[Metric], prompts: PromptSet, many: list[Picture], tmp_path: Path
) -> None:
    sheet = score(broken(many, 20), prompts, metrics)
    without = score([picture for k, picture in enumerate(many) if k != 20], prompts, metrics)
    assert sheet.n == 204
    assert sheet.faults == {"p01 3": "NaN"}
    row = list(zip(sheet.prompt_ids, sheet.seeds, strict=True)).index(("p01", 3))
    assert all(np.isnan(values[row]).all() for values in (*sheet.columns.values(), *sheet.features.values()))
    assert any(line.startswith("1 of 204 pictures are faulty and in no number: p01 3 (NaN)") for line in remarks(sheet))
    sheet.write(tmp_path / "sheet.parquet")
    back = ScoreSheet.read(tmp_path / "sheet.parquet")
    assert back.digest == sheet.digest
    found, expected = aggregates(back), aggregates(without)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        theirs = dataclasses.astuple(expected[name])
        assert dataclasses.astuple(value) == pytest.approx(theirs, rel=1e-4, abs=1e-4, nan_ok=True), name
    assert [row["pictures"] for row in per_tag(back)] == [row["pictures"] for row in per_tag(without)]
    table = rating_confusion(back)
    assert table is not None
    assert table.sum() == 203


def test_a_pair_is_left_out_where_either_picture_is_faulty(
    metrics: list[Metric], prompts: PromptSet, many: list[Picture]
) -> None:
    darker = [dataclasses.replace(picture, pixels=picture.pixels // 2) for picture in many]
    sheet, baseline = score(broken(darker, 20), prompts, metrics), score(broken(many, 100), prompts, metrics)
    rest = [k for k in range(204) if k not in (20, 100)]
    expected = differences(
        score([darker[k] for k in rest], prompts, metrics), score([many[k] for k in rest], prompts, metrics)
    )
    found = differences(sheet, baseline)
    for name in ("tag_prob", "clip_score", "fid", "mind", "tag_macro_recall"):
        assert found[name].value == pytest.approx(expected[name].value, rel=1e-4, abs=1e-6), name
        assert found[name].p == pytest.approx(expected[name].p, abs=0.02), name
    assert winners({"a": sheet, "b": baseline}, "tag_prob").behind.keys() == {"a", "b"}


def test_more_than_a_few_faulty_pictures_fail_with_all_their_names(
    metrics: list[Metric], prompts: PromptSet, many: list[Picture]
) -> None:
    with pytest.raises(BadInput, match=r"2 of 204 pictures are faulty") as caught:
        score(broken(many, 20, 100), prompts, metrics[:1])
    assert "p01, seed 3: NaN" in str(caught.value)
    assert "p05, seed 15: NaN" in str(caught.value)
    with pytest.raises(BadInput, match=r"(?s)204 of 204 .*… and 192 more"):
        score(broken(many, *range(204)), prompts, metrics[:1])


def test_a_picture_of_one_colour_is_scored_and_told(metrics: list[Metric], prompts: PromptSet) -> None:
    """A black picture is what a half-precision autoencoder leaves of NaN; dropping it would flatter (facts 5.21)."""
    black = np.zeros((32, 32, 3), dtype=np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    shown = [Picture(p.id, 0, black if p.id == "p03" else noise) for p in prompts.prompts]
    sheet = score(shown, prompts, metrics[:2])
    assert sheet.blank == ("p03 0",)
    assert not np.isnan(sheet.columns["tag_prob"]).any()
    assert any("1 of 12 pictures have one single colour" in line and "p03 0" in line for line in remarks(sheet))


def test_a_scorer_that_raises_ends_the_scoring_and_is_named(prompts: PromptSet, many: list[Picture]) -> None:
    class Failing(Metric):
        name = "failing"
        columns = MappingProxyType({"failing": True})
        fingerprint = MappingProxyType({"weights": ""})

        def rows(self, pictures: Any, prompts: Any) -> Any:
            raise ZeroDivisionError("no such thing")

    with pytest.raises(ZeroDivisionError) as caught:
        score(many, prompts, [Failing()])
    assert "Raised by the metric failing on the pictures [('p00', 0)" in "".join(caught.value.__notes__)


def test_every_kind_of_picture_file_is_scored_by_every_metric(metrics: list[Metric], tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    grey = rng.integers(0, 256, (40, 30), dtype=np.uint8)
    made = {
        "grey": Image.fromarray(grey),
        "deep": Image.fromarray(grey.astype(np.uint16) * 257),
        "alpha": Image.fromarray(rng.integers(0, 256, (32, 32, 4), dtype=np.uint8), "RGBA"),
        "palette": Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).quantize(16),
        "wide": Image.fromarray(rng.integers(0, 256, (9, 300, 3), dtype=np.uint8)),
        "dot": Image.fromarray(rng.integers(0, 256, (1, 2, 3), dtype=np.uint8)),
    }
    shown = []
    for name, image in made.items():
        image.save(tmp_path / f"{name}.png")
        shown.append(Picture(name, 0, read_rgb(tmp_path / f"{name}.png")))
    np.testing.assert_array_equal(shown[0].pixels, shown[1].pixels)  # 16 bits of the same greys
    asked = PromptSet("kinds", tuple(Prompt(name, "1girl", 0, tags=("1girl",)) for name in made))
    sheet = score(shown, asked, metrics)
    for name in ("clip_score", "tag_prob"):
        assert np.isfinite(sheet.columns[name]).all()
    assert np.isfinite(aggregates(sheet)["mind"].value)


def test_prompts_of_nothing_and_of_5000_tags(metrics: list[Metric], folders: Any) -> None:
    names = [f"tag {k}" for k in range(4998)]
    endless = ", ".join(["1girl", "red hair", *names])
    tags = ("1girl", "red_hair", *(name.replace(" ", "_") for name in names))
    asked = PromptSet("ends", (Prompt("none", "", 0), Prompt("all", endless, 0, tags=tags)))
    noise = np.random.default_rng(2).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    shown = [Picture("none", 0, noise), Picture("all", 0, noise)]
    sheet = score(shown, asked, metrics[:2])
    assert np.isnan(sheet.columns["clip_score"]).tolist() == [True, False]  # nothing was asked for
    assert sheet.columns["clip_tokens_lost"].tolist() == [0, 0]  # read in parts
    assert np.isnan(sheet.columns["tag_prob"][0])
    assert sheet.columns["tag_scorable"][1] == 2 / 5000
    assert any("0% of asked tags are scorable" in line for line in remarks(sheet))
    head = score(shown, asked, [ClipScore(str(folders.clip), long="head")])
    assert head.columns["clip_truncated"].tolist() == [0, 1]
    assert head.columns["clip_tokens_lost"][1] > 5000
    assert "cut to fit" in " ".join(remarks(head))


def test_weights_with_nan_are_told_and_not_scored_zero(folders: Any, tmp_path: Path) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for name, file in (("tagger", "model"), ("features", "model"), ("clip", "open_clip_model")):
        shutil.copytree(getattr(folders, name), tmp_path / name)
        path = tmp_path / name / f"{file}.safetensors"
        state = load_file(path)
        key = next(key for key in state if key in ("fc.bias", "conv1.0.weight", "visual.proj"))
        save_file({**state, key: torch.full_like(state[key], float("nan"))}, path)
    asked = {"a": Prompt("a", "1girl", 0, tags=("1girl",))}
    with pytest.raises(BadInput, match="gives NaN"):
        TagAdherence(str(tmp_path / "tagger")).rows([Picture("a", 0, noise)], asked)
    with pytest.raises(BadInput, match="gives NaN"):
        ClipScore(str(tmp_path / "clip")).rows([Picture("a", 0, noise)], asked)
    with pytest.raises(BadInput, match="NaN"):
        feature_source(str(tmp_path / "features"))([noise])
