"""Every sampler keeps the contract of a search: a total, no repeats, resumable, and they climb a known hill."""

import math

import pytest

from ambergrade.errors import BadSetting, UnknownName
from ambergrade.places import CONF
from ambergrade.search.load import search

SAMPLERS = ["tpe", "cmaes", "gp", "nsga2", "qmc"]
PLANE = {"a": {"low": 0.0, "high": 2.0}, "b": {"low": 0.0, "high": 1.0}}


def hill(point) -> float:
    """Best (0) at a 0.8, b 0.5."""
    return -((point["a"] - 0.8) ** 2) - (point["b"] - 0.5) ** 2


def made(sampler: str, values=PLANE, trials: int = 16, **more):
    return search("optuna", sampler=sampler, values=values, trials=trials, objective="x", **more)


def run(one, slots: int = 1, stop: int = 10**6) -> list[dict]:
    asked: list[dict] = []
    while len(asked) < stop:
        batch = [point for point in (one.ask() for _ in range(slots)) if point]
        if not batch:
            break
        asked += batch
        for point in batch:
            one.tell(point, hill(point))
    return asked


def test_every_sampler_has_a_yaml_that_makes_it():
    for sampler in SAMPLERS:
        text = (CONF / "search" / f"{sampler}.yaml").read_text()
        assert f"name: optuna\nsampler: {sampler}\n" in text


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_total_is_kept_and_no_point_comes_twice(sampler):
    asked = run(made(sampler), slots=3)
    assert len(asked) == 16
    assert len({tuple(point.items()) for point in asked}) == 16
    assert all(0 <= p["a"] <= 2 and 0 <= p["b"] <= 1 and p["a"] == float(f"{p['a']:.6g}") for p in asked)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_killed_search_goes_on_to_the_same_total_without_repeats(sampler):
    first = run(made(sampler, trials=12), stop=5)
    second = made(sampler, trials=12)
    for point in [*first, first[0]]:  # a record read twice counts once
        second.recall(point, hill(point))
    rest = run(second)
    assert len({tuple(point.items()) for point in first + rest}) == 12
    assert second.best[1] == max(map(hill, first + rest))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_seed_and_scores_propose_the_same_points_and_another_seed_others(sampler):
    assert run(made(sampler, trials=6)) == run(made(sampler, trials=6)) != run(made(sampler, trials=6, seed=1))


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "nsga2", "qmc"])
def test_a_small_space_is_exhausted_point_by_point(sampler):
    values = {"a": [0.0, 0.4, 0.8], "b": {"low": 0.0, "high": 1.0, "step": 0.5}}
    one = made(sampler, values=values, trials=100)
    assert len(one) == 9
    assert len({tuple(point.items()) for point in run(one)}) == 9


def test_words_can_be_values():
    one = made("tpe", values={"sampler": ["euler", "dpmpp_2m"], "a": [0.0, 1.0]})
    asked = []
    while point := one.ask():
        asked.append(point)
        one.tell(point, point["a"] + (point["sampler"] == "euler"))
    assert len(asked) == 4
    assert one.best == ({"sampler": "euler", "a": 1.0}, 2.0)


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", pytest.param("gp", marks=pytest.mark.slow)])
def test_it_climbs_a_hill_better_than_even_spread_does(sampler):
    def nearest(name: str, seed: int) -> float:
        one = made(name, trials=40 if name != "gp" else 20, seed=seed)
        run(one)
        return one.best[1]

    seeds = range(3 if sampler != "gp" else 1)
    assert sum(nearest(sampler, s) for s in seeds) > sum(nearest("qmc", s) for s in seeds)


def test_the_start_point_comes_first_and_failures_are_not_the_best():
    one = made("tpe", start={"a": 0.8, "b": 0.5}, trials=3)
    first = one.ask()
    assert first == {"a": 0.8, "b": 0.5}
    one.tell(first, math.nan)
    run(one)
    assert one.best is not None
    assert one.best[0] != first


def test_lower_can_be_better():
    one = made("tpe", higher_is_better=False, trials=4)
    asked = run(one)
    assert one.best[1] == min(map(hill, asked))


def test_points_of_another_space_are_passed_over():
    one = made("tpe", trials=2)
    one.recall({"a": 9.0, "b": 0.5}, 1.0)
    one.recall({"c": 0.5}, 1.0)
    assert len(run(one)) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"values": {}},
        {"values": {"a": []}},
        {"values": {"a": [1, 1.0]}},
        {"values": {"a": {"low": 1, "high": 0}}},
        {"values": {"a": {"low": 0, "high": 1, "log": True}}},
        {"trials": 0},
        {"start": {"c": 1.0}},
    ],
)
def test_what_cannot_be_meant_is_refused(settings):
    with pytest.raises(BadSetting):
        made("tpe", **settings)


def test_an_unknown_sampler_is_told_with_its_nearest():
    with pytest.raises(UnknownName, match="cmaes"):
        made("cma-es")


def test_a_point_that_was_not_asked_for_cannot_be_told():
    with pytest.raises(BadSetting, match="not waiting"):
        made("tpe").tell({"a": 1.0, "b": 1.0}, 0.0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_was_asked_for_and_not_finished_is_asked_for_first_and_counts_once(sampler):
    first = made(sampler, trials=8)
    asked = [first.ask() for _ in range(5)]
    second = made(sampler, trials=8, start={"a": 0.8, "b": 0.5})
    for point in asked[:2]:
        second.recall(point, hill(point))
    for point in [*asked, {"a": 9.0, "b": 0.0}]:  # finished ones and strange ones are passed over
        second.retry(point)
    rest = run(second)
    assert rest[:3] == asked[2:]
    assert len(rest) == 6
    assert len({tuple(point.items()) for point in [*asked[:2], *rest]}) == 8


def test_a_lower_total_keeps_what_is_finished_and_retries_no_more_than_it_holds():
    second = made("tpe", trials=2)
    second.recall({"a": 1.0, "b": 0.0}, 0.0)
    for b in (0.25, 0.5):
        second.retry({"a": 1.0, "b": b})
    assert run(second) == [{"a": 1.0, "b": 0.25}]


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "nsga2"])
def test_a_resumed_search_has_not_forgotten_where_the_hill_is(sampler):
    """Its next ten points lie as if it had not been killed, rather than as the first ten, when it knew nothing."""
    first = undisturbed = resumed = 0.0
    for seed in range(6):
        whole = run(made(sampler, trials=50, seed=seed))
        again = made(sampler, trials=50, seed=seed)
        for point in whole[:40]:
            again.recall(point, hill(point))
        first += sum(map(hill, whole[:10]))
        undisturbed += sum(map(hill, whole[40:]))
        resumed += sum(map(hill, run(again)))
    assert abs(resumed - undisturbed) < abs(resumed - first)
