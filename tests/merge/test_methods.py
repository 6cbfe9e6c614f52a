"""Merge methods against independent oracles: numpy, scipy, closed forms, cases worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats
import torch
from torch import Tensor

from ambergrade.errors import BadSetting
from ambergrade.merge.formula import Formula
from ambergrade.merge.method import Context, Method
from ambergrade.merge.mixture import mixer
from ambergrade.merge.selection import largest


def call(name: str, *tensors: Tensor, **parameters: Any) -> Tensor:
    method = Method.read(name)
    return method.function(*tensors, **{**method.parameters, **parameters}, context=Context("some.weight"))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# slerp ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [0.0, 0.25, 0.5, 1.0, -0.3])
def test_slerp_turns_at_an_even_pace(t: float) -> None:
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([math.cos(1.2), math.sin(1.2)])
    expected = torch.tensor([math.cos(1.2 * t), math.sin(1.2 * t)])
    torch.testing.assert_close(call("slerp", x, y, t=t), expected, rtol=1e-6, atol=1e-7)


def test_slerp_of_matrices_against_a_rotation_by_scipy() -> None:
    """Rotating in the plane of x and y by a part of the angle is the exponential of that part of the generator."""
    x, y = random(3, 2, seed=1).numpy().astype(float).ravel(), random(3, 2, seed=2).numpy().astype(float).ravel()
    y *= np.linalg.norm(x) / np.linalg.norm(y)  # of one length, so that the arc is a rotation
    first = x / np.linalg.norm(x)
    second = y - first * (first @ y)
    second /= np.linalg.norm(second)
    angle = math.acos(x @ y / (x @ x))
    rotation = scipy.linalg.expm(0.3 * angle * (np.outer(second, first) - np.outer(first, second)))
    found = call("slerp", *(torch.tensor(v.reshape(3, 2), dtype=torch.float32) for v in (x, y)), t=0.3)
    np.testing.assert_allclose(found.numpy().ravel(), rotation @ x, rtol=1e-5)


def test_slerp_of_parallel_opposite_and_empty_directions_is_the_chord() -> None:
    x = random(5)
    torch.testing.assert_close(call("slerp", x, 3 * x, t=0.25), 1.5 * x)
    torch.testing.assert_close(call("slerp", x, -x, t=0.25), 0.5 * x)
    torch.testing.assert_close(call("slerp", torch.zeros(5), x, t=0.25), 0.25 * x)


# ties, breadcrumbs ---------------------------------------------------------------------------------------------------


def test_ties_by_hand() -> None:
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    # Differences (4, -1, 2, 0.5) and (-3, -2, 0.1, 1): half kept is (4, 0, 2, 0) and (-3, -2, 0, 0). The sums 1, -2, 2,
    # 0 elect + - +; agreeing are 4, -2, 2.
    one, two = base + torch.tensor([4.0, -1.0, 2.0, 0.5]), base + torch.tensor([-3.0, -2.0, 0.1, 1.0])
    torch.testing.assert_close(call("ties", base, one, two, density=0.5), torch.tensor([5.0, -1.0, 3.0, 1.0]))
    torch.testing.assert_close(
        call("ties", base, one, two, density=0.5, weight=0.5), torch.tensor([3.0, 0.0, 2.0, 1.0])
    )


@pytest.mark.parametrize("density", [0.1, 0.35, 1.0])
def test_ties_against_numpy(density: float) -> None:
    base, models = random(13, 9), [random(13, 9, seed=seed) for seed in (1, 2, 3)]
    vectors = np.stack([(model - base).numpy().ravel() for model in models])
    for row in vectors:
        row[np.argsort(np.abs(row))[: row.size - max(1, round(density * row.size))]] = 0
    elected = np.sign(vectors.sum(0))
    expected = [
        np.mean([v for v in column if v and np.sign(v) == sign] or [0.0])
        for column, sign in zip(vectors.T, elected, strict=True)
    ]
    found = (call("ties", base, *models, density=density) - base).numpy().ravel()
    np.testing.assert_allclose(found, expected, atol=1e-6)


def rounded_difference() -> Tensor:
    """Two models in bf16 share values: half of it is a few hundred values that come again and again."""
    base = random(64, 50, seed=1).bfloat16()
    return (base.float() * (1 + 0.01 * random(64, 50, seed=2))).bfloat16().float() - base.float()


@pytest.mark.parametrize("density", [0.14, 0.2, 0.29, 0.5])
def test_fractions_are_exact_counts_of_equal_magnitudes_the_earlier_stay(density: float) -> None:
    """Thresholds kept 0.347 of such weights for 0.2."""
    x = rounded_difference()
    found = largest(x, density)
    order = np.lexsort((np.arange(x.numel()), -np.abs(x.numpy().ravel())))[: round(density * x.numel())]
    expected = np.zeros(x.numel(), np.float32)
    expected[order] = x.numpy().ravel()[order]
    np.testing.assert_array_equal(found.numpy().ravel(), expected)
    base = torch.zeros_like(x)
    kept = call("ties", base, x, density=density)
    assert int((kept != 0).sum()) == int((found != 0).sum()) <= round(density * x.numel())
    same = torch.ones(100)
    left = call("breadcrumbs", same, smallest=1 - density - 0.01, largest=0.01)
    assert float(left.sum()) == round(100 * density)
    assert left[0] == 0  # the earlier counts as the larger
    assert left[1] == 1


@pytest.mark.parametrize("option", ["rank=2.7", "rank=a"])
def test_what_is_counted_is_a_whole_number(option: str) -> None:
    formula = Formula.parse(f"x + low_rank(y - x, {option})", ["x", "y"])
    with pytest.raises(BadSetting, match=r"low_rank\(rank=2\.7\): rank is a whole number"):
        mixer(formula, {"a": 2.7} if formula.coefficients else {})("w")
    seeds = Formula.parse("x + dare(y - x, seed=1.5)", ["x", "y"])
    with pytest.raises(BadSetting, match="seed is a whole number"):
        mixer(seeds, {})("w")


def test_breadcrumbs_drops_both_ends() -> None:
    difference = torch.tensor([0.1, -5.0, 0.2, -0.3, 9.0, 0.4, 0.5, -0.6, 0.7, 0.8])
    expected = torch.tensor([0.0, -5.0, 0.0, 0.0, 0.0, 0.4, 0.5, -0.6, 0.7, 0.8])
    assert torch.equal(call("breadcrumbs", difference, smallest=0.3, largest=0.1), expected)
    x = random(30, 20).numpy()
    order = np.argsort(np.abs(x).ravel())
    kept = np.zeros(x.size, bool)
    kept[order[int(0.85 * x.size) : x.size - int(0.01 * x.size)]] = True
    np.testing.assert_array_equal(call("breadcrumbs", torch.tensor(x)).numpy().ravel(), np.where(kept, x.ravel(), 0))
    with pytest.raises(BadSetting, match="keeps nothing"):
        call("breadcrumbs", difference, smallest=0.6, largest=0.5)


# dare, della ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_dare_keeps_its_share_rescaled(density: float) -> None:
    x = random(300, 200) + 3
    found = call("dare", x, density=density)
    kept = found != 0
    torch.testing.assert_close(found[kept], (x / density)[kept])
    interval = scipy.stats.binomtest(int(kept.sum()), x.numel(), density).proportion_ci(0.9999)
    assert interval.low <= density <= interval.high


def test_the_expectation_of_dare_and_della_is_the_difference() -> None:
    x = random(8, 6)
    for name in ("dare", "della"):
        draws = call(name, x.repeat(4000, 1), density=0.5).reshape(4000, 8, 6).double()
        error = (draws.mean(0) - x).abs() / (draws.std(0) / math.sqrt(len(draws)))
        assert error.max() < 4.5, name


def test_della_drops_small_elements_sooner() -> None:
    """Per row, the chance to be kept falls from 0.9 for the largest by 0.8 / n a rank."""
    x = torch.tensor([[1.0, -4.0, 3.0, 2.0], [-0.04, 0.01, 0.02, -0.03]])
    draws = call("della", x.repeat(4000, 1), density=0.5, window=0.8).reshape(4000, 2, 4)
    chance = torch.tensor([[0.3, 0.9, 0.7, 0.5], [0.9, 0.3, 0.5, 0.7]])
    torch.testing.assert_close((draws != 0).double().mean(0), chance.double(), rtol=0, atol=0.035)
    kept = (x / chance).expand_as(draws)
    torch.testing.assert_close(draws[draws != 0], kept[draws != 0])


def test_della_without_a_window_is_dares_kind() -> None:
    x = random(50, 40)
    found = call("della", x, density=0.4, window=0.0)
    torch.testing.assert_close(found[found != 0], (x / 0.4)[found != 0])
    with pytest.raises(BadSetting, match=r"chances to be dropped, -0\.1"):
        call("della", x, density=0.9, window=0.4)


# model stock, geometric median ---------------------------------------------------------------------------------------


def test_model_stock_of_two_by_the_papers_equation() -> None:
    base = random(4, 5)
    one, two = random(4, 5, seed=1).double(), random(4, 5, seed=2).double()
    two = two - one * (one * two).sum() / (one * one).sum()
    two = two / two.norm() * one.norm()
    for angle in (0.4, 1.2):
        other = math.cos(angle) * one + math.sin(angle) * two
        t = 2 * math.cos(angle) / (1 + math.cos(angle))
        expected = base + t * (one + other) / 2
        found = call("model_stock", base, (base + one).float(), (base + other).float())
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_model_stock_is_the_base_for_orthogonal_and_the_mean_for_equal_differences() -> None:
    base = torch.zeros(3)
    x, y, z = torch.eye(3)
    assert torch.equal(call("model_stock", base, x, y, z), base)
    assert torch.equal(call("model_stock", base, x, -x), base)
    torch.testing.assert_close(call("model_stock", base, x, x, x), x)
    # Pairs of cosines 1, 0, 0: their mean c = 1/3, t = 3c / (1 + 2c) = 3/5, of the mean (2/3, 1/3, 0).
    torch.testing.assert_close(call("model_stock", base, x, x, y), torch.tensor([0.4, 0.2, 0.0]))


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_the_geometric_median_is_where_scipy_finds_it(count: int) -> None:
    models = [random(6, seed=seed) * (8 if seed == 1 else 1) for seed in range(count)]
    points = np.stack([model.numpy() for model in models]).astype(float)

    def total(y: Any) -> Any:
        return np.linalg.norm(points - y, axis=1).sum()

    best = scipy.optimize.minimize(total, points.mean(0), method="BFGS", options={"gtol": 1e-10})
    found = call("geometric_median", *models).numpy()
    assert total(found) == pytest.approx(best.fun, rel=1e-6)
    if count > 2:  # of two, every point between them is one
        np.testing.assert_allclose(found, best.x, atol=1e-3)


def test_the_geometric_median_may_be_one_of_the_models() -> None:
    corner = torch.tensor([0.0, 0.0])  # of a triangle with more than 120 degrees there (Fermat's point)
    found = call("geometric_median", torch.tensor([-1.0, 0.2]), corner, torch.tensor([1.0, 0.2]))
    assert torch.equal(found, corner)
    far = random(5) + 100
    near = random(5)
    assert torch.equal(call("geometric_median", near, far, near, near), near)
    torch.testing.assert_close(call("geometric_median", near, far), (near + far) / 2)


def test_the_geometric_median_of_a_regular_triangle_is_its_middle() -> None:
    points = [torch.tensor([math.cos(a), math.sin(a)]) for a in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)]
    torch.testing.assert_close(call("geometric_median", *points), torch.zeros(2), atol=1e-6, rtol=0)


# train difference, tensor sum, low rank ------------------------------------------------------------------------------


def test_train_difference_by_hand() -> None:
    base, tuned, origin = (
        torch.tensor([0.0, 2.0, 5.0, 1.0]),
        torch.tensor([3.0, 2.0, 4.0, 1.0]),
        torch.tensor([2.0, 1.0, 7.0, 1.0]),
    )
    # tuned - origin: 1, 1, -3, 0; |tuned - base|: 3, 0, 1, 0; shares: 3/4, 0, 1/4, 0.
    expected = base + 1.8 * 0.5 * torch.tensor([0.75, 0.0, -0.75, 0.0])
    torch.testing.assert_close(call("train_difference", base, tuned, origin, weight=0.5), expected)


@pytest.mark.parametrize(
    ("width", "offset", "rows"),
    [
        (0.5, 0.0, {0, 1, 2, 3}),
        (0.25, 0.5, {4, 5}),
        (0.5, 0.75, {6, 7, 0, 1}),
        (1.0, 0.3, set(range(8))),
        (0.0, 0.3, set()),
    ],
)
def test_tensor_sum_takes_a_band_of_rows(width: float, offset: float, rows: set[int]) -> None:
    x, y = torch.zeros(8, 3), torch.ones(8, 3)
    found = call("tensor_sum", x, y, width=width, offset=offset)
    assert {row for row in range(8) if found[row, 0] == 1} == rows
    assert ((found == 0).all(1) | (found == 1).all(1)).all()


def test_tensor_sum_takes_a_tenth_of_ten_rows_wherever_it_begins() -> None:
    """0.7 + 0.1 is 0.7999999999999999 in floats, and took no row."""
    for place in range(10):
        found = call("tensor_sum", torch.zeros(10), torch.ones(10), width=0.1, offset=place / 10)
        assert found.nonzero().tolist() == [[place]]


@pytest.mark.parametrize("ramp", [0.0, 0.4])
def test_crossover_of_waves_takes_those_above_the_cut(ramp: float) -> None:
    """Cosines of 2, 5 and 7 periods in 16 samples have 0.25, 0.625 and 0.875 of the highest frequency."""
    time = torch.arange(16, dtype=torch.float64)

    def wave(periods: int) -> Tensor:
        return torch.cos(2 * math.pi * periods * time / 16).float()

    shares = [0.0, 1.0, 1.0] if not ramp else [0.0, 0.8125, 1.0]  # (0.625 - 0.5) / 0.4 + 0.5
    expected = 3 + sum(share * wave(periods) for share, periods in zip(shares, (2, 5, 7), strict=True))
    found = call("crossover", torch.full((16,), 3.0), 4 + wave(2) + wave(5) + wave(7), cutoff=0.5, ramp=ramp)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_crossover_in_two_dimensions_against_the_matrix_of_the_transform() -> None:
    x, y = random(6, 5), random(6, 5, seed=1)
    rows, columns = scipy.linalg.dft(6), scipy.linalg.dft(5)
    spectrum = rows @ (y - x).numpy().astype(float) @ columns.T
    cycles = [np.array([0, 1, 2, 3, 2, 1]) / 3, np.array([0, 1, 2, 2, 1]) / 2]
    radius = np.sqrt((cycles[0][:, None] ** 2 + cycles[1][None] ** 2) / 2)
    kept = np.where(radius >= 0.6, spectrum, 0)
    expected = x.numpy() + (np.linalg.inv(rows) @ kept @ np.linalg.inv(columns).T).real
    np.testing.assert_allclose(call("crossover", x, y, cutoff=0.6).numpy(), expected, atol=1e-6)
    torch.testing.assert_close(call("crossover", x, y, cutoff=0.0), y)
    torch.testing.assert_close(call("crossover", x, y, cutoff=1.1), x)


@pytest.mark.parametrize("shape", [(20, 12), (9, 30), (6, 4, 3, 3)])
def test_low_rank_is_scipys_truncated_svd(shape: tuple[int, ...]) -> None:
    x = random(*shape)
    u, s, v = scipy.linalg.svd(x.numpy().astype(float).reshape(shape[0], -1), full_matrices=False)
    expected = ((u[:, :3] * s[:3]) @ v[:3]).reshape(shape)
    np.testing.assert_allclose(call("low_rank", x, rank=3).numpy(), expected, atol=1e-6)
    assert torch.equal(call("low_rank", x, rank=64), x)
    assert torch.equal(call("low_rank", random(7), rank=3), random(7))
