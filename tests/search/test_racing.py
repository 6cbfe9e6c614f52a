"""Racing finds the planted optimum of a simulated sweep, on a share of the pictures."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from ambergrade.errors import BadSetting
from ambergrade.score.statistics import winner_set
from ambergrade.search.racing import Race, Screened, Screening, look_errors, rank_correlation

GRID = list(itertools.product(range(5), range(5)))
PROMPTS = 400
RUNGS = [25, 50, 100, 200, PROMPTS]
OPTIMUM = (2, 2)


def sweep_scores(seed: int) -> np.ndarray:
    """(25, 400): a hill of 0.3 a step and the noise of the facts file (prompt SD 3, seed SD 1.5, 70 % of it shared)."""
    rng = np.random.default_rng(seed)
    hill = np.array([-0.3 * ((a - OPTIMUM[0]) ** 2 + (b - OPTIMUM[1]) ** 2) for a, b in GRID])
    prompt = rng.normal(0, 3, PROMPTS)
    shared = rng.normal(0, 1.5 * np.sqrt(0.7), PROMPTS)
    own = rng.normal(0, 1.5 * np.sqrt(0.3), (len(GRID), PROMPTS))
    return hill[:, None] + prompt + shared + own


def judge(scores: np.ndarray, alive: Sequence[int], error: float) -> tuple[int, ...]:
    return winner_set(scores, draws=500, error=error, alive=alive).members


def raced(scores: np.ndarray) -> Race:
    names = [str(point) for point in GRID]
    race = Race(names, RUNGS, judge)
    while rung := race.ask():
        for point in rung.points:
            race.tell(point, scores[names.index(point), rung.start : rung.stop])
    return race


def test_a_planted_optimum_is_found_on_two_fifths_of_the_pictures():
    found, share = 0, []
    for seed in range(20):
        scores = sweep_scores(seed)
        race = raced(scores)
        pick = max(race.alive, key=lambda point: np.mean(race.rows(point)))
        full = [str(GRID[k]) for k in winner_set(scores, draws=500).members]
        found += pick in full
        share.append(race.spent / race.full)
    print(f"in the full evaluation's winner set {found}/20, pictures {np.mean(share):.0%}, at most {max(share):.0%}")
    assert found >= 19
    assert np.mean(share) <= 0.4


def test_among_equal_points_none_is_left_behind_more_often_than_the_intervals_allow():
    lost = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        scores = rng.normal(0, 3, 100) + rng.normal(0, 1, (6, 100))
        race = Race(list("abcdef"), [20, 50, 100], judge)
        while rung := race.ask():
            for point in rung.points:
                race.tell(point, scores["abcdef".index(point), rung.start : rung.stop])
        lost += bool(race.out)
    assert lost <= 2  # the looks share 5 %: 3 of 12 has a chance of 2 %


def test_survivors_end_with_the_rows_of_a_full_evaluation():
    scores = sweep_scores(0)
    race = raced(scores)
    for point in race.alive:
        assert race.rows(point) == tuple(scores[[str(p) for p in GRID].index(point)][: len(race.rows(point))])
    assert race.spent == sum(len(race.rows(str(point))) for point in GRID)
    assert race.text.startswith(f"{len(race.alive)} of 25 points left; {race.spent} pictures drawn")


def test_a_failed_point_leaves_and_the_others_go_on():
    race = Race(["a", "b", "c"], [2, 4], lambda scores, alive, error: alive)
    race.ask()
    race.fail("b")
    for point in "ac":
        race.tell(point, [0.0, 1.0])
    rung = race.ask()
    assert rung.points == ("a", "c")
    assert (rung.start, rung.stop) == (2, 4)
    assert "1 failed" in race.text


def test_when_all_fail_the_race_is_over():
    race = Race(["a"], [2, 4], judge)
    race.ask()
    race.fail("a")
    assert race.ask() is None


@pytest.mark.parametrize("rungs", [[], [1, 4], [4, 4], [8, 4]])
def test_rungs_that_cannot_be_meant_are_refused(rungs):
    with pytest.raises(BadSetting):
        Race(["a"], rungs, judge)


def test_an_unfinished_rung_and_wrong_rows_are_refused():
    race = Race(["a", "b"], [2, 4], judge)
    race.ask()
    with pytest.raises(BadSetting, match="asked for 2"):
        race.tell("a", [1.0])
    race.tell("a", [1.0, 2.0])
    with pytest.raises(BadSetting, match="not finished"):
        race.ask()


def test_the_looks_share_one_error():
    for looks in (1, 2, 5):
        errors = look_errors(looks, 0.04)
        assert len(errors) == looks
        assert sum(errors) == pytest.approx(0.04)
        assert errors[-1] >= 0.9 * 0.04
    spent = []
    race = Race(list("abc"), [4, 8, 16], lambda scores, alive, error: spent.append((scores.shape, error)) or alive)
    while rung := race.ask():
        for point in rung.points:
            race.tell(point, [0.0] * (rung.stop - rung.start))
    assert [shape for shape, _ in spent] == [(3, 4), (3, 8), (3, 16)]
    assert [error for _, error in spent] == pytest.approx([0.0025, 0.0025, 0.045])


def test_points_left_behind_stay_in_the_table_as_far_as_they_were_drawn():
    tables = []

    def dropping(scores, alive, error):
        tables.append(scores)
        return alive[:-1]

    race = Race(list("abc"), [2, 4, 6], dropping)
    while rung := race.ask():
        for point in rung.points:
            race.tell(point, [1.0] * 2)
    assert [np.isnan(table).sum(1).tolist() for table in tables] == [[0, 0, 0], [0, 0, 2]]
    assert race.out == {"c": 0, "b": 1}


@pytest.mark.slow
def test_a_race_of_equal_points_leaves_none_behind_in_95_of_100_races():
    """25 points of one model, four looks: the whole race's false eliminations, with a standard error of 1.5 %."""
    lost = 0
    for seed in range(200):
        rng = np.random.default_rng(1000 + seed)
        race = Race([str(k) for k in range(25)], [12, 24, 48, 96], judge)
        scores = rng.normal(0, 3, 96) + rng.normal(0, 1, (25, 96))
        while rung := race.ask():
            for point in rung.points:
                race.tell(point, scores[int(point), rung.start : rung.stop])
        lost += bool(race.out)
    print(f"{lost} of 200 races of equal points lost one")
    assert lost / 200 <= 0.05 + 2 * 0.015


@pytest.mark.parametrize("ties", [False, True])
def test_rank_correlation_is_scipys_and_its_interval_the_plain_bootstrap(ties):
    rng = np.random.default_rng(0)
    truth = np.arange(9)[:, None] / 4
    one, other = truth + rng.normal(0, 1, (9, 40)), truth + rng.normal(0, 1, (9, 40))
    if ties:
        one, other = np.round(one), np.round(other)
        one[1] = one[0]
    rho, low, high = rank_correlation(one, other)
    assert rho == pytest.approx(stats.spearmanr(one.mean(1), other.mean(1)).statistic)
    replicates = []
    for _ in range(1000):
        some = rng.integers(0, 40, 40)
        replicates.append(stats.spearmanr(one[:, some].mean(1), other[:, some].mean(1)).statistic)
    assert (low, high) == pytest.approx(np.percentile(replicates, [2.5, 97.5]), abs=0.04)
    one[0, :3] = np.nan
    kept = stats.spearmanr(np.nanmean(one[:, 3:], 1), other[:, 3:].mean(1)).statistic
    assert rank_correlation(one, other)[0] == pytest.approx(kept)


def test_points_that_differ_by_rounding_share_their_rank():
    rng = np.random.default_rng(3)
    one, other = rng.normal(0, 1, (6, 30)), rng.normal(0, 1, (6, 30))
    one[1:4] = one[0] * (1 + 1e-15 * np.array([[2], [-3], [1]]))
    expected = stats.spearmanr([*one[[0, 0, 0, 0, 4, 5]].mean(1)], other.mean(1)).statistic
    assert rank_correlation(one, other)[0] == pytest.approx(expected)
    assert np.isnan(rank_correlation(one[:4], other[:4])[0])


def test_rows_that_differ_by_rounding_or_on_one_prompt_stay_in_the_race_and_an_infinite_score_is_refused():
    base = np.random.default_rng(5).integers(0, 2, 24) / 3
    scores = {"a": base, "b": base * (1 + 1e-14), "c": base + np.eye(24)[3] / 100, "d": base - 1}
    race = Race(list(scores), [12, 24], judge)
    while rung := race.ask():
        for point in rung.points:
            race.tell(point, scores[point][rung.start : rung.stop])
    assert race.alive == ("a", "b", "c")
    race = Race(["a", "b"], [12, 24], judge)
    race.ask()
    with pytest.raises(BadSetting, match="a: an infinite score"):
        race.tell("a", [float("inf")] * 12)


def screened(cheap, whole, **settings):
    screening = Screening(map(str, range(len(cheap))), judge, **settings)
    for point, scores in enumerate(cheap):
        screening.tell(str(point), scores)
    for point in screening.controls():
        screening.check(point, whole[int(point)])
    return screening, screening.decide()


def test_a_screening_that_keeps_the_order_leaves_the_hopeless_points_out():
    whole = sweep_scores(0)[:, :25]
    cheap = 0.7 * whole + np.random.default_rng(1).normal(0, 0.2, whole.shape)
    screening, found = screened(cheap, whole)
    means = cheap.mean(1)
    assert len(screening.controls()) == 8
    assert {screening.controls()[0], screening.controls()[-1]} == {str(means.argmin()), str(means.argmax())}
    assert not found.abandoned
    assert found.low <= found.rho <= found.high
    assert found.rho > 0.8
    assert str(GRID.index(OPTIMUM)) in found.kept
    assert len(found.kept) < 20


def test_a_screening_whose_order_is_another_is_abandoned():
    whole = sweep_scores(0)[:, :25]
    another = np.random.default_rng(2).permutation(len(whole))
    _, found = screened(whole[another], whole)
    assert found.abandoned
    assert found.rho < 0.8
    assert found.kept == tuple(map(str, range(25)))
    _, alike = screened(np.ones((25, 12)), whole[:, :12])
    assert alike.abandoned
    assert np.isnan(alike.rho)


def test_a_screening_needs_every_point_and_without_three_controls_is_abandoned():
    with pytest.raises(BadSetting, match="controls=3"):
        Screening("ab", judge, controls=2)
    screening = Screening("abcd", judge)
    screening.tell("a", [1.0, 2.0])
    with pytest.raises(BadSetting, match="3 points have no cheap scores"):
        screening.decide()
    for point in "bcd":
        screening.tell(point, [float("nan")] * 2 if point == "d" else [2.0, 3.0])
    assert set(screening.controls()) == set("abc")  # what could not be drawn is no control
    screening.check("a", [1.0, 2.0])
    assert screening.decide().abandoned
    assert screening.decide().kept == ("a", "b", "c", "d")


def test_points_that_a_screening_left_out_never_race():
    race = Race(list("abcd"), [2, 4], lambda scores, alive, error: alive)
    race.screen(Screened(("b", "d"), 0.9, 0.8, 1.0, abandoned=False))
    while rung := race.ask():
        assert rung.points == ("b", "d")
        for point in rung.points:
            race.tell(point, [1.0] * 2)
    assert (race.alive, race.screened, race.out) == (("b", "d"), ("a", "c"), {})
    assert race.text.startswith("2 of 4 points left, 2 screened out; 8 pictures drawn, a full evaluation takes 16")
