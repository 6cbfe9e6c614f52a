"""Tag adherence: WD v3 preprocessing by hand, a planted tagger, sklearn's recall."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import recall_score
from timm.data import create_transform, resolve_data_config

from ambergrade.errors import BadInput, BadSetting, MissingObject
from ambergrade.nouns import Picture, Prompt, PromptSet
from ambergrade.score.metrics.tag_adherence import TagAdherence, per_tag
from ambergrade.score.scoring import score

COLOURS = {"red_hair": (255, 0, 0), "green_hair": (0, 255, 0), "blue_hair": (0, 0, 255)}


class Planted(torch.nn.Module):
    """A linear tagger on the mean colour: p(colour) is .98 where it fills the picture, .12 where it is absent."""

    def forward(self, bgr: torch.Tensor) -> torch.Tensor:
        rgb = bgr.flip(1).mean(dim=(2, 3))  # each -1 to 1
        logits = torch.zeros(len(bgr), 10)
        logits[:, 4] = 3.0  # 1girl
        logits[:, 5:8] = 3.0 * rgb + 1.0
        logits[:, 8:] = -3.0
        return logits


@pytest.fixture(scope="module")
def planted(folders: Any) -> TagAdherence:
    metric = TagAdherence(str(folders.tagger), groups={"warm": ["red_hair"], "faces": [">_<"]})
    metric._folder = dataclasses.replace(metric._folder, network=Planted())
    return metric


def flat(prompt: Prompt, colour: str, seed: int = 0) -> Picture:
    return Picture(prompt.id, seed, np.full((32, 32, 3), COLOURS[colour], dtype=np.uint8))


def drawn_right(prompts: PromptSet) -> list[Picture]:
    return [flat(prompt, prompt.tags[1]) for prompt in prompts.prompts]


def p(logit: float) -> float:
    return float(1 / (1 + np.exp(-logit)))


def test_preparation_pads_with_white_and_swaps_to_bgr(folders: Any) -> None:
    metric = TagAdherence(str(folders.tagger))
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, :, 0], pixels[:, :, 1] = 255, 51  # R, G; 32 wide is the input size, so nothing is resized
    found = metric.prepare(pixels)
    assert found.shape == (3, 32, 32)
    np.testing.assert_array_equal(found[:, :8], 1.0)  # white: (1 - .5)/.5
    np.testing.assert_array_equal(found[:, 24:], 1.0)
    np.testing.assert_allclose(found[:, 8:24], np.broadcast_to([[[-1.0]], [[-0.6]], [[1.0]]], (3, 16, 32)), atol=1e-6)


@pytest.mark.parametrize("size", [(50, 40), (20, 64), (32, 32), (9, 9)])
def test_probabilities_are_those_of_the_stock_timm_recipe(folders: Any, size: tuple[int, int]) -> None:
    """wdv3-timm: pad to a white square, timm's eval transform, RGB to BGR, sigmoid outside."""
    model = timm.create_model(f"local-dir:{folders.tagger}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model.pretrained_cfg, model=model))
    pixels = np.random.default_rng(0).integers(0, 256, size=(*size, 3), dtype=np.uint8)
    side = max(size)
    canvas = Image.new("RGB", (side, side), (255, 255, 255))
    canvas.paste(Image.fromarray(pixels), ((side - size[1]) // 2, (side - size[0]) // 2))
    expected = torch.sigmoid(model(transform(canvas)[None][:, [2, 1, 0]]))[0].detach().numpy()
    found = TagAdherence(str(folders.tagger)).probabilities([pixels])[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert expected.std() > 0.05  # the random tagger does not answer one number


def test_columns_of_a_right_picture_by_hand(planted: TagAdherence, prompts: PromptSet) -> None:
    sheet = score(drawn_right(prompts), prompts, [planted])
    there, absent = p(4.0), p(-2.0)
    np.testing.assert_allclose(sheet.columns["tag_recall"], 1.0)
    np.testing.assert_allclose(sheet.columns["tag_prob"], (p(3.0) + there) / 2, rtol=1e-6)
    np.testing.assert_allclose(sheet.columns["tag_leak"], absent, rtol=1e-6)
    np.testing.assert_allclose(sheet.columns["tag_balance"], ((p(3.0) + there) / 2 + 1 - absent) / 2, rtol=1e-6)
    np.testing.assert_allclose(sheet.columns["tag_scorable"], 2 / 3)  # masterpiece is no tag of the tagger's
    warm = [there if "red_hair" in prompt.tags else np.nan for prompt in prompts.prompts]
    np.testing.assert_allclose(sheet.columns["tag_prob_warm"], warm, rtol=1e-6)
    assert np.isnan(sheet.columns["tag_prob_faces"]).all()


def test_one_wrong_tag_lowers_that_picture_and_no_other(planted: TagAdherence, prompts: PromptSet) -> None:
    right = drawn_right(prompts)
    wrong = [flat(prompts.prompts[0], prompts.prompts[0].unwanted[0]), *right[1:]]
    before, after = score(right, prompts, [planted]), score(wrong, prompts, [planted])
    for column, sign in [("tag_recall", -1), ("tag_prob", -1), ("tag_balance", -1), ("tag_leak", 1)]:
        moved = after.columns[column] - before.columns[column]
        assert sign * moved[0] > 0.2, column
        np.testing.assert_allclose(moved[1:], 0, atol=1e-7)
    macro = [TagAdherence.aggregates(sheet, seed=0)["tag_macro_recall"].value for sheet in (before, after)]
    assert macro == [1.0, pytest.approx((1 + 0.75 + 1 + 1) / 4)]  # red is asked 4 times and now missed once


def test_nothing_asked_is_not_a_number_and_never_zero(planted: TagAdherence) -> None:
    prompts = PromptSet("odd", (Prompt("a", "?", 0, tags=("masterpiece",)), Prompt("b", "", 0)))
    sheet = score([flat(prompt, "red_hair") for prompt in prompts.prompts], prompts, [planted])
    for column in ("tag_recall", "tag_prob", "tag_leak", "tag_balance"):
        assert np.isnan(sheet.columns[column]).all(), column
    np.testing.assert_array_equal(sheet.columns["tag_scorable"], [0.0, np.nan])
    assert "masterpiece" in TagAdherence.remarks(sheet)[0]


def test_ratings_are_not_tags(planted: TagAdherence) -> None:
    prompts = PromptSet("rating", (Prompt("a", "?", 0, tags=("general", "1girl")),))
    sheet = score([flat(prompts.prompts[0], "red_hair")], prompts, [planted])
    assert sheet.columns["tag_scorable"][0] == 0.5


def random_sheet(planted: TagAdherence, seed: int, right: float) -> tuple[Any, PromptSet]:
    """A hundred pictures that show the asked colour with probability `right`."""
    rng = np.random.default_rng(seed)
    names = list(COLOURS)
    asked = np.random.default_rng(99).choice(3, size=50, p=[0.7, 0.2, 0.1])  # unequal, so macro is not micro
    prompts = PromptSet("r", tuple(Prompt(f"p{k}", "?", k, tags=("1girl", names[c])) for k, c in enumerate(asked)))
    shown = [
        flat(prompt, prompt.tags[1] if rng.random() < right else names[rng.integers(3)], seed)
        for prompt in prompts.prompts
        for seed in (0, 1)
    ]
    return score(shown, prompts, [planted]), prompts


def test_macro_recall_is_sklearns(planted: TagAdherence) -> None:
    sheet, prompts = random_sheet(planted, 1, 0.5)
    tags = sheet.constants["tag_adherence"]["tags"]
    truth = np.array([[tag in prompts.by_id()[i].tags for tag in tags] for i in sheet.prompt_ids])
    # An unasked tag's answer does not enter recall; zeros stand for it.
    seen = np.nan_to_num(sheet.features["tag_adherence.asked"], nan=0.0) > 0.4
    found = TagAdherence.aggregates(sheet, seed=0)["tag_macro_recall"]
    assert found.value == pytest.approx(recall_score(truth, seen, average="macro"))
    assert found.value != pytest.approx(recall_score(truth, seen, average="micro"))
    assert found.low < found.value < found.high
    assert found.n == 50
    rows = {row["tag"]: row for row in per_tag(sheet)}
    for k, tag in enumerate(tags):
        assert rows[tag]["recall"] == pytest.approx(recall_score(truth[:, k], seen[:, k]))
        assert rows[tag]["low"] <= rows[tag]["recall"] <= rows[tag]["high"] + 1e-12
        assert rows[tag]["pictures"] == truth[:, k].sum()


def test_macro_recall_bootstrap_is_the_plain_one_over_prompts(planted: TagAdherence) -> None:
    """Against a loop that draws prompts with replacement and recomputes macro recall from the pictures."""
    sheet, _ = random_sheet(planted, 2, 0.5)
    asked = sheet.features["tag_adherence.asked"]
    ids, rng = np.array(sheet.prompt_ids), np.random.default_rng(0)
    unique, replicates = sorted(set(sheet.prompt_ids)), []
    for _ in range(1500):
        rows = np.concatenate([np.flatnonzero(ids == i) for i in rng.choice(unique, size=len(unique))])
        named = ~np.isnan(asked[rows])
        hits = (named & (asked[rows] > 0.4)).sum(0)[named.any(0)]
        replicates.append(np.mean(hits / named.sum(0)[named.any(0)]))
    low, high = np.percentile(replicates, [2.5, 97.5])
    found = TagAdherence.aggregates(sheet, seed=0)["tag_macro_recall"]
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)


def test_paired_macro_difference_sees_a_better_model_and_no_twin(planted: TagAdherence) -> None:
    bad, _ = random_sheet(planted, 3, 0.2)
    good, _ = random_sheet(planted, 4, 0.9)
    found = TagAdherence.differences(good, bad, seed=0)["tag_macro_recall"]
    assert found.verdict == "better"
    assert found.p < 0.01
    assert found.detectable == pytest.approx(2.8 * (found.high - found.low) / (2 * 1.96), rel=0.1)
    warm = TagAdherence.differences(good, bad, seed=0)["tag_macro_recall_warm"]
    assert warm.n < found.n
    twin = TagAdherence.differences(bad, bad, seed=0)["tag_macro_recall"]
    assert (twin.value, twin.p, twin.verdict) == (0.0, 1.0, "undecided")
    never_asked = TagAdherence.differences(good, bad, seed=0)["tag_macro_recall_faces"]
    assert np.isnan([never_asked.value, never_asked.low, never_asked.p]).all()
    assert (never_asked.n, never_asked.verdict) == (0, "undecided")


def test_thresholds_follow_the_category(folders: Any) -> None:
    metric = TagAdherence(str(folders.tagger))
    constants = metric.constants({"a": Prompt("a", "", 0, tags=("kohaku_(world)", "1girl"), unwanted=(">_<",))})
    assert constants["tags"] == ["1girl", ">_<", "kohaku_(world)"]
    assert constants["thresholds"] == [0.4, 0.4, 0.6]
    mine = TagAdherence(str(folders.tagger), thresholds={"general": 0.2, "character": 0.9})
    assert mine.fingerprint["thresholds"] == {"character": 0.9, "general": 0.2}


def broken(folder: Path, target: Path, change: str) -> str:
    shutil.copytree(folder, target)
    if change == "row":
        with (target / "selected_tags.csv").open("a") as file:
            file.write("99,extra,0,1\n")
    if change == "category":
        text = (target / "selected_tags.csv").read_text()
        (target / "selected_tags.csv").write_text(text.replace("1girl,0", "1girl,7"))
    if change == "thresholds":
        (target / "thresholds.json").unlink()
    if change == "character":
        (target / "thresholds.json").write_text(json.dumps({"general": 0.5}))
    if change == "pickle":
        (target / "model.safetensors").rename(target / "pytorch_model.bin")
    return str(target)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ("row", BadInput, "11 rows"),
        ("category", BadInput, "unknown categories 7"),
        ("thresholds", MissingObject, "lacks thresholds.json"),
        ("character", BadSetting, "Thresholds are needed"),
        ("pickle", MissingObject, "convert them to safetensors"),
    ],
)
def test_a_broken_tagger_folder_is_refused(
    folders: Any, tmp_path: Path, change: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        TagAdherence(broken(folders.tagger, tmp_path / change, change))


@pytest.mark.parametrize("tags", [["red_hare"], ["general"]])
def test_a_group_of_unknown_tags_is_refused(folders: Any, tags: Sequence[str]) -> None:
    with pytest.raises(BadSetting, match="does not know"):
        TagAdherence(str(folders.tagger), groups={"odd": tags})
