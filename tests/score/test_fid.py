"""FID against closed forms, scipy's matrix root, stock torchmetrics and a brute-force jackknife."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scipy import linalg, stats
from torchmetrics.image.fid import FrechetInceptionDistance
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from ambergrade.errors import BadInput, MissingObject
from ambergrade.nouns import Picture, PromptSet
from ambergrade.score.distances import frechet_distance
from ambergrade.score.features import Extractor
from ambergrade.score.folders import load_timm
from ambergrade.score.metrics.fid import Fid
from ambergrade.score.reference import Reference
from ambergrade.score.scoring import score
from ambergrade.score.sheet import ScoreSheet


def reference_fid(one: np.ndarray, two: np.ndarray) -> float:
    """The formula as written, with scipy's matrix root."""
    covariance_1, covariance_2 = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    root = linalg.sqrtm(covariance_1 @ covariance_2).real
    return float(((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(covariance_1 + covariance_2 - 2 * root))


def feature_sheet(features: np.ndarray, reference: np.ndarray, prompts: int, few: bool = False) -> ScoreSheet:
    """A sheet of given features, several pictures a prompt."""
    ids = tuple(f"p{k % prompts}" for k in range(len(features)))
    real = Reference.of_features(reference)
    constants = {"features": "features.x", "reference": real.digest, "few": few}
    kept = {"features.x": features.astype(np.float32)}
    return ScoreSheet(
        ids, tuple(range(len(ids))), {}, kept, {}, {"fid": {}}, {"fid": constants}, {}, "", {real.digest: real}
    )


@pytest.fixture(scope="module")
def metric(folders: Any) -> Fid:
    return Fid(str(folders.features), str(folders.reference), str(folders.pictures), few=True)


def test_distance_of_isotropic_gaussians() -> None:
    d, shift = 7, np.arange(7.0)
    found = frechet_distance(shift, 4.0 * np.eye(d), np.zeros(d), 9.0 * np.eye(d))
    assert found == pytest.approx((shift**2).sum() + d * (2 - 3) ** 2)


def test_distance_of_gaussians_whose_covariances_commute() -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    one, two = rng.uniform(0, 3, 6), rng.uniform(0, 3, 6)
    found = frechet_distance(np.zeros(6), basis * one @ basis.T, np.zeros(6), basis * two @ basis.T)
    assert found == pytest.approx(((np.sqrt(one) - np.sqrt(two)) ** 2).sum())


def test_distance_is_scipys_also_where_a_covariance_lacks_rank() -> None:
    rng = np.random.default_rng(1)
    one, two = rng.normal(size=(50, 8)) @ rng.normal(size=(8, 8)), rng.normal(1, 2, size=(5, 8))
    found = frechet_distance(one.mean(0), np.cov(one, rowvar=False), two.mean(0), np.cov(two, rowvar=False))
    assert found == pytest.approx(reference_fid(one, two), rel=1e-5)


def test_distance_of_a_set_from_itself_is_zero() -> None:
    one = np.random.default_rng(2).normal(size=(40, 5))
    moments = one.mean(0), np.cov(one, rowvar=False)
    assert frechet_distance(*moments, *moments) == pytest.approx(0, abs=1e-9)


def test_value_of_a_sheet_is_the_formula() -> None:
    rng = np.random.default_rng(3)
    features, reference = rng.normal(0.5, 1, size=(60, 8)).astype(np.float32), rng.normal(size=(200, 8))
    found = Fid.aggregates(feature_sheet(features, reference, 30), seed=0)["fid"]
    assert found.value == pytest.approx(reference_fid(features.astype(np.float64), reference), rel=1e-6)
    assert found.n == 60
    assert not found.higher_is_better


def test_error_is_the_jackknife_over_prompts_done_by_hand() -> None:
    rng = np.random.default_rng(4)
    features, reference = rng.normal(0.5, 1, size=(60, 4)).astype(np.float32), rng.normal(size=(100, 4))
    found = Fid.aggregates(feature_sheet(features, reference, 20), seed=0)["fid_corrected"]
    whole = features.astype(np.float64)
    left_out = np.array([reference_fid(whole[np.arange(60) % 20 != g], reference) for g in range(20)])
    error = np.sqrt(19 / 20 * ((left_out - left_out.mean()) ** 2).sum())
    assert found.high - found.value == pytest.approx(stats.t.isf(0.025, 19) * error, rel=1e-4)
    assert found.value == pytest.approx(20 * reference_fid(whole, reference) - 19 * left_out.mean(), rel=1e-4)


def test_error_is_about_the_spread_over_repetitions() -> None:
    rng = np.random.default_rng(5)
    reference = rng.normal(size=(500, 4))
    found = [
        Fid.aggregates(feature_sheet(rng.normal(0.5, 1, size=(80, 4)), reference, 40), seed=0)["fid_corrected"]
        for _ in range(60)
    ]
    errors = [(m.high - m.value) / stats.t.isf(0.025, 39) for m in found]
    assert np.mean(errors) == pytest.approx(np.std([m.value for m in found], ddof=1), rel=0.3)


def test_paired_difference_is_sharper_than_two_intervals_and_zero_for_a_twin() -> None:
    rng = np.random.default_rng(6)
    reference, one = rng.normal(size=(300, 6)), rng.normal(0.3, 1, size=(80, 6))
    other = one + 0.1 + rng.normal(0, 0.02, size=one.shape)
    sheet, baseline = feature_sheet(other, reference, 40), feature_sheet(one, reference, 40)
    alone = Fid.aggregates(baseline, seed=0)["fid_corrected"]
    found = Fid.differences(sheet, baseline, seed=0)["fid"]
    assert found.high - found.low < 0.5 * (alone.high - alone.low)
    assert found.verdict == "worse"
    twin = Fid.differences(baseline, baseline, seed=0)["fid"]
    assert (twin.value, twin.low, twin.high, twin.p, twin.verdict) == (0, 0, 0, 1, "undecided")


def test_the_corrected_value_s_interval_holds_the_true_distance_and_the_biased_value_has_none() -> None:
    """32 features of a falling spectrum. At n = 40 an interval around the biased value never held it."""
    rng, d = np.random.default_rng(11), 32
    spread = 1 / np.sqrt(np.arange(1, d + 1))
    real = Reference(np.zeros(d), np.diag(spread**2))
    shift = 0.3 * spread
    truth = float(frechet_distance(shift, 1.1 * np.diag(spread**2), real.mean, real.covariance))
    for n, runs in ((128, 120), (256, 120)):
        held = 0
        for _ in range(runs):
            sheet = feature_sheet(rng.normal(shift, np.sqrt(1.1) * spread, (n, d)), np.zeros((2, 1)), n)
            constants = {"fid": {"features": "features.x", "reference": real.digest, "few": False}}
            found = Fid.aggregates(replace(sheet, constants=constants, references={real.digest: real}), seed=0)
            held += found["fid_corrected"].low <= truth <= found["fid_corrected"].high
            assert list(found) == ["fid_corrected", "fid"]
            assert np.isnan([found["fid"].low, found["fid"].high]).all()
            assert found["fid"].value > found["fid_corrected"].value
        assert held / runs >= 0.89, (n, held)  # 95 % meant, 3 standard errors 6 %


def test_below_four_pictures_a_feature_no_interval_is_given_and_why_is_said() -> None:
    rng = np.random.default_rng(12)
    reference = rng.normal(size=(100, 8))
    for n, given in ((31, False), (32, True)):
        sheet = feature_sheet(rng.normal(size=(n, 8)), reference, n)
        assert np.isnan(Fid.aggregates(sheet, seed=0)["fid_corrected"].low) != given
        assert any("no interval, one of fewer than 4·d = 32" in line for line in Fid.remarks(sheet)) != given
    few_real = feature_sheet(rng.normal(size=(100, 8)), reference[:20], 100)
    assert np.isnan(Fid.aggregates(few_real, seed=0)["fid_corrected"].low)


def test_fewer_pictures_than_features_are_refused_unless_asked_for() -> None:
    rng = np.random.default_rng(7)
    x, reference = rng.normal(size=(7, 8)).astype(np.float32), rng.normal(size=(100, 8))
    refused, asked = feature_sheet(x, reference, 7), feature_sheet(x, reference, 7, few=True)
    assert np.isnan(Fid.aggregates(refused, seed=0)["fid"].value)
    assert "refused" in Fid.remarks(refused)[0]
    assert Fid.aggregates(asked, seed=0)["fid"].value == pytest.approx(
        reference_fid(x.astype(np.float64), reference), rel=1e-6
    )
    assert "lacks rank" in Fid.remarks(asked)[0]
    assert Fid.differences(refused, refused, seed=0)["fid"].verdict == "undecided"
    assert Fid.remarks(feature_sheet(rng.normal(size=(32, 8)), reference, 9)) == []
    two_prompts = feature_sheet(rng.normal(size=(20, 2)), reference[:, :2], 2)
    assert np.isnan(Fid.aggregates(two_prompts, seed=0)["fid"].value)
    assert "at least 3 prompts" in Fid.remarks(two_prompts)[0]


def test_pictures_give_what_stock_torchmetrics_gives(
    metric: Fid, folders: Any, prompts: PromptSet, pictures: list[Picture]
) -> None:
    stock = FrechetInceptionDistance(feature=Extractor(load_timm(str(folders.features))))
    real = [np.asarray(Image.open(folders.pictures / name)) for name in folders.reference.read_text().split()]
    stock.update(torch.from_numpy(np.stack(real)).permute(0, 3, 1, 2), real=True)
    stock.update(torch.from_numpy(np.stack([p.pixels for p in pictures])).permute(0, 3, 1, 2), real=False)
    found = Fid.aggregates(score(pictures, prompts, [metric], batch=7), seed=0)["fid"]
    assert found.value == pytest.approx(float(stock.compute()), rel=1e-4)


def test_features_are_timms_penultimate_ones_after_an_antialiased_resize(folders: Any) -> None:
    extractor = Extractor(load_timm(str(folders.features)))
    bare = timm.create_model(f"local-dir:{folders.features}", pretrained=True, num_classes=0).eval()
    pixels = torch.randint(0, 256, (3, 3, 80, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    resized = transforms.resize(pixels.float(), [32, 32], InterpolationMode.BICUBIC, antialias=True).clamp(0, 255)
    expected = bare((resized / 255 - 0.5) / 0.5)
    assert extractor.num_features == expected.shape[1] == 32
    torch.testing.assert_close(extractor(pixels), expected.detach(), rtol=1e-4, atol=1e-4)


def test_pictures_of_several_sizes_are_scored_together(metric: Fid, prompts: PromptSet) -> None:
    rng = np.random.default_rng(8)
    sizes = [(32, 32), (48, 32), (32, 32), (32, 48)]
    mixed = [
        Picture(prompt.id, 0, rng.integers(0, 256, (*size, 3), dtype=np.uint8))
        for prompt, size in zip(prompts.prompts, sizes, strict=False)
    ]
    together = metric.rows(mixed, {})[metric._source.key]
    alone = np.concatenate([metric.rows([picture], {})[metric._source.key] for picture in mixed])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)


def test_reference_lists_that_cannot_serve_are_refused(folders: Any, tmp_path: Path) -> None:
    names = folders.reference.read_text().split()
    for text, error, message in [
        ("", BadInput, "at least 2 pictures"),
        (f"{names[0]}\n{names[0]}\n", BadInput, "each once"),
        (f"{names[0]}\ngone.png\n", MissingObject, "gone.png"),
    ]:
        (tmp_path / "list.txt").write_text(text)
        with pytest.raises(error, match=message):
            Fid(str(folders.features), str(tmp_path / "list.txt"), str(folders.pictures))


def test_transparent_reference_pictures_stand_on_white(folders: Any, tmp_path: Path) -> None:
    clear = Image.new("RGBA", (32, 32), (200, 10, 10, 0))
    clear.save(tmp_path / "clear.png")
    Image.new("RGB", (32, 32), "white").save(tmp_path / "white.png")
    sums = []
    for name in ("clear", "white"):
        (tmp_path / "other.png").write_bytes((folders.pictures / "000.png").read_bytes())
        (tmp_path / "list.txt").write_text(f"{name}.png\nother.png\n")
        made = Fid(str(folders.features), str(tmp_path / "list.txt"), str(tmp_path)).references()
        sums.append(next(iter(made.values())).mean)
    np.testing.assert_allclose(sums[0], sums[1], rtol=1e-6)
