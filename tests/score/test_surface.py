"""The surface over two coefficients: exact on a quadratic, honest under noise, and fair to points of a race."""

import math

import numpy as np
import pytest

from ambergrade.score.surface import fit_surface

GRID = np.array([(a, b) for a in (0.0, 0.4, 0.8, 1.2, 1.6) for b in (0.0, 0.5, 1.0, 1.5, 2.0)])


def quadratic(places, best=(0.7, 1.2)):
    a, b = places[:, 0] - best[0], places[:, 1] - best[1]
    return 0.9 - 0.2 * a**2 - 0.1 * b**2 + 0.05 * a * b


def drawn(rng, prompts=60, noise=0.05, best=(0.7, 1.2)):
    levels = rng.normal(0, 0.3, prompts)  # a prompt is easy or hard for every point
    return quadratic(GRID, best)[:, None] + levels + rng.normal(0, noise, (len(GRID), prompts))


def test_a_quadratic_is_found_exactly_whatever_levels_its_prompts_have():
    scores = drawn(np.random.default_rng(0), noise=0.0)
    found = fit_surface(GRID, scores)
    assert found.best == pytest.approx((0.7, 1.2), abs=0.02)
    assert found.explained == pytest.approx(1)
    at = np.array([[0.2, 0.3], [1.0, 1.7]])
    heights = found.heights(at[:, 0], at[:, 1])
    assert heights[1] - heights[0] == pytest.approx(float(np.diff(quadratic(at))[0]))


def test_lower_is_better_finds_the_lowest_place():
    scores = -drawn(np.random.default_rng(0), noise=0.0)
    assert fit_surface(GRID, scores, higher_is_better=False).best == pytest.approx((0.7, 1.2), abs=0.02)


def test_the_interval_covers_the_true_optimum_in_about_95_percent_of_repetitions():
    covered = np.zeros(2)
    for seed in range(120):
        found = fit_surface(GRID, drawn(np.random.default_rng(seed), prompts=30, noise=0.2), seed=seed)
        covered += [low <= true <= high for (low, high), true in zip(found.intervals, (0.7, 1.2), strict=True)]
    assert (covered / 120 >= 0.88).all(), covered / 120


def test_points_that_left_a_race_take_part_on_the_prompts_they_have():
    scores = drawn(np.random.default_rng(1), noise=0.0)
    raced = scores.copy()
    raced[np.argsort(quadratic(GRID))[:15], 12:] = np.nan  # the worst saw twelve prompts
    assert fit_surface(GRID, raced).best == pytest.approx((0.7, 1.2), abs=0.02)


def test_an_optimum_beyond_the_grid_stays_on_its_edge():
    found = fit_surface(GRID, drawn(np.random.default_rng(2), noise=0.0, best=(3.0, 1.0)))
    assert found.best[0] == pytest.approx(1.6)


@pytest.mark.parametrize("places", [GRID[:8], GRID[GRID[:, 0] < 0.5], np.stack([GRID[:, 0], GRID[:, 0]], axis=1)])
def test_no_surface_is_claimed_where_none_is_decided(places):
    assert fit_surface(places, np.ones((len(places), 20))) is None


def test_too_few_prompts_have_no_interval():
    found = fit_surface(GRID, drawn(np.random.default_rng(3), prompts=3))
    assert all(math.isnan(limit) for pair in found.intervals for limit in pair)
