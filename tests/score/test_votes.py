"""Votes: counts by hand, the interval against its definition, strengths against a logistic regression."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression

from ambergrade.identity import random_seed
from ambergrade.score.votes import Preference, Vote, pairs_of, preference, strengths


def votes(text: str, one: str = "a", other: str = "b") -> list[Vote]:
    """`a`, `b` or `-` for each prompt."""
    return [Vote(f"p{k}", one, other, "" if said == "-" else said) for k, said in enumerate(text)]


def test_preferences_are_counted_from_either_side() -> None:
    given = votes("aab-a") + votes("cc", "a", "c")
    assert preference(given, "a", "b") == Preference(wins=3, losses=1, ties=1)
    assert preference(given, "b", "a") == Preference(wins=1, losses=3, ties=1)
    assert preference(given, "b", "c") == Preference(0, 0, 0)
    assert math.isnan(preference(given, "b", "c").share.low)


def test_several_people_on_one_prompt_are_one_answer() -> None:
    kay, ada, bo = votes("aa-b"), votes("ab-b"), votes("bbbb")
    assert preference([*kay, *ada], "a", "b") == Preference(1, 1, 2)  # 2:0, 1:1, tie, 0:2
    assert preference([*kay, *ada, *bo], "a", "b") == Preference(1, 3, 0)


@pytest.mark.parametrize(("wins", "losses"), [(9, 1), (10, 0), (0, 10), (12, 12), (30, 12)])
def test_the_interval_is_clopper_and_pearson_s(wins: int, losses: int) -> None:
    """Its limits are the shares at which so many wins, or so few, have a chance of 2.5 %."""
    share = Preference(wins, losses, 5).share
    n = wins + losses
    assert (share.value, share.n) == (wins / n, n)
    if wins:
        assert stats.binom.sf(wins - 1, n, share.low) == pytest.approx(0.025)
    else:
        assert share.low == 0
    if losses:
        assert stats.binom.cdf(wins, n, share.high) == pytest.approx(0.025)
    else:
        assert share.high == 1


def test_two_are_ranked_as_they_are_counted() -> None:
    found = strengths(votes("aaaaaab--a"), ["a", "b"])
    # 7 wins, 1 loss, 2 ties, and the one tie that is added
    assert found["a"].value == pytest.approx((7 + 1 + 0.5) / 11)
    assert found["a"].value + found["b"].value == pytest.approx(1)
    assert found["a"].low < found["a"].value < found["a"].high
    assert found["a"].low == pytest.approx(1 - found["b"].high, abs=0.02)
    assert math.isnan(strengths(votes("ab"), ["a", "b"])["a"].low)


def test_four_are_ranked_as_a_logistic_regression_ranks_them() -> None:
    """Bradley and Terry's model is one without intercept, on the difference of indicators."""
    rng, truth = np.random.default_rng(5), [1.0, 0.4, 0.0, -0.8]
    given, rows, said, weights = [], [], [], []
    for prompt, (i, j) in itertools.product(range(40), itertools.combinations(range(4), 2)):
        won = rng.random() < 1 / (1 + math.exp(truth[j] - truth[i]))
        given.append(Vote(f"p{prompt}", str(i), str(j), str(i if won else j)))
        rows.append(np.eye(4)[i] - np.eye(4)[j])
        said.append(int(won))
        weights.append(1.0)
    for i, j in itertools.combinations(range(4), 2):  # the added tie
        rows += [np.eye(4)[i] - np.eye(4)[j]] * 2
        said += [0, 1]
        weights += [0.5, 0.5]
    fit = LogisticRegression(C=1e6, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(rows, said, weights)
    level = fit.coef_[0]
    found = strengths(given, ["0", "1", "2", "3"])
    for i in range(4):
        expected = np.mean([1 / (1 + math.exp(level[j] - level[i])) for j in range(4) if j != i])
        assert found[str(i)].value == pytest.approx(expected, abs=1e-4)
    assert found["0"].low > 0.5 > found["3"].high


def test_who_never_lost_is_still_a_number() -> None:
    given = votes("a" * 12) + votes("b" * 12, "b", "c")
    found = strengths(given, ["a", "b", "c"])
    assert 1 > found["a"].value > found["b"].value > found["c"].value > 0


@pytest.mark.slow
def test_the_interval_of_equals_holds_a_half_as_often_as_it_says() -> None:
    held = 0
    for run in range(200):
        rng = np.random.default_rng(random_seed(1, "equals", run))
        said = "".join(rng.choice(["a", "b", "-"], 40, p=[0.4, 0.4, 0.2]))
        found = strengths(votes(said), ["a", "b"])["a"]
        held += found.low <= 0.5 <= found.high
    assert 182 <= held <= 199  # 95 % of 200, and what chance does to it


def test_every_prompt_is_asked_once_of_two_and_the_sides_are_mixed() -> None:
    found = pairs_of(["a", "b"], 40, most=60, seed=0)
    assert sorted(pair.prompt for pair in found) == list(range(40))
    assert [pair.prompt for pair in found] != list(range(40))
    assert 10 < sum(pair.left == "a" for pair in found) < 30
    assert all({pair.left, pair.right} == {"a", "b"} for pair in found)
    assert found == pairs_of(["a", "b"], 40, most=60, seed=0)
    assert found != pairs_of(["a", "b"], 40, most=60, seed=1)


def test_several_meet_equally_often() -> None:
    found = pairs_of(["a", "b", "c", "d"], 24, most=60, seed=0)
    assert len(found) == 60
    assert set(Counter(frozenset((pair.left, pair.right)) for pair in found).values()) == {10}
    assert len({(pair.prompt, frozenset((pair.left, pair.right))) for pair in found}) == 60
