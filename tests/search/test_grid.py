import itertools
import math

import pytest

from ambergrade.errors import BadSetting, UnknownName
from ambergrade.search.load import search

VALUES = {"a": [0.0, 0.4, 0.8], "b": [1.0, 0.0]}


def asked(grid) -> list[dict[str, float]]:
    return list(iter(grid.ask, None))


def test_every_combination_is_asked_for_once_in_the_order_written():
    points = asked(search("grid", values=VALUES, objective="x"))
    assert points == [{"a": a, "b": b} for a, b in itertools.product(*VALUES.values())]


def test_the_start_point_comes_first_and_only_once():
    grid = search("grid", values=VALUES, objective="x", start={"b": 0.0, "a": 0.4})
    points = asked(grid)
    assert points[0] == {"a": 0.4, "b": 0.0}
    assert len(points) == len(grid) == 6
    assert sorted(map(str, points)) == sorted(map(str, asked(search("grid", values=VALUES, objective="x"))))


def test_a_start_point_off_the_grid_is_one_point_more():
    assert len(search("grid", values=VALUES, objective="x", start={"a": 0.5, "b": 0.5})) == 7


@pytest.mark.parametrize(("higher", "winner"), [(True, 0.8), (False, 0.0)])
def test_the_best_follows_the_direction_and_passes_over_nan(higher, winner):
    grid = search("grid", values={"a": [0.0, 0.4, 0.8]}, objective="x", higher_is_better=higher)
    assert grid.best is None
    for point in asked(grid):
        grid.tell(point, math.nan if point["a"] == 0.4 else point["a"])
    assert grid.best == ({"a": winner}, winner)


def test_among_equals_the_first_proposed_is_best_whatever_the_order_of_telling():
    grid = search("grid", values={"a": [0.0, 0.4, 0.8]}, objective="x")
    for point in reversed(asked(grid)):
        grid.tell(point, 1.0)
    assert grid.best == ({"a": 0.0}, 1.0)


@pytest.mark.parametrize(
    "settings",
    [{"values": {}}, {"values": {"a": []}}, {"values": {"a": [1, 1.0]}}, {"values": {"a": [1]}, "start": {"c": 1}}],
)
def test_a_grid_that_cannot_be_meant_is_refused(settings):
    with pytest.raises(BadSetting):
        search("grid", objective="x", **settings)


def test_telling_a_point_that_was_never_proposed_is_refused():
    with pytest.raises(BadSetting, match="never proposed"):
        search("grid", values=VALUES, objective="x").tell({"a": 9.0, "b": 0.0}, 1.0)


def test_an_unknown_search_is_told_with_its_nearest():
    with pytest.raises(UnknownName, match="grid"):
        search("gird")


def test_recalled_points_are_not_asked_for_again_and_strange_ones_are_passed_over():
    grid = search("grid", values=VALUES, objective="x")
    grid.recall({"b": 0.0, "a": 0.4}, 5.0)
    grid.recall({"a": 7.0, "b": 0.0}, 9.0)
    assert {"a": 0.4, "b": 0.0} not in asked(grid)
    assert (len(grid), grid.best) == (6, ({"a": 0.4, "b": 0.0}, 5.0))


def test_words_can_be_values():
    grid = search("grid", values={"merge": ["gamma_rev1", "gamma_rev2"], "a": [0.5]}, objective="x")
    assert asked(grid) == [{"merge": "gamma_rev1", "a": 0.5}, {"merge": "gamma_rev2", "a": 0.5}]
