"""Databases written with the danbooru2023 column names, read back."""

import sqlite3
from pathlib import Path

import pytest

from ambergrade.captions.booru import read_posts
from ambergrade.errors import BadInput

TAGS = [
    (1, "1girl", 0),
    (2, "solo", 0),
    (3, "amber", 1),
    (4, "kohaku_(world)", 2),
    (5, "original", 3),
    (6, "highres", 4),
]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "odd name #1?.db"
    with sqlite3.connect(path) as db:
        db.executescript(
            """
            CREATE TABLE tag (id INTEGER PRIMARY KEY, name TEXT UNIQUE, type INTEGER, popularity INTEGER);
            CREATE TABLE post (id INTEGER PRIMARY KEY, created_at TEXT, md5 TEXT, image_width INTEGER,
                image_height INTEGER, file_ext TEXT, rating INTEGER, score INTEGER, fav_count INTEGER, tag_list TEXT);
            CREATE TABLE posttagrelation (id INTEGER PRIMARY KEY, post_id INTEGER, tag_id INTEGER);
            CREATE INDEX by_post ON posttagrelation (post_id);
            CREATE TABLE localpost (id INTEGER PRIMARY KEY, filepath TEXT, latentpath TEXT, post_id INTEGER);
            """
        )
        db.executemany("INSERT INTO tag VALUES (?, ?, ?, 0)", TAGS)
        date = "2021-05-19T01:30:25.096-04:00"
        rows = [(20, 0, 9), (10, 3, -2), (30, 7, 5)]
        db.executemany(
            "INSERT INTO post VALUES (?, ?, NULL, 640, 480, 'webp', ?, ?, 4, '')", [(i, date, r, s) for i, r, s in rows]
        )
        pairs = [(10, 2), (20, 6), (10, 4), (20, 2), (10, 1), (20, 3), (20, 5), (20, 1), (20, 99)]
        db.executemany("INSERT INTO posttagrelation (post_id, tag_id) VALUES (?, ?)", pairs)
        db.execute("INSERT INTO localpost (filepath, post_id) VALUES ('0010/ten.png', 10)")
    db.close()
    return path


def test_posts_come_with_typed_tags_in_row_order(database: Path) -> None:
    first, second, third = read_posts(database)
    assert (first.id, first.rating, first.score, first.width, first.height) == (10, "explicit", -2, 640, 480)
    assert first.tags["general"] == ("solo", "1girl")  # the order of the relation's rows, not of names or ids
    assert first.tags["character"] == ("kohaku_(world)",)
    assert first.file_name == "0010/ten.png"
    assert second.file_name == "20.webp"
    assert {kind: list(names) for kind, names in second.tags.items()} == {
        "general": ["solo", "1girl"],
        "artist": ["amber"],
        "character": [],
        "copyright": ["original"],
        "meta": ["highres"],
    }
    assert third.rating == "unknown"
    assert third.tags["general"] == ()


def test_ids_may_be_a_set_or_a_range(database: Path) -> None:
    assert [post.id for post in read_posts(database, ids={20})] == [20]
    assert [post.id for post in read_posts(database, ids=range(15, 31))] == [20, 30]
    assert read_posts(database, ids=range(0)) == []


def test_reading_leaves_no_trace(database: Path) -> None:
    before = sorted(p.name for p in database.parent.iterdir()), database.read_bytes()
    read_posts(database)
    assert (sorted(p.name for p in database.parent.iterdir()), database.read_bytes()) == before


def test_absent_optional_tables_and_columns_are_tolerated(database: Path) -> None:
    with sqlite3.connect(database) as db:
        db.executescript(
            "DROP TABLE localpost; ALTER TABLE post DROP COLUMN tag_list; ALTER TABLE post DROP COLUMN md5;"
        )
    db.close()
    assert read_posts(database)[0].file_name == "10.webp"


def test_the_old_schema_is_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE post (id INTEGER PRIMARY KEY, tag_list_general TEXT)")
    db.close()
    with pytest.raises(BadInput, match=r"schema A: it lacks post\.created_at[\s\S]*tag\.name"):
        read_posts(path)


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "not.db"
    path.write_text("hello, this is long enough to have a header " * 40)
    with pytest.raises(BadInput, match="not a database"):
        read_posts(path)
    with pytest.raises(BadInput, match="No database"):
        read_posts(tmp_path / "absent.db")
