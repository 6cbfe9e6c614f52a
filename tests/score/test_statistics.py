"""Intervals and tests against scipy, closed forms and simulated coverage."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tracemalloc
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ambergrade.errors import BadInput
from ambergrade.score import statistics as ours


def test_prompt_means_cluster_the_pictures_of_a_prompt_and_leave_out_what_was_not_scored() -> None:
    values = np.array([1.0, 2.0, 3.0, np.nan, 5.0, np.nan])
    means = ours.prompt_means(values, ["b", "a", "b", "a", "a", "c"])
    np.testing.assert_allclose(means, [2.0, 3.5, np.nan])


@pytest.mark.parametrize(("hits", "n"), [(0, 20), (7, 20), (20, 20), (3, 1000), (1, 1)])
def test_wilson_interval_is_scipys(hits: int, n: int) -> None:
    reference = stats.binomtest(hits, n).proportion_ci(method="wilson")
    low, high = ours.wilson_interval(hits, n)
    assert (float(low), float(high)) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_wilson_interval_of_nothing_is_not_a_number() -> None:
    assert np.isnan(ours.wilson_interval([0], [0])).all()


def test_mean_interval_is_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(0).gamma(2.0, size=60)
    found = ours.mean_interval(values, draws=20_000)
    level = 1 - 2 * stats.norm.cdf(-np.sqrt(60 / 59) * stats.t.isf(0.025, 59))  # Hesterberg's expanded percentile
    reference = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, confidence_level=level, rng=1
    ).confidence_interval
    error = values.std() / np.sqrt(60)
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(reference.low, abs=0.05 * error)
    assert found.high == pytest.approx(reference.high, abs=0.05 * error)


def test_mean_interval_leaves_out_and_counts_what_was_not_scored() -> None:
    values = np.array([1.0, np.nan, 3.0, np.nan])
    assert (ours.mean_interval(values).value, ours.mean_interval(values).n) == (2.0, 2)
    nothing = ours.mean_interval(np.array([np.nan]))
    assert np.isnan(nothing.value)
    assert nothing.n == 0


def test_mean_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    draws = rng.gamma(2.0, size=(400, 80))  # mean 2, skewed
    found = [ours.mean_interval(values, seed=k, draws=400) for k, values in enumerate(draws)]
    covered = np.mean([m.low <= 2.0 <= m.high for m in found])
    assert 0.91 <= covered <= 0.975


def test_resampling_keeps_the_number_of_prompts_and_pairs_points_by_one_draw() -> None:
    weights = ours.resampling_weights(30, seed=4, draws=50)
    assert (weights.sum(1) == 30).all()
    np.testing.assert_array_equal(weights, ours.resampling_weights(30, seed=4, draws=50))
    assert not np.array_equal(weights, ours.resampling_weights(30, seed=5, draws=50))


def test_numbers_are_the_same_in_another_process() -> None:
    code = "from ambergrade.score.statistics import *; print(resampling_weights(9, draws=40).tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(ours.resampling_weights(9, draws=40).tolist())


def test_sign_flips_are_scipys_exact_permutation_test() -> None:
    differences = np.array([0.4, -0.1, 0.9, 0.3, 0.2, -0.2, 0.7, 0.5])
    reference = stats.permutation_test(
        (differences,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
    )
    assert ours.sign_flips(differences)[0] == pytest.approx(reference.pvalue)


def test_the_interval_of_sign_flips_is_every_difference_that_scipy_s_test_does_not_reject() -> None:
    differences = np.array([0.4, -0.1, 0.9, 0.3, 0.2, -0.2, 0.7, 0.55])
    _, low, high = ours.sign_flips(differences)
    for theta, inside in ((low - 1e-6, 0), (low + 1e-6, 1), (high - 1e-6, 1), (high + 1e-6, 0)):
        reference = stats.permutation_test(
            (differences - theta,), np.sum, permutation_type="samples", n_resamples=np.inf, alternative="two-sided"
        )
        assert (reference.pvalue > 0.05) == inside, theta


def test_sign_flips_of_many_prompts_come_near_the_t_test() -> None:
    differences = np.random.default_rng(3).normal(0.35, 1.0, size=50)
    p, low, high = ours.sign_flips(differences)
    assert p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, abs=0.008)
    expected = stats.ttest_1samp(differences, 0).confidence_interval()
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_paired_difference_is_much_sharper_than_its_parts_and_says_what_it_could_see() -> None:
    rng = np.random.default_rng(4)
    prompt, noise = rng.normal(0, 3, size=60), rng.normal(0, 0.3, size=60)
    base, point = prompt, prompt + 0.2 + noise
    found = ours.paired_difference(point, base)
    assert found.value == pytest.approx(0.2 + noise.mean())
    assert found.high - found.low < 0.1 * (ours.mean_interval(base).high - ours.mean_interval(base).low)
    assert found.detectable == pytest.approx(2.8 * noise.std(ddof=1) / np.sqrt(60))
    assert found.verdict == "better"
    assert ours.paired_difference(point, base, higher_is_better=False).verdict == "worse"
    assert ours.paired_difference(base, base).verdict == "undecided"


def test_paired_difference_uses_only_prompts_scored_in_both() -> None:
    found = ours.paired_difference(np.array([1.0, np.nan, 4.0]), np.array([0.0, 5.0, np.nan]))
    assert (found.value, found.n) == (1.0, 1)


def test_jackknife_error_of_a_mean_is_the_standard_error() -> None:
    values = np.random.default_rng(5).normal(size=25)
    leave_out = (values.sum() - values) / 24
    assert ours.jackknife_error(leave_out) == pytest.approx(stats.sem(values))


def test_a_jackknifed_value_s_interval_and_p_are_student_s() -> None:
    low, high, p = ours.t_interval(1.3, 0.7, 12)
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 11, loc=1.3, scale=0.7))
    assert p == pytest.approx(2 * stats.t.sf(1.3 / 0.7, 11))
    assert ours.t_interval(0.0, 0.0, 12) == (0.0, 0.0, 1.0)


def test_paired_differences_cover_the_truth_and_never_contradict_their_p() -> None:
    rng = np.random.default_rng(14)
    covered = 0
    for k in range(300):
        apart = rng.gamma(2.0, size=30) - 2.0  # mean 0, skewed
        found = ours.paired_difference(apart, np.zeros(30), seed=k, draws=999)
        covered += found.low <= 0 <= found.high
        assert (found.verdict == "undecided") == (found.p > 0.05)
    assert 0.91 <= covered / 300 <= 0.975
    for prompts in (6, 7, 12, 40):  # of a bootstrap too, at every place of zero
        replicates = np.sort(rng.normal(size=2000))
        for shift in np.append(np.quantile(replicates, [0.0, 0.002, 0.01, 0.02, 0.025, 0.03, 0.5, 0.98, 1.0]), 0.0):
            found = ours.bootstrap_difference(0.0, replicates - shift, prompts, True)
            assert (found.low > 0 or found.high < 0) == (found.p < 0.05), (prompts, shift)


def binary(rng: np.random.Generator, points: int, prompts: int) -> np.ndarray:
    """Pictures that show a rare tag or not."""
    return (rng.random((points, prompts)) < 0.02).astype(np.float64)


def near_equal(rng: np.random.Generator, points: int, prompts: int) -> np.ndarray:
    """One prompt on which the points differ, by little."""
    scores = np.tile(rng.normal(60, 5, prompts), (points, 1))
    scores[:, rng.integers(prompts)] += rng.permutation(points) / 100
    return scores


def half_tied(rng: np.random.Generator, points: int, prompts: int) -> np.ndarray:
    """Half of the prompts score alike at every point, the others in steps of a third."""
    scores = np.tile(rng.normal(60, 5, prompts), (points, 1))
    scores[:, ::2] += rng.integers(0, 4, (points, len(scores[0, ::2]))) / 3
    return scores


def rounded(rng: np.random.Generator, points: int, prompts: int) -> np.ndarray:
    """Equal numbers, summed in another order: every prompt a little higher at the later points."""
    return rng.normal(60, 5, prompts) * (1 + 1e-14 * np.arange(points)[:, None])


@pytest.mark.parametrize("draw", [binary, near_equal, half_tied, rounded])
def test_points_of_one_model_show_a_false_winner_in_5_percent_at_most_whatever_ties_they_have(draw: Any) -> None:
    runs, false = 120, np.zeros(3)
    for k in range(runs):
        points = 2 + 3 * (k % 2)
        scores = draw(np.random.default_rng(k), points, 40)
        false[0] += len(ours.winner_set(scores, seed=k, draws=300).members) < points
        false[1] += any(d.verdict != "undecided" for d in ours.simultaneous_differences(scores[1:], scores[0], seed=k))
        false[2] += ours.paired_difference(scores[1], scores[0], seed=k, draws=300).verdict != "undecided"
    assert (false / runs <= 0.10).all(), false  # 5 % meant, 2 standard errors 4 %


def test_one_prompt_of_40_crowns_nobody_and_has_p_1() -> None:
    scores = np.zeros((2, 40))
    scores[0, 3] = 1
    assert ours.winner_set(scores).members == (0, 1)
    found = ours.paired_difference(scores[0], scores[1])
    assert (found.p, found.low, found.verdict) == (1.0, 0.0, "undecided")
    assert ours.simultaneous_differences(scores[:1], scores[1])[0].p == 1.0
    rng = np.random.default_rng(0)
    near = np.tile(rng.random(40), (2, 1))
    near[0, 7] += 0.01
    assert ours.paired_difference(near[0], near[1]).verdict == "undecided"
    assert ours.simultaneous_differences(near[:1], near[1])[0].verdict == "undecided"


def test_a_constant_difference_is_as_significant_as_its_number_of_prompts() -> None:
    """All of P prompts by the same 0.1: exact p is 2 of 2^P patterns."""
    for prompts in (3, 5, 6, 9):
        base = np.random.default_rng(prompts).normal(size=prompts)
        scores = np.stack([base, base + 0.1])
        for found in (
            ours.paired_difference(scores[1], base),
            *ours.simultaneous_differences(scores[1:], base),
        ):
            assert found.p == pytest.approx(2.0 ** (1 - prompts))
            assert (found.verdict == "better") == (prompts >= 6)
        assert ours.winner_set(scores).members == ((1,) if prompts >= 6 else (0, 1))


@pytest.mark.parametrize("prompts", [2, 3, 4, 5])
def test_too_few_prompts_give_no_interval_and_no_verdict(prompts: int) -> None:
    scores = np.random.default_rng(prompts).random((3, prompts)) + np.arange(3)[:, None]
    found = ours.winner_set(scores)
    assert found.members == (0, 1, 2)
    assert np.isnan([*found.low, *found.high]).all()
    for pair in (ours.paired_difference(scores[2], scores[0]), *ours.simultaneous_differences(scores[1:], scores[0])):
        assert np.isnan([pair.low, pair.high]).all()
        assert pair.verdict == "undecided"
    assert np.isnan(ours.mean_interval(scores[0]).low)
    assert np.isnan(ours.bootstrap_difference(1.0, np.ones(50), prompts, True).p)


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_an_infinite_score_is_told_with_its_place(value: float) -> None:
    scores = np.random.default_rng(0).normal(size=(3, 20))
    scores[1, 7] = value
    with pytest.raises(BadInput, match="Point 1 has an infinite score on prompt 7"):
        ours.winner_set(scores)


def test_winner_set_holds_all_points_when_all_are_the_same_model() -> None:
    rng = np.random.default_rng(6)
    false_winners = 0
    for k in range(200):
        scores = rng.normal(0, 3, size=(1, 40)) + rng.normal(size=(9, 40))
        false_winners += len(ours.winner_set(scores, seed=k, draws=300).members) < 9
    assert false_winners / 200 <= 0.10  # 5 % meant, 2 standard errors 3 %


def test_winner_set_finds_the_better_points_and_only_them() -> None:
    rng = np.random.default_rng(7)
    scores = rng.normal(0, 3, size=(1, 60)) + rng.normal(0, 0.5, size=(6, 60))
    scores[2] += 1.0
    scores[4] += 0.95
    found = ours.winner_set(scores)
    assert set(found.members) == {2, 4}
    assert found.best in found.members
    assert found.behind[found.best] == 0.0
    assert set(ours.winner_set(-scores, higher_is_better=False).members) == {2, 4}


def test_winner_set_of_equal_points_is_all_of_them() -> None:
    one = np.random.default_rng(8).normal(size=20)
    assert ours.winner_set(np.stack([one, one, one - 100])).members == (0, 1)
    assert ours.winner_set(one[None]).members == (0,)


def test_winner_set_compares_on_the_prompts_that_every_point_has() -> None:
    scores = np.random.default_rng(9).normal(size=(3, 20))
    scores[1, 5] = np.nan
    assert ours.winner_set(scores).n == 19
    with pytest.raises(BadInput, match="at least 2 prompts"):
        ours.winner_set(scores[:, :1])


@pytest.mark.parametrize(("n", "other"), [(6, 10), (12, 96), (48, 96), (96, 12)])
def test_a_t_of_another_number_of_prompts_is_as_unlikely(n: int, other: int) -> None:
    t = np.array([0.5, 2.0, 4.0])
    expected = stats.t.isf(stats.t.sf(t, n - 1), other - 1)
    np.testing.assert_allclose(ours._t_of_other_size(t, n, other), expected, rtol=1e-9)


def test_points_of_a_race_that_were_left_behind_stay_in_the_family() -> None:
    """Every pattern of signs of 10 prompts by hand; the third point has 6 of them, the fourth 4."""
    rng = np.random.default_rng(10)
    scores = rng.normal(0, 2, 10) + rng.normal(size=(4, 10))
    scores[2, 6:] = scores[3, 4:] = np.nan
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=10)))
    largest = np.zeros(len(signs))
    for one, other in itertools.combinations(range(4), 2):
        both = ~np.isnan(scores[one] + scores[other])
        flipped = signs[:, both] * (scores[one] - scores[other])[both]
        t = np.abs(flipped.mean(1)) / stats.sem(flipped, axis=1)
        largest = np.maximum(largest, stats.norm.isf(stats.t.sf(t, both.sum() - 1)))  # on one scale
    for error in (0.1, 0.3):
        expected = stats.t.isf(stats.norm.sf(np.quantile(largest, 1 - error, method="inverted_cdf")), 9)
        found = ours.winner_set(scores, alive=[0, 1], error=error, draws=20_000)
        width = (found.high[1 - found.best] - found.low[1 - found.best]) / 2
        assert width == pytest.approx(expected * stats.sem(scores[0] - scores[1]), rel=0.06)
        assert np.isnan(found.behind[2:]).all()
        assert set(found.members) <= {0, 1}
    alone = ours.winner_set(scores[:2], draws=20_000, error=0.3)
    assert alone.high[1 - alone.best] - alone.low[1 - alone.best] < 2 * width  # a smaller family, a smaller interval


def test_a_winner_set_of_all_points_is_the_race_s_last_look_at_the_same_error() -> None:
    scores = np.random.default_rng(11).normal(size=(5, 20)) + np.arange(5)[:, None] / 4
    assert ours.winner_set(scores) == ours.winner_set(scores, alive=range(5), error=0.05)
    strict = ours.winner_set(scores, error=0.001)
    assert set(strict.members) >= set(ours.winner_set(scores).members)
    assert ours.winner_set(scores, alive=[0, 1]).best in (0, 1)


def raced(points: int, prompts: int) -> np.ndarray:
    """Scores as a race leaves them: a third of the points on a third of the prompts, a third on two thirds."""
    scores = np.random.default_rng(5).normal(size=(points, prompts))
    scores[: points // 3, prompts // 3 :] = np.nan
    scores[points // 3 : 2 * points // 3, 2 * prompts // 3 :] = np.nan
    return scores


@pytest.mark.parametrize("at_once", [1, 7, 300])
def test_winner_set_does_not_depend_on_how_many_pairs_are_compared_at_once(
    monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    scores, alive = raced(24, 30), range(16, 24)
    whole = [ours.winner_set(scores[16:], draws=300), ours.winner_set(scores, alive=alive, error=0.02)]
    monkeypatch.setattr(ours, "PAIRS_AT_ONCE", at_once)
    pieces = [ours.winner_set(scores[16:], draws=300), ours.winner_set(scores, alive=alive, error=0.02)]
    for one, other in zip(whole, pieces, strict=True):
        assert one.members == other.members
        np.testing.assert_allclose(other.low, one.low, rtol=1e-12)
        np.testing.assert_allclose(other.high, one.high, rtol=1e-12)


def test_winner_set_compares_every_pair_on_the_prompts_that_both_have() -> None:
    """Against scipy's studentised t, pair by pair."""
    scores, draws = raced(7, 24), 400
    signs = ours._signs(24, 0, draws)
    largest = np.zeros(draws)
    for one, other in itertools.combinations(scores, 2):
        both = ~np.isnan(one - other)
        t = np.abs(stats.ttest_1samp(signs[:, both] * (one - other)[both], 0.0, axis=1).statistic)
        n = both.sum()
        if n < 24:  # to the t of 24 prompts that is as unlikely
            t = stats.t.isf(stats.t.sf(t, n - 1), 23)
        largest = np.maximum(largest, t)
    expected = np.sort(largest)[-21]  # 5 % of 400 lie beyond it
    assert ours._max_t(scores, 0, draws, 0.05) == pytest.approx(expected, rel=1e-9)


def test_winner_set_of_many_points_stays_small() -> None:
    """A thousand points are half a million pairs; what is held at once does not grow with them."""
    scores = np.random.default_rng(6).normal(size=(500, 144))
    tracemalloc.start()
    try:
        ours.winner_set(scores, draws=200)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 80e6  # 124,750 pairs x 144 prompts x 8 bytes are 144 MB, once
