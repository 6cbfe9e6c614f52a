"""Every condition of a selection, and the split."""

import sqlite3
from contextlib import closing
from typing import Any

import pytest

from ambergrade.captions.booru import Booru, open_booru
from ambergrade.captions.selection import select_rows
from ambergrade.captions.settings import Selection
from ambergrade.errors import BadSetting

TAGS = [(1, "1girl", 0), (2, "horns", 0), (3, "kohaku", 2), (4, "tail", 0)]


@pytest.fixture(scope="module")
def boorus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Booru]:
    """One post of three tags; 2000 posts like it; its tenth part."""
    folder, made = tmp_path_factory.mktemp("boorus"), {}
    for name, ids in {"one": range(1, 2), "many": range(1, 2001), "few": range(1, 2001, 10)}.items():
        with closing(sqlite3.connect(folder / f"{name}.db")) as db:
            db.executescript(
                """CREATE TABLE tag (id, name, type); CREATE TABLE posttagrelation (post_id, tag_id);
                CREATE TABLE post (id, created_at, image_width, image_height, rating, score, fav_count);"""
            )
            db.executemany("INSERT INTO tag VALUES (?, ?, ?)", TAGS)
            db.executemany("INSERT INTO post VALUES (?, '2019-12-31T23:00', 8, 9, 0, 5, 1)", [(n,) for n in ids])
            db.executemany("INSERT INTO posttagrelation VALUES (?, ?)", [(n, tag) for n in ids for tag in (1, 2, 3)])
            db.commit()
        made[name] = open_booru(folder / f"{name}.db", folder)
    return made


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
        ({"fav_count_min": 1}, True),
        ({"fav_count_min": 2}, False),
        ({"side_min": 8}, True),
        ({"side_min": 9}, False),
        ({"pixels_min": 72}, True),
        ({"pixels_min": 73}, False),
        ({"id_min": 1, "id_max": 1}, True),
        ({"id_max": 0}, False),
        ({"date_from": "2019", "date_to": "2019"}, True),
        ({"date_from": "2019-12-31", "date_to": "2019-12-31"}, True),
        ({"date_from": "2020"}, False),
        ({"date_to": "2019-12-30"}, False),
    ],
)
def test_conditions(boorus: dict[str, Booru], conditions: dict[str, Any], expected: bool) -> None:
    assert bool(len(select_rows(boorus["one"], Selection(**conditions)))) is expected


def ids(booru: Booru, **conditions: Any) -> list[int]:
    return booru.columns["id"][select_rows(booru, Selection(**conditions))].tolist()


def test_the_split_is_a_partition_that_ignores_company(boorus: dict[str, Booru]) -> None:
    many = boorus["many"]
    train, heldout = ids(many, split="train", heldout_share=0.1), ids(many, split="heldout", heldout_share=0.1)
    assert sorted(train + heldout) == list(range(1, 2001))
    assert 140 < len(heldout) < 260  # 200 ± 4.5 standard deviations of a binomial
    fewer = ids(boorus["few"], split="heldout", heldout_share=0.1)
    assert fewer == [post for post in heldout if post % 10 == 1]
    assert ids(many, split="heldout", heldout_share=0.1, seed=1) != heldout


def test_count_draws_without_replacement_and_nests(boorus: dict[str, Booru]) -> None:
    some, more = ids(boorus["many"], count=50), ids(boorus["many"], count=100)
    assert len(set(some)) == 50
    assert some == sorted(some)
    assert set(some) < set(more)
    assert ids(boorus["many"], count=5000) == list(range(1, 2001))


def test_mistakes() -> None:
    with pytest.raises(BadSetting, match="heldout"):
        Selection(split="held_out")
    with pytest.raises(BadSetting, match="share"):
        Selection(heldout_share=5)
