"""Tag adherence: WD v3 preprocessing by hand, a planted tagger, sklearn's recall."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, recall_score, roc_auc_score
from timm.data import create_transform, resolve_data_config

from ambergrade.errors import BadInput, BadSetting, MissingObject
from ambergrade.nouns import Picture, Prompt, PromptSet
from ambergrade.score.adherence import rating_confusion
from ambergrade.score.metrics.tag_adherence import TagAdherence, per_tag
from ambergrade.score.scoring import score
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.tagger import OnnxTagger, Tagger, TimmTagger, prepare, rates_of, read_rates, write_rates
from ambergrade.score.tags import canonical_tags, rating_of

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
    backend = metric._tagger.backend
    assert isinstance(backend, TimmTagger)
    backend.folder = dataclasses.replace(backend.folder, network=Planted())
    return metric


def flat(prompt: Prompt, colour: str, seed: int = 0) -> Picture:
    return Picture(prompt.id, seed, np.full((32, 32, 3), COLOURS[colour], dtype=np.uint8))


def drawn_right(prompts: PromptSet) -> list[Picture]:
    return [flat(prompt, prompt.tags[1]) for prompt in prompts.prompts]


def p(logit: float) -> float:
    return float(1 / (1 + np.exp(-logit)))


def test_preparation_pads_with_white_and_swaps_to_bgr(folders: Any) -> None:
    backend = Tagger(str(folders.tagger)).backend
    assert isinstance(backend, TimmTagger)
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, :, 0], pixels[:, :, 1] = 255, 51  # R, G; 32 wide is the input size, so nothing is resized
    found = backend.prepare(pixels)
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
    found = Tagger(str(folders.tagger)).probabilities([pixels])[0]
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
    seen = sheet.features["tag_adherence.p"] > 0.4
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
    place = sheet.constants["tag_adherence"]["asked"]
    asked = sheet.features["tag_adherence.p"].copy()
    for row, prompt_id in enumerate(sheet.prompt_ids):
        asked[row, np.setdiff1d(np.arange(asked.shape[1]), place[prompt_id])] = np.nan
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
        ("character", BadSetting, "thresholds are needed"),
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


def sheet_of(p: np.ndarray, asked: np.ndarray, **more: Any) -> ScoreSheet:
    """A sheet of given probabilities (n, U) for one picture a prompt, all thresholds ½."""
    n, tags = p.shape
    ids = tuple(f"p{k}" for k in range(n))
    constants = {
        "tags": [f"t{k}" for k in range(tags)],
        "thresholds": [0.5] * tags,
        "categories": ["general"] * tags,
        "counts": [0] * tags,
        "groups": {},
        "rates": {},
        "asked": {key: np.flatnonzero(asked[k]).tolist() for k, key in enumerate(ids)},
        "rating": dict.fromkeys(ids, "general"),
        "unscorable": [],
        **more,
    }
    kept = {"tag_adherence.p": p.astype(np.float32)}
    return ScoreSheet(ids, (0,) * n, {}, kept, {}, {"tag_adherence": {}}, {"tag_adherence": constants}, {}, "")


def test_auroc_and_average_precision_are_sklearns_ties_included() -> None:
    rng = np.random.default_rng(0)
    asked = rng.random((60, 3)) < 0.4
    p = np.round(rng.normal(0.4 + 0.2 * asked, 0.2).clip(0, 1), 1)  # rounded: many ties
    sheet = sheet_of(p, asked)
    kept = sheet.features["tag_adherence.p"]
    for k, row in enumerate(per_tag(sheet)):
        assert row["auroc"] == pytest.approx(roc_auc_score(asked[:, k], kept[:, k]))
        assert row["ap"] == pytest.approx(average_precision_score(asked[:, k], kept[:, k]))
        assert row["prevalence"] == pytest.approx(asked[:, k].mean())
    expected = np.mean([roc_auc_score(asked[:, k], kept[:, k]) for k in range(3)])
    found = TagAdherence.aggregates(sheet, seed=0)["tag_auroc"]
    assert found.value == pytest.approx(expected)
    assert 0.5 < found.low < found.value < found.high < 1


def test_auroc_needs_ten_prompts_on_each_side_and_says_so() -> None:
    asked = np.zeros((30, 1), dtype=bool)
    asked[:9] = True
    sheet = sheet_of(np.full((30, 1), 0.7), asked)
    assert np.isnan(TagAdherence.aggregates(sheet, seed=0)["tag_auroc"].value)
    assert "tag_auroc" in TagAdherence.remarks(sheet)[0]
    asked[9] = True
    assert TagAdherence.aggregates(sheet_of(np.full((30, 1), 0.7), asked), seed=0)["tag_auroc"].value == 0.5


def test_lift_is_recall_less_that_of_permuted_prompts() -> None:
    """Against 400 real permutations: the floor in closed form is their mean."""
    rng = np.random.default_rng(1)
    asked = rng.random((40, 4)) < [0.9, 0.5, 0.3, 0.2]
    p = (rng.random((40, 4)) < np.where(asked, 0.8, 0.25)).astype(float)
    found = TagAdherence.aggregates(sheet_of(p, asked), seed=0)
    floors = []
    for _ in range(400):
        shuffled = asked[rng.permutation(40)]
        floors.append(np.mean([p[shuffled[:, k], k].mean() for k in range(4)]))
    recall = found["tag_macro_recall"].value
    assert found["tag_lift"].value == pytest.approx(recall - np.mean(floors), abs=0.01)
    blind = sheet_of(np.full((40, 4), 0.9), asked)  # sees everything everywhere: recall 1, lift 0
    assert TagAdherence.aggregates(blind, seed=0)["tag_macro_recall"].value == 1
    assert TagAdherence.aggregates(blind, seed=0)["tag_lift"].value == pytest.approx(0)


def test_rogan_gladen_gives_the_true_share_back_from_a_tagger_that_errs() -> None:
    """Known truth, known TPR and FPR: the corrected share's interval holds the truth, plain recall's does not."""
    rng = np.random.default_rng(2)
    n, truth, tpr, fpr = 400, 0.9, 0.8, 0.3
    covered = corrected_covered = 0
    for _ in range(60):
        drawn = rng.random((n, 1)) < truth
        p = np.where(drawn, rng.random((n, 1)) < tpr, rng.random((n, 1)) < fpr).astype(float)
        rates = {"t0": [tpr, fpr, 1e9, 1e9]}
        row = per_tag(sheet_of(p, np.ones((n, 1), dtype=bool), rates=rates))[0]
        covered += row["low"] <= truth <= row["high"]
        corrected_covered += abs(row["corrected"] - truth) <= 1.96 * row["corrected_error"]
    assert covered < 5
    assert corrected_covered >= 53
    useless = per_tag(sheet_of(p, np.ones((n, 1), dtype=bool), rates={"t0": [0.5, 0.3, 100, 100]}))[0]
    assert np.isnan(useless["corrected"])


def test_contradictions_excess_and_negative_leak_by_hand(folders: Any) -> None:
    metric = TagAdherence(str(folders.tagger), exclusive={"hair": list(COLOURS), "gone": ["aqua_hair"]})
    backend = metric._tagger.backend
    assert isinstance(backend, TimmTagger)
    backend.folder = dataclasses.replace(backend.folder, network=Planted())
    asked = Prompt("a", "", 0, tags=("red_hair",), negative="(blue_hair:1.3), lowres")
    two = Prompt("b", "", 0, tags=("red_hair", "blue_hair"))
    prompts = {"a": asked, "b": two, "c": Prompt("c", "", 0, tags=("1girl",))}

    def rows(prompt_id: str, colour: str) -> dict[str, float]:
        found = metric.rows([Picture(prompt_id, 0, flat(asked, colour).pixels)], prompts)
        return {name: float(found[name][0]) for name in metric.columns}

    right, wrong = rows("a", "red_hair"), rows("a", "blue_hair")
    assert (right["tag_contradiction"], wrong["tag_contradiction"]) == (0, 1)
    assert (right["tag_negative_leak"], wrong["tag_negative_leak"]) == (0, 1)
    assert (right["tag_excess"], wrong["tag_excess"]) == (1, 2)  # 1girl; 1girl and blue hair
    assert np.isnan(rows("b", "red_hair")["tag_contradiction"])  # two are asked: nothing is pinned
    assert np.isnan(rows("c", "red_hair")["tag_contradiction"])
    assert np.isnan(rows("c", "red_hair")["tag_negative_leak"])


def test_an_implied_tag_is_neither_counted_twice_nor_held_against_its_picture(tmp_path: Path) -> None:
    """Trap 14: a tagger was taught long_hair on every very_long_hair; the prompt names one of them, or both."""
    make = runpy.run_path(str(Path(__file__).with_name("tiny_scorers.py")))["make_tagger"]
    names = ["absurdly_long_hair", "very_long_hair", "long_hair", "short_hair"]
    make(tmp_path / "tagger", [(name, 0) for name in names])
    table = {"absurdly_long_hair": ["very_long_hair"], "very_long_hair": ["long_hair"], "twin_braids": ["braid"]}
    groups = {"length": ["long_hair", "short_hair"]}

    def columns(implied: dict[str, list[str]], logits: list[float], prompt: Prompt) -> dict[str, float]:
        class Said(torch.nn.Module):
            def forward(self, bgr: torch.Tensor) -> torch.Tensor:
                return torch.tensor([logits]).repeat(len(bgr), 1)

        metric = TagAdherence(str(tmp_path / "tagger"), implied=implied, exclusive=groups)
        backend = metric._tagger.backend
        assert isinstance(backend, TimmTagger)
        backend.folder = dataclasses.replace(backend.folder, network=Said())
        found = metric.rows([Picture("a", 0, np.zeros((8, 8, 3), np.uint8))], {"a": prompt})
        return {name: float(found[name][0]) for name in metric.columns}

    right, short = [2.0, 3.0, 4.0, -5.0], [-5.0, -5.0, -5.0, 2.0]
    one = Prompt("a", "", 0, tags=("absurdly_long_hair",), negative="long_hair, short_hair", unwanted=("long_hair",))
    found, naive = columns(table, right, one), columns({}, right, one)
    assert (naive["tag_excess"], found["tag_excess"]) == (2, 0)
    assert (naive["tag_negative_leak"], found["tag_negative_leak"]) == (0.5, 0)  # short_hair alone is ruled out
    assert naive["tag_leak"] == pytest.approx(p(4.0))
    assert np.isnan(found["tag_leak"])
    both = Prompt("a", "", 0, tags=("very_long_hair", "long_hair", "hat"))
    found, naive = columns(table, right, both), columns({}, right, both)
    assert naive["tag_prob"] == pytest.approx((p(3.0) + p(4.0)) / 2)
    assert found["tag_prob"] == pytest.approx(p(3.0))  # once, by its narrower name
    assert (naive["tag_scorable"], found["tag_scorable"]) == (pytest.approx(2 / 3), 0.5)
    narrow = Prompt("a", "", 0, tags=("very_long_hair",))
    assert np.isnan(columns({}, short, narrow)["tag_contradiction"])
    assert columns(table, short, narrow)["tag_contradiction"] == 1  # long hair is meant, short hair is shown
    assert columns(table, right, narrow)["tag_contradiction"] == 0


def test_an_alias_is_the_tag_that_it_stands_for() -> None:
    assert canonical_tags("blond hair, (gray_eyes:1.2), grey eyes") == ("blonde_hair", "grey_eyes")


def test_implications_that_no_tag_of_the_tagger_takes_part_in_leave_the_fingerprint_alone(folders: Any) -> None:
    plain = TagAdherence(str(folders.tagger)).fingerprint
    assert TagAdherence(str(folders.tagger), implied={"a": ["red_hair"], "1girl": ["b"]}).fingerprint == plain
    assert TagAdherence(str(folders.tagger), implied={"1girl": ["red_hair"]}).fingerprint != plain


def test_rating_confusion_and_leak_by_hand(planted: TagAdherence) -> None:
    class Rating(Planted):
        def forward(self, bgr: torch.Tensor) -> torch.Tensor:
            logits = super().forward(bgr)
            logits[:, :4] = torch.tensor([0.0, -1.0, 2.0, 1.0])
            return logits

    metric = TagAdherence.__new__(TagAdherence)
    metric.__dict__ |= planted.__dict__
    backend = planted._tagger.backend
    assert isinstance(backend, TimmTagger)
    kept = backend.folder
    backend.folder = dataclasses.replace(kept, network=Rating())
    try:
        asked = ("general", "general", "explicit", "questionable")
        prompts = PromptSet("r", tuple(Prompt(str(k), "", k, rating=rating) for k, rating in enumerate(asked)))
        sheet = score([flat(prompt, "red_hair") for prompt in prompts.prompts], prompts, [metric])
    finally:
        backend.folder = kept
    np.testing.assert_array_equal(sheet.columns["rating_hit"], [0, 0, 0, 1])
    np.testing.assert_array_equal(sheet.columns["rating_error"], [2, 2, 1, 0])
    np.testing.assert_allclose(sheet.columns["rating_leak"], [p(2) + p(1)] * 2 + [np.nan] * 2, rtol=1e-5)
    table = rating_confusion(sheet)
    assert table is not None
    np.testing.assert_array_equal(table, [[0, 0, 2, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0]])


def test_per_tag_differences_carry_q_values(planted: TagAdherence) -> None:
    bad, _ = random_sheet(planted, 3, 0.2)
    good, _ = random_sheet(planted, 4, 0.9)
    rows = {row["tag"]: row for row in per_tag(good, bad)}
    assert rows["red_hair"]["difference"] > 0.3
    assert rows["red_hair"]["difference_low"] > 0
    assert rows["red_hair"]["q"] >= rows["red_hair"]["p"]
    assert rows["1girl"]["difference"] == 0


def test_every_spelling_of_a_tag_comes_back_to_its_name(folders: Any) -> None:
    """The whole vocabulary through the ways that web interfaces and captions write a tag."""
    world = [tag.name for tag in Tagger("builtin://tagger").tags]
    names = [
        *world,
        ">_<",
        ":d",
        "^_^",
        "||_||",
        "@_@",
        "0_0",
        "+_+",
        ":)",
        "saber_(fate)",
        "miku_(append)_(vocaloid)",
        "6+girls",
    ]
    for name in names:
        escaped = name.replace("(", r"\(").replace(")", r"\)")
        spaced = escaped.replace("_", " ") if len(name) > 3 and any(c.isalpha() for c in name) else escaped
        for spelling in (name, escaped, spaced, f"({escaped}:1.2)", f"(({escaped}))" if name[-1] != ")" else escaped):
            assert canonical_tags(f"x, {spelling}, y") == ("x", name, "y"), spelling
    assert canonical_tags("Long Hair, long_hair, [smile], {frown}, <lora:a_b:1>, moon AND hat BREAK scarf") == (
        ("long_hair", "smile", "frown", "moon", "hat", "scarf")
    )
    for text, tags in {
        "(red hair, smile:1.2)": ("red_hair", "smile"),
        "1girl BREAK red_eyes": ("1girl", "red_eyes"),
        "(1girl, (red_eyes:1.3), hat:1.2)": ("1girl", "red_eyes", "hat"),
        "((smile:1.2)), [hat], (dress:-0.5), (moon:0)": ("smile", "hat"),
        "(hat:1.), (smile:.5), (red_eyes : 1.2 )": ("hat", "smile", "red_eyes"),
        r"by the sea, (o)_(o), kohaku \(world\)": ("by_the_sea", "(o)_(o)", "kohaku_(world)"),
        "(smile)(frown)": ("smile", "frown"),
    }.items():
        assert canonical_tags(text) == tags, text
    assert canonical_tags(" , ,") == ()


def test_an_onnx_tagger_answers_as_the_timm_one(folders: Any, tmp_path: Path) -> None:
    """Trap 17: NHWC, BGR, 0-255 and the sigmoid inside; the same pictures give the same probabilities."""
    import onnx

    make = runpy.run_path(str(Path(__file__).with_name("tiny_scorers.py")))
    folder = make["make_onnx_tagger"](tmp_path / "onnx", onnx)
    tagger = Tagger(str(folder))
    assert isinstance(tagger.backend, OnnxTagger)
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((32, 32), (48, 32), (20, 60))]
    found = tagger.probabilities(pixels)
    means = np.stack([prepare(picture, (32, 32), "bicubic").mean((0, 1)) for picture in pixels])  # BGR
    expected = 1 / (1 + np.exp(-(means / 127.5 - 1) @ make["onnx_weights"]()))
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert found.shape == (3, 10)
    sheet = TagAdherence(str(folder)).rows([Picture("a", 0, pixels[0])], {"a": Prompt("a", "", 0, tags=("red_hair",))})
    assert sheet["tag_prob"][0] == pytest.approx(found[0, 5])
    (folder / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(BadInput, match="cannot load"):
        Tagger(str(folder))


def test_rates_are_counted_and_come_back_from_their_file(planted: TagAdherence, tmp_path: Path) -> None:
    colours = ["red_hair", "green_hair", "red_hair", "blue_hair"]
    truth = [["red_hair", "1girl"], ["red_hair", "1girl"], ["green_hair", "1girl"], ["blue_hair"]]
    blank = Prompt("x", "", 0)
    rows = rates_of(planted._tagger, [([flat(blank, colour).pixels for colour in colours], truth)])
    by_tag = {row["tag"]: row for row in rows}
    assert (by_tag["red_hair"]["tpr"], by_tag["red_hair"]["fpr"]) == (0.5, 0.5)
    assert (by_tag["blue_hair"]["tpr"], by_tag["blue_hair"]["fpr"]) == (1.0, 0.0)
    write_rates(tmp_path / "rates.csv", rows)
    assert read_rates(tmp_path / "rates.csv")["red_hair"] == [0.5, 0.5, 2, 2]
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadInput, match="tag,tpr,fpr"):
        read_rates(tmp_path / "other.csv")


def test_card_thresholds_are_for_the_card_architectures_only(folders: Any, tmp_path: Path) -> None:
    """Trap 18: .2653 for swinv2 is not .5296 for eva02, and neither is for a stranger's network."""
    tagger = Tagger(str(folders.tagger))
    (tmp_path / "wd").mkdir()
    for start, value in (("swinv2_base_window8_256", 0.2653), ("eva02_large_patch14_448", 0.5296)):
        about = {"architecture": start, "num_classes": 10861}
        (tmp_path / "wd" / "config.json").write_text(json.dumps(about))
        tagger.path = tmp_path / "wd"
        assert tagger._stated_thresholds(["general"]) == {"general": value}
    (tmp_path / "wd" / "config.json").write_text(json.dumps({**about, "num_classes": 10}))
    with pytest.raises(MissingObject, match="model card"):
        tagger._stated_thresholds(["general"])


def test_an_exported_tagger_answers_as_its_timm_folder(folders: Any, tmp_path: Path) -> None:
    """Trap 17: one network through both backends, |Δp| < 0.02 where PIL resizes alike."""
    source = Tagger(str(folders.tagger))
    assert isinstance(source.backend, TimmTagger)

    class Graph(torch.nn.Module):
        """What WD's ONNX files hold: NHWC BGR 0–255 in, probabilities out."""

        def __init__(self, network: torch.nn.Module) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x.permute(0, 3, 1, 2) / 127.5 - 1).sigmoid()

    folder = tmp_path / "onnx"
    folder.mkdir()
    for name in ("selected_tags.csv", "thresholds.json"):
        shutil.copy(folders.tagger / name, folder / name)
    network = timm.create_model(f"local-dir:{folders.tagger}", pretrained=True).eval()
    torch.onnx.export(
        Graph(network),
        (torch.zeros(1, 32, 32, 3),),
        str(folder / "model.onnx"),
        input_names=["input"],
        output_names=["output"],
        dynamic_axes={"input": {0: "batch"}, "output": {0: "batch"}},
        dynamo=False,
    )
    exported = Tagger(str(folder))
    assert isinstance(exported.backend, OnnxTagger)
    rng = np.random.default_rng(5)
    pixels = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((32, 32), (64, 40), (20, 60))]
    found, expected = exported.probabilities(pixels), source.probabilities(pixels)
    assert np.abs(found - expected).max() < 0.02
    assert expected.std() > 0.05
    assert exported.fingerprint != source.fingerprint


def test_the_rating_that_a_prompts_words_ask_for() -> None:
    """Trap 12: safe is general, nsfw questionable, and both words explicit; other families have other words."""
    kohaku = {
        "general": ["safe"],
        "sensitive": ["sensitive"],
        "questionable": ["nsfw"],
        "explicit": ["explicit", "nsfw"],
    }
    asked = {"1girl, safe": "general", "1girl, (nsfw:1.2)": "questionable", "explicit, nsfw, hat": "explicit"}
    asked |= {"sensitive": "sensitive", "1girl": "general", "explicit": "explicit"}
    for text, rating in asked.items():
        assert rating_of(canonical_tags(text), kohaku) == rating, text
    pony = {"general": ["rating_safe"], "explicit": ["rating_explicit"]}
    assert rating_of(canonical_tags("1girl, rating_explicit"), pony) == "explicit"


def test_recall_of_real_and_count_bins_by_hand(planted: TagAdherence, prompts: PromptSet) -> None:
    sheet = score(drawn_right(prompts), prompts, [planted])
    constants = dict(sheet.constants["tag_adherence"])
    tags = constants["tags"]
    constants["rates"] = {"1girl": [0.5, 0.0, 9, 9], "red_hair": [1.0, 0.0, 9, 9]}
    constants["counts"] = [20_000 if tag == "1girl" else 500 for tag in tags]
    changed = dataclasses.replace(sheet, constants={"tag_adherence": constants})
    found = TagAdherence.aggregates(changed, seed=0)
    assert found["tag_recall_of_real"].value == pytest.approx((1 + 1) / (0.5 + 1.0))
    assert found["tag_macro_recall_over_10k"].value == 1
    assert found["tag_macro_recall_under_1k"].n == 12
    assert "tag_macro_recall_1k_to_10k" not in found
