"""Racing finds the planted optimum of a simulated sweep, on a share of the pictures."""

import itertools

import numpy as np
import pytest

from ambergrade.errors import BadSetting
from ambergrade.score.statistics import winner_set
from ambergrade.search.racing import Race

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


def judge(scores: np.ndarray) -> tuple[int, ...]:
    return winner_set(scores, draws=500).members


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
        full = [str(GRID[k]) for k in judge(scores)]
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
    assert lost <= 4  # three looks at 5 % each: 15 % at most, 4 of 12 has a chance below 10 %


def test_survivors_end_with_the_rows_of_a_full_evaluation():
    scores = sweep_scores(0)
    race = raced(scores)
    for point in race.alive:
        assert race.rows(point) == tuple(scores[[str(p) for p in GRID].index(point)][: len(race.rows(point))])
    assert race.spent == sum(len(race.rows(str(point))) for point in GRID)
    assert race.text.startswith(f"{len(race.alive)} of 25 points left; {race.spent} pictures drawn")


def test_a_failed_point_leaves_and_the_others_go_on():
    race = Race(["a", "b", "c"], [2, 4], lambda scores: range(len(scores)))
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
