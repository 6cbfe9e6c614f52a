"""Set distances against closed forms, scipy's matrix root, torch-fidelity and brute-force jackknives."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import linalg
from torchmetrics.image.fid import _compute_fid

from ambergrade.score import distances as ours
from ambergrade.score.statistics import jackknife_corrected, jackknife_error


def one_group_each(x: np.ndarray, groups: int = 4) -> np.ndarray:
    return np.arange(len(x)) % groups


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return x.mean(0), np.cov(x, rowvar=False)


def sqrtm_fid(one: np.ndarray, two: np.ndarray) -> float:
    """The formula as written, with scipy's matrix root."""
    (m1, c1), (m2, c2) = moments(one), moments(two)
    return float(((m1 - m2) ** 2).sum() + np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real))


@pytest.mark.parametrize("n", [60, 9])  # full rank, and n < d: the Gram form
def test_frechet_is_scipys_and_torchmetrics(n: int) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(0.3, 2, (n, 12)), rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
    value, _ = ours.frechet_groups(x, one_group_each(x), *moments(y))
    assert value == pytest.approx(sqrtm_fid(x, y), rel=1e-6)
    stock = _compute_fid(*(torch.from_numpy(part) for part in (*moments(x), *moments(y))))
    assert value == pytest.approx(float(stock), rel=1e-6)


def test_gram_and_moment_forms_are_one_number() -> None:
    rng = np.random.default_rng(1)
    x, covariance = rng.normal(size=(10, 14)), np.cov(rng.normal(size=(50, 14)), rowvar=False)
    keep = np.arange(10) != 3
    assert ours._gram_cross(x, covariance)(keep) == pytest.approx(ours._moment_cross(x, covariance)(keep), rel=1e-7)


def test_frechet_is_rotation_invariant_scales_by_the_square_and_is_zero_to_itself() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(0.3, 2, (60, 6)), rng.normal(size=(80, 6))
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    group = one_group_each(x)
    value, _ = ours.frechet_groups(x, group, *moments(y))
    assert ours.frechet_groups(x @ basis, group, *moments(y @ basis))[0] == pytest.approx(value, rel=1e-9)
    assert ours.frechet_groups(3 * x, group, *moments(3 * y))[0] == pytest.approx(9 * value, rel=1e-9)
    assert ours.frechet_groups(x, group, *moments(x))[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("statistic", ["fd", "fd, n < d", "kid", "cmmd", "cmmd unbiased", "mind", "prdc"])
def test_left_out_values_are_those_of_the_smaller_set(statistic: str) -> None:
    """The fast leave-outs against the same formula on pictures that were never there."""
    rng = np.random.default_rng(3)
    d = 40 if "n < d" in statistic else 5
    x, y = rng.normal(0.2, 1, (30, d)), rng.normal(size=(30, d))
    if "cmmd" in statistic:
        x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    formula: Callable[[np.ndarray, np.ndarray], ours.Grouped]
    formula = {
        "fd": lambda a, g: ours.frechet_groups(a, g, *moments(y)),
        "fd, n < d": lambda a, g: ours.frechet_groups(a, g, *moments(y)),
        "kid": lambda a, g: ours.kid_groups(a, y, g),
        "cmmd": lambda a, g: ours.cmmd_groups(a, y, g),
        "cmmd unbiased": lambda a, g: ours.cmmd_groups(a, y, g, unbiased=True),
        "mind": lambda a, g: ours.mind_groups(a, y, g, directions=40),
        "prdc": lambda a, g: ours.prdc_groups(a, y, g)["recall"],
    }[statistic]
    group = one_group_each(x, 6)
    _, left_out = formula(x, group)
    expected = [
        formula(x[group != g], np.zeros(25, dtype=np.int64) + one_group_each(x[group != g]))[0] for g in range(6)
    ]
    np.testing.assert_allclose(left_out, expected, rtol=1e-8, atol=1e-10)


def test_jackknife_takes_the_bias_off_frechet() -> None:
    """Facts, section 2: with a true distance, the raw value is too large at small n and the corrected one is not."""
    rng = np.random.default_rng(4)
    d, n, shift = 8, 60, 0.1
    truth = d * shift**2
    raw, corrected, errors = [], [], []
    for _ in range(80):
        x = rng.normal(shift, 1, (n, d))
        value, left_out = ours.frechet_groups(x, np.arange(n) % 20, np.zeros(d), np.eye(d))
        raw.append(value)
        corrected.append(jackknife_corrected(value, left_out))
        errors.append(jackknife_error(left_out))
    assert np.mean(raw) > truth * 3
    assert abs(np.mean(corrected) - truth) < 0.2 * (np.mean(raw) - truth)
    assert np.mean(errors) == pytest.approx(np.std(raw, ddof=1), rel=0.35)


def test_kid_of_gaussians_is_the_closed_form() -> None:
    """Zero means: MMD² of (xᵀy/d + 1)³ = 3/d²·‖Σ₁-Σ₂‖²_F."""
    rng = np.random.default_rng(5)
    d, scale = 4, np.array([2.0, 1.5, 1.0, 0.5])
    x, y = rng.normal(size=(2500, d)) * scale, rng.normal(size=(2500, d))
    value, _ = ours.kid_groups(x, y, one_group_each(x))
    assert value / 1000 == pytest.approx(3 / d**2 * np.sum((scale**2 - 1) ** 2), rel=0.15)


def test_kid_is_torch_fidelitys() -> None:
    from torch_fidelity import metric_kid as fidelity

    rng = np.random.default_rng(6)
    x, y = rng.normal(0.2, 1, (50, 6)), rng.normal(size=(50, 6))
    kernels = [ours.polynomial_kernel(*pair) for pair in ((x, x), (x, y), (y, y))]
    stock = fidelity.mmd2(kernels[0], kernels[1], kernels[2], mmd_est="unbiased")
    assert ours.kid_groups(x, y, one_group_each(x))[0] == pytest.approx(1000 * float(stock), rel=1e-9)


def test_gaussian_mmd_is_the_closed_form() -> None:
    """E k(x,y) = det(I + (Σa+Σb)/σ²)^-½ · exp(-½ δᵀ(σ²I+Σa+Σb)⁻¹δ)."""
    rng = np.random.default_rng(7)
    d, sigma, delta = 3, 2.0, np.array([0.5, 0.0, -0.5])
    a, b = 1.5, 1.0

    def expected(one: float, two: float, apart: np.ndarray) -> float:
        spread = one**2 + two**2
        return float((1 + spread / sigma**2) ** (-d / 2) * np.exp(-0.5 * apart @ apart / (sigma**2 + spread)))

    closed = expected(a, a, 0 * delta) + expected(b, b, 0 * delta) - 2 * expected(a, b, delta)
    found = []
    for _ in range(8):
        x, y = rng.normal(size=(1000, d)) * a + delta, rng.normal(size=(1000, d)) * b
        kyy = ours.gaussian_kernel(y, y, sigma)
        mean = (kyy.sum() - np.trace(kyy)) / (len(y) * (len(y) - 1))
        kxx, kxy = ours.gaussian_kernel(x, x, sigma), ours.gaussian_kernel(x, y, sigma)
        found.append(ours.kernel_groups(kxx, kxy, mean, one_group_each(x), unbiased=True)[0])
    assert np.mean(found) == pytest.approx(closed, abs=2.5 * np.std(found, ddof=1) / np.sqrt(8))
    assert np.std(found) < 0.2 * closed


def test_cmmd_is_ten_times_the_squared_difference_of_means_and_blind_to_collapse() -> None:
    rng = np.random.default_rng(8)
    x = rng.normal(size=(400, 16)) + 0.6
    y = rng.normal(size=(400, 16)) + 0.4
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    group = one_group_each(x)
    linear = 10 * np.square(x.mean(0) - y.mean(0)).sum()
    assert ours.cmmd_groups(x, y, group)[0] == pytest.approx(linear, rel=0.05)
    # two points with y's mean: a total collapse
    pair = y.mean(0) + np.array([[1], [-1]]) * np.linalg.norm(y, axis=1).mean() * np.eye(16)[0] * 0.5
    collapsed = np.repeat(pair, 200, axis=0)
    fd = [ours.frechet_groups(z, group, *moments(y))[0] for z in (x, collapsed)]
    assert ours.cmmd_groups(collapsed, y, group)[0] < ours.cmmd_groups(x, y, group)[0] + 0.05
    assert fd[1] > 3 * fd[0]


def test_mind_of_isotropic_gaussians_is_three_times_their_frechet_distance() -> None:
    rng = np.random.default_rng(9)
    d, shift, spread = 6, 0.8, 1.6
    x, y = rng.normal(shift, spread, (3000, d)), rng.normal(0, 1, (2500, d))
    closed = d * shift**2 + d * (spread - 1) ** 2
    assert ours.mind_groups(x, y, one_group_each(x, 2), directions=800)[0] == pytest.approx(3 * closed, rel=0.06)


def test_wasserstein_of_unequal_samples_is_the_one_of_repeated_samples() -> None:
    rng = np.random.default_rng(10)
    x, y = np.sort(rng.normal(size=(1, 6))), np.sort(rng.normal(size=(1, 4)))
    expected = np.mean((np.repeat(x, 2, axis=1) - np.repeat(y, 3, axis=1)) ** 2)
    assert ours._wasserstein_2(x, y)[0] == pytest.approx(expected)


def test_prdc_of_one_distribution_is_the_expected_one_and_of_two_far_ones_nothing() -> None:
    rng = np.random.default_rng(11)
    n, k = 1000, 5
    x, y = rng.normal(size=(n, 4)), rng.normal(size=(n, 4))
    found = {name: value for name, (value, _) in ours.prdc_groups(x, y, one_group_each(x, 2)).items()}
    expected = 1 - math.prod((n - i) / (2 * n - i) for i in range(1, k + 1))
    assert found["coverage"] == pytest.approx(expected, abs=0.02)
    assert found["density"] == pytest.approx(1, abs=0.06)
    far = {name: value for name, (value, _) in ours.prdc_groups(x + 99, y, one_group_each(x, 2)).items()}
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    collapsed = np.repeat(x[:20], 50, axis=0) + rng.normal(0, 1e-3, (n, 4))
    kept = {name: value for name, (value, _) in ours.prdc_groups(collapsed, y, one_group_each(x, 2)).items()}
    assert kept["precision"] > 0.8
    assert kept["recall"] < 0.1


def test_the_bias_of_frechet_is_the_models_own_and_equal_n_does_not_cancel_it() -> None:
    """Trap 6 (Chong & Forsyth 2020): of two models at the same true distance, the wider one reads farther away."""
    rng = np.random.default_rng(11)
    d, n = 24, 80
    mean, covariance = np.zeros(d), np.eye(d)
    # ‖δ‖² + d·(σ - 1)² is 2.4 for both: one is shifted and narrow in spread, the other is wide.
    shifted = np.full(d, np.sqrt(2.4 / d)), 1.0
    wide = np.zeros(d), 1 + np.sqrt(2.4 / d)
    raw, corrected = [], []
    for delta, sigma in (shifted, wide):
        found = [
            ours.frechet_groups(delta + sigma * rng.normal(size=(n, d)), np.arange(n) % 40, mean, covariance)
            for _ in range(30)
        ]
        raw.append(np.mean([value for value, _ in found]))
        corrected.append(np.mean([jackknife_corrected(*one) for one in found]))
    assert raw[1] - raw[0] > 0.5
    assert min(raw) > 2.4 + 1
    assert abs(corrected[1] - corrected[0]) < 0.5 * (raw[1] - raw[0])


def test_the_bias_of_frechet_against_an_exact_reference_is_its_closed_form() -> None:
    """n·E FD(n) = tr Σ + ½(Σ_{i≠j} λiλj/(λi+λj) + Σ λi) to first order: 48.9 for 64 features with λ = 1/k (facts: 48).

    ‖x̄-μ‖² gives tr Σ/n, and the Bures distance of a sample covariance ½ Σ |Δij|²/(λi+λj) with Wishart moments.
    """
    rng = np.random.default_rng(12)
    d, n = 64, 4000
    values = 1 / np.arange(1, d + 1)
    pairs = np.outer(values, values) / np.add.outer(values, values)
    expected = values.sum() + 0.5 * (pairs.sum() - np.trace(pairs) + values.sum())
    assert expected == pytest.approx(48, rel=0.03)
    found = []
    for _ in range(8):
        x = rng.normal(size=(n, d)) * np.sqrt(values)
        found.append(n * ours.frechet_distance(*moments(x), np.zeros(d), np.diag(values)))
    assert np.mean(found) == pytest.approx(expected, rel=0.04)


def test_fid_of_moments_is_torch_fidelitys() -> None:
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    rng = np.random.default_rng(13)
    x, y = rng.normal(0.3, 2, (200, 12)), rng.normal(size=(150, 12)) @ rng.normal(size=(12, 12))
    (m1, c1), (m2, c2) = moments(x), moments(y)
    stock = fid_statistics_to_metric({"mu": m1, "sigma": c1}, {"mu": m2, "sigma": c2}, False)
    value = ours.frechet_groups(x, one_group_each(x), m2, c2)[0]
    assert value == pytest.approx(next(iter(stock.values())), rel=1e-6)
