"""Every condition of a selection, and the split."""

from dataclasses import replace
from typing import Any

import pytest

from ambergrade.captions.selection import Selection, select
from ambergrade.errors import BadSetting
from ambergrade.nouns import Post

BASE = Post(
    1, {"general": ("1girl", "horns"), "character": ("kohaku",)}, "general", "2019-12-31T23:00", 5, 1, 8, 8, "a"
)


def holds(**conditions: Any) -> bool:
    return Selection(**conditions).holds(BASE)


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ({}, True),
        ({"tags_any": ("tail", "kohaku")}, True),
        ({"tags_any": ("tail",)}, False),
        ({"tags_all": ("1girl", "kohaku")}, True),
        ({"tags_all": ("1girl", "tail")}, False),
        ({"tags_none": ("tail",)}, True),
        ({"tags_none": ("horns", "tail")}, False),
        ({"ratings": ("sensitive", "general")}, True),
        ({"ratings": ("sensitive",)}, False),
        ({"score_min": 5, "score_max": 5}, True),
        ({"score_min": 6}, False),
        ({"id_min": 1, "id_max": 1}, True),
        ({"id_max": 0}, False),
        ({"date_from": "2019", "date_to": "2019"}, True),
        ({"date_from": "2019-12-31", "date_to": "2019-12-31"}, True),
        ({"date_from": "2020"}, False),
        ({"date_to": "2019-12-30"}, False),
    ],
)
def test_conditions(conditions: dict[str, Any], expected: bool) -> None:
    assert holds(**conditions) is expected


POSTS = [replace(BASE, id=number) for number in range(2000, 0, -1)]


def ids(**conditions: Any) -> list[int]:
    return [post.id for post in select(POSTS, Selection(**conditions))]


def test_the_split_is_a_partition_that_ignores_company() -> None:
    train, heldout = ids(split="train", heldout_share=0.1), ids(split="heldout", heldout_share=0.1)
    assert sorted(train + heldout) == list(range(1, 2001))
    assert 140 < len(heldout) < 260  # 200 ± 4.5 standard deviations of a binomial
    alone = [post.id for post in POSTS if select([post], Selection(split="heldout", heldout_share=0.1))]
    assert sorted(alone) == heldout
    assert ids(split="heldout", heldout_share=0.1, seed=1) != heldout


def test_count_draws_without_replacement_and_nests() -> None:
    some, more = ids(count=50), ids(count=100)
    assert len(set(some)) == 50
    assert some == sorted(some)
    assert set(some) < set(more)
    assert ids(count=5000) == list(range(1, 2001))


def test_mistakes() -> None:
    with pytest.raises(BadSetting, match="heldout"):
        Selection(split="held_out")
    with pytest.raises(BadSetting, match="share"):
        Selection(heldout_share=5)
