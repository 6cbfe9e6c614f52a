"""Mosaic and control response on pictures of the embedded world, damaged by a known strength."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.stats import spearmanr

from ambergrade.errors import BadSetting
from ambergrade.nouns import Picture, Prompt, PromptSet
from ambergrade.score.comparison import remarks
from ambergrade.score.contrast import contrasted, pairs
from ambergrade.score.metrics.control_response import ControlResponse
from ambergrade.score.metrics.mosaic import Mosaic, blockiness
from ambergrade.score.scoring import score
from ambergrade.world.draw import draw
from ambergrade.world.grammar import sample

CONF = Path(__file__).parents[2] / "conf" / "metric" / "control_response.yaml"


def drawn(count: int, **changes: object) -> list[np.ndarray]:
    scenes = [dataclasses.replace(sample(3, k, clean=True), **changes) for k in range(count)]
    return [np.asarray(draw(scene)) for scene in scenes]


@pytest.fixture(scope="module")
def clean() -> list[np.ndarray]:
    return drawn(16)


def encoded(pixels: np.ndarray, kind: str, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, quality=quality)
    return np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))


@pytest.mark.parametrize(("kind", "least"), [("JPEG", 0.95), ("WEBP", 0.6)])
def test_mosaic_rises_with_the_damage_of_lossy_files(clean: list[np.ndarray], kind: str, least: float) -> None:
    strengths = (95, 80, 60, 40, 20, 8)
    table = np.array([[blockiness(encoded(pixels, kind, quality)) for quality in strengths] for pixels in clean])
    mean = table.mean(0)
    assert spearmanr(range(6), mean).statistic >= least
    none = np.array([blockiness(pixels) for pixels in clean])
    assert mean[-1] > none.mean() + 3 * none.std() / np.sqrt(len(none))
    if kind == "JPEG":
        worse = (table[:, 3][:, None] > none[None, :]).mean()  # quality 40 against untouched: AUROC
        assert worse > 0.95


def test_mosaic_is_a_grid_not_noise_blur_or_edges(clean: list[np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    none = np.mean([blockiness(pixels) for pixels in clean])
    noisy = [np.clip(p + rng.normal(0, 12, p.shape), 0, 255).astype(np.uint8) for p in clean]
    jpeg = np.mean([blockiness(encoded(pixels, "JPEG", 20)) for pixels in clean])
    assert np.mean([blockiness(pixels) for pixels in noisy]) < none + 0.3 * (jpeg - none)
    cropped = np.mean([blockiness(encoded(pixels, "JPEG", 20)[3:, 5:]) for pixels in clean])
    assert cropped == pytest.approx(jpeg, rel=0.25)  # the grid's place is free
    assert np.isnan(blockiness(np.zeros((16, 64, 3), np.uint8)))


def test_drawn_patterns_are_left_out_and_block_noise_rises_at_128_pixels(clean: list[np.ndarray]) -> None:
    """Screentones and enlarged pixel art gave 6 to 12, a JPEG of quality 8 gives 2."""
    rows, columns = np.mgrid[:128, :128]
    rng = np.random.default_rng(2)
    patterns = [np.kron(rng.integers(0, 256, (16, 16, 3)), np.ones((8, 8, 1)))]
    for period in (4, 8):
        dot = (rows % period - period / 2 + 0.5) ** 2 + (columns % period - period / 2 + 0.5) ** 2 < (0.3 * period) ** 2
        patterns += [np.repeat(np.where(dot, 255 - contrast, 255)[..., None], 3, 2) for contrast in (20, 160)]
    assert np.isnan([blockiness(pattern.astype(np.uint8)) for pattern in patterns]).all()
    shown = [Picture(str(k), k, pixels.astype(np.uint8)) for k, pixels in enumerate([clean[0], *patterns])]
    sheet = score(shown, PromptSet("m", tuple(Prompt(str(k), "", k) for k in range(6))), [Mosaic()])
    assert "mosaic: 5 of 6 pictures not scored (left out, not counted as zero)." in remarks(sheet)
    blocks, grain = np.kron(rng.normal(size=(16, 16)), np.ones((8, 8))), rng.normal(0, 3, (128, 128))
    found = [
        blockiness(np.repeat((128 + s * blocks + grain).clip(0, 255)[..., None], 3, 2).astype(np.uint8))
        for s in (0, 1, 2, 4)
    ]
    assert (np.diff(found) > 0).all()
    assert np.isfinite([blockiness(encoded(pixels, "JPEG", 8)) for pixels in clean]).all()


def test_the_metric_is_the_measure(clean: list[np.ndarray]) -> None:
    prompts = PromptSet("m", tuple(Prompt(str(k), "", k) for k in range(3)))
    shown = [Picture(str(k), k, clean[k]) for k in range(3)]
    found = score(shown, prompts, [Mosaic()])
    np.testing.assert_allclose(found.columns["mosaic"], [blockiness(pixels) for pixels in clean[:3]])
    assert not found.higher_is_better["mosaic"]


def test_contrast_prompts_differ_in_one_word_and_keep_the_seed() -> None:
    axes = {"quality": ["masterpiece", "worst quality"], "year": ["newest", "old"]}
    poles = {"quality": ["masterpiece", "worst quality"], "year": ["newest", "old"]}
    prompts = PromptSet("p", (Prompt("a", "1girl, newest, hat, masterpiece", 7), Prompt("b", "moon", 8)))
    made = contrasted(prompts, axes, poles)
    assert [(p.id, p.text, p.seed) for p in made.prompts[:4]] == [
        ("a@quality+", "1girl, newest, hat, masterpiece", 7),
        ("a@quality-", "1girl, newest, hat, worst quality", 7),
        ("a@year+", "1girl, newest, hat, masterpiece", 7),
        ("a@year-", "1girl, old, hat, masterpiece", 7),
    ]
    assert made.prompts[4].text == "moon, masterpiece"
    found = pairs([p.id for p in made.prompts], [p.seed for p in made.prompts])
    assert found["quality"] == [("a", 0, 1), ("b", 4, 5)]
    with pytest.raises(BadSetting, match="marks contrast prompts"):
        contrasted(made, axes, poles)


def contrast_sheet(first: list[np.ndarray], second: list[np.ndarray], metric: ControlResponse) -> dict[str, object]:
    prompts = PromptSet("c", tuple(Prompt(f"{k}@quality{sign}", "", k) for k in range(len(first)) for sign in "+-"))
    shown = [
        Picture(f"{k}@quality{sign}", k, one[k])
        for k in range(len(first))
        for sign, one in (("+", first), ("-", second))
    ]
    sheet = score(shown, prompts, [metric])
    found: dict[str, object] = dict(ControlResponse.aggregates(sheet, seed=0))
    apart = ControlResponse.differences(sheet, sheet, seed=0)
    assert {d.value for d in apart.values()} == {0.0}
    assert apart.keys() == found.keys()
    return found


def test_a_word_that_works_is_told_from_one_that_only_shuffles(clean: list[np.ndarray]) -> None:
    """Quality and year as the world draws them are heard; another pose of the same scene is chance."""
    settings = yaml.safe_load(CONF.read_text())
    settings.pop("name")
    metric = ControlResponse(**{**settings, "extractor": "builtin://features"})
    worst, old, again = drawn(16, quality=0.0), drawn(16, year=2005), drawn(16, seed=99)
    quality, year, chance = (contrast_sheet(clean, other, metric) for other in (worst, old, again))
    for found in (quality, year):
        response = found["response_quality"]
        assert response.low > 0.03  # type: ignore[attr-defined]
    chance_response = chance["response_quality"]
    assert chance_response.low < 0.1  # type: ignore[attr-defined]
    assert quality["response_quality_sharpness"].low > 0  # type: ignore[attr-defined]
    assert quality["response_quality_mosaic"].high < 0  # type: ignore[attr-defined]
    assert abs(chance["response_quality_saturation"].value) < 5  # type: ignore[attr-defined]
