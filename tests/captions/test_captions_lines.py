"""Captions and selections from arrays equal those made post by post, whatever the database says."""

import sqlite3
from pathlib import Path

import numpy as np
import pytest

from ambergrade.captions.booru import open_booru, read_posts
from ambergrade.captions.lines import caption_lines, percentile_table
from ambergrade.captions.recipe import CaptionRecipe, caption_line
from ambergrade.captions.selection import select_rows
from ambergrade.captions.settings import Selection
from ambergrade.door.compose import compose, plain
from ambergrade.errors import BadInput, UnknownName
from ambergrade.identity import random_seed
from ambergrade.nouns import Post
from ambergrade.places import CONF
from ambergrade.typed import settings

RECIPES = sorted(path.stem for path in (CONF / "captions").glob("*.yaml"))
GENERAL = ["1girl", "2boys", "solo", "long_hair", "^_^", "o_o", "bad_hands", "  ", "x", "a_b", "male_focus", "eyes"]
NAMES = {0: GENERAL, 1: ["amber", "banned_artist"], 2: ["kohaku_(world)"], 3: ["original"]}
NAMES[4] = ["highres", "bad_id", "translated", "photo_(medium)", "absurdres"]
DATES = [
    "2021-05-19T01:30:25.096-04:00",
    "2005-01-01",
    "1999-12-31",
    "2010-06",
    "2014-",
    "2025-01-01",
    "soon",
    "",
    None,
]


def recipe(name: str) -> CaptionRecipe:
    values = plain(compose("world", ["build=card", f"captions={name}"]))["captions"]
    return settings(CaptionRecipe, values)


def write_database(path: Path, seed: int, posts: int, shuffled: bool) -> None:
    draw = np.random.default_rng(seed)
    tags = [(kind, name) for kind, names in NAMES.items() for name in names]
    with sqlite3.connect(path) as db:
        db.executescript(
            """CREATE TABLE tag (id INTEGER PRIMARY KEY, name TEXT, type INTEGER);
            CREATE TABLE post (id INTEGER PRIMARY KEY, created_at TEXT, image_width INTEGER, image_height INTEGER,
                file_ext TEXT, rating INTEGER, score INTEGER, fav_count INTEGER);
            CREATE TABLE posttagrelation (id INTEGER PRIMARY KEY, post_id INTEGER, tag_id INTEGER);"""
        )
        db.executemany(
            "INSERT INTO tag VALUES (?, ?, ?)", [(7 * n + 1, name, kind) for n, (kind, name) in enumerate(tags)]
        )
        ids = sorted(draw.choice(9_000_000, posts, replace=False).tolist())
        for post in ids:
            numbers = [int(draw.integers(0, high)) for high in (3000, 3000, 6)]
            date = DATES[int(draw.integers(len(DATES)))]
            values = (
                post,
                date,
                *numbers[:2],
                "png",
                numbers[2],
                int(draw.integers(-10, 320)),
                int(draw.integers(0, 320)),
            )
            db.execute("INSERT INTO post VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
        pairs = [
            (post, 7 * int(n) + 1)
            for post in ids
            for n in draw.permutation(len(tags))[: int(draw.integers(0, len(tags)))]
        ]
        pairs += [(ids[0], 999), (123, 1)]  # of no tag, of no post
        if shuffled:
            pairs = [pairs[n] for n in draw.permutation(len(pairs))]
        db.executemany("INSERT INTO posttagrelation (post_id, tag_id) VALUES (?, ?)", pairs)
    db.close()


@pytest.fixture(scope="module", params=[False, True], ids=["in order", "rows of posts mixed"])
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("db") / "booru.sqlite"
    write_database(path, 3, 400, request.param)
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_lines_from_arrays_are_the_lines_of_the_posts(database: Path, name: str, tmp_path: Path) -> None:
    booru, rules = open_booru(database, tmp_path), recipe(name)
    found = dict(caption_lines(booru, rules))
    assert len(found) == len(booru)
    told = 0
    for post in read_posts(database):
        try:
            expected = caption_line(post, rules)
        except BadInput:
            expected = None
            told += 1
        assert found[post.id] == expected
    if name.startswith("kohaku"):
        assert told > 20  # unknown ratings are left out
    some = np.array([5, 1, 399])
    assert list(caption_lines(booru, rules, some)) == [(p.id, found[p.id]) for p in booru.posts(some)]


def test_tags_of_a_post_come_in_the_row_order_of_the_relation(database: Path, tmp_path: Path) -> None:
    booru = open_booru(database, tmp_path)
    with sqlite3.connect(database) as db:
        query = "SELECT name FROM posttagrelation r JOIN tag t ON t.id = tag_id"
        query += " WHERE post_id = ? AND type = 0 ORDER BY r.id"
        for post in booru.posts([0, 7, 200]):
            assert list(post.tags["general"]) == [name for (name,) in db.execute(query, (post.id,))]
    db.close()


def reference_select(posts: list[Post], chosen: Selection) -> list[int]:
    """Ids of the selected posts, condition by condition as the documents say it."""
    kept = []
    for post in posts:
        tags = {name for names in post.tags.values() for name in names}
        side = random_seed(chosen.seed, "split", post.id) / 2**63 < chosen.heldout_share
        width, height, date = post.width, post.height, post.created_at
        conditions = [
            not chosen.tags_any or tags & set(chosen.tags_any),
            tags >= set(chosen.tags_all),
            not tags & set(chosen.tags_none),
            not chosen.ratings or post.rating in chosen.ratings,
            chosen.score_min is None or post.score >= chosen.score_min,
            chosen.score_max is None or post.score <= chosen.score_max,
            chosen.fav_count_min is None or post.fav_count >= chosen.fav_count_min,
            chosen.id_min is None or post.id >= chosen.id_min,
            chosen.id_max is None or post.id <= chosen.id_max,
            chosen.side_min is None or min(width, height) >= chosen.side_min,
            chosen.pixels_min is None or width * height >= chosen.pixels_min,
            chosen.date_from is None or date[: len(chosen.date_from)] >= chosen.date_from,
            chosen.date_to is None or date[: len(chosen.date_to)] <= chosen.date_to,
            chosen.split == "all" or side == (chosen.split == "heldout"),
        ]
        kept += [post.id] if all(conditions) else []
    kept.sort(key=lambda post: random_seed(chosen.seed, "count", post))
    return sorted(kept[: chosen.count])


SELECTIONS = [
    Selection(),
    Selection(tags_any=("solo", "amber"), tags_none=("o_o",)),
    Selection(tags_all=("solo", "1girl"), score_min=5, score_max=200, fav_count_min=10),
    Selection(ratings=("general", "explicit"), id_min=1_000_000, id_max=8_000_000, side_min=300, pixels_min=10**6),
    Selection(date_from="2010", date_to="2021"),
    Selection(date_from="2005-01-01", split="train", heldout_share=0.3, seed=4),
    Selection(split="heldout", heldout_share=0.3, seed=4),
    Selection(count=17, seed=2),
    Selection(tags_any=("x",), count=1000),
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_rows_selected_are_the_posts_selected(database: Path, selection: Selection, tmp_path: Path) -> None:
    booru = open_booru(database, tmp_path)
    wanted = reference_select(read_posts(database), selection)
    assert booru.columns["id"][select_rows(booru, selection)].tolist() == wanted
    assert wanted


def test_a_tag_that_no_post_can_have_is_told_with_the_nearest(database: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="long_hair"):
        select_rows(open_booru(database, tmp_path), Selection(tags_any=("long_hiar",)))


def test_the_second_opening_reads_the_cache_and_a_changed_database_does_not(tmp_path: Path) -> None:
    path, cache = tmp_path / "booru.sqlite", tmp_path / "cache"
    write_database(path, 5, 30, False)
    first = open_booru(path, cache)
    stamps = {file: file.stat().st_mtime_ns for file in cache.rglob("*.npy")}
    assert open_booru(path, cache).fingerprint == first.fingerprint
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.npy")} == stamps
    with sqlite3.connect(path) as db:
        db.execute("UPDATE post SET score = 7777 WHERE id = ?", (int(first.columns["id"][3]),))
    db.close()
    assert open_booru(path, cache).post(3).score == 7777
    assert not list(cache.glob(".part-*"))


def test_percentiles_of_the_database_at_hand(database: Path, tmp_path: Path) -> None:
    booru = open_booru(database, tmp_path)
    posts = read_posts(database)
    for rating, row in percentile_table(booru, "fav_count", (10, 50, 95), first_id=2_000_000).items():
        values = sorted(post.fav_count for post in posts if post.rating == rating and post.id >= 2_000_000)
        place = 0.5 * (len(values) - 1)  # type 7 by hand
        low = values[int(place)]
        median = low + (place % 1) * (values[min(int(place) + 1, len(values) - 1)] - low)
        assert row[1] == pytest.approx(median, abs=0.006)
        assert row[0] <= row[1] <= row[2]
    with pytest.raises(BadInput, match="No post with the rating"):
        percentile_table(booru, "score", (50,), first_id=10**8)
