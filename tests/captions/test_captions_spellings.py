"""Databases as dumps really spell them, and as programs leave them: read rightly, or refused by column and row."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from ambergrade.captions import readers
from ambergrade.captions.booru import Booru, open_booru, read_posts
from ambergrade.errors import BadInput
from ambergrade.nouns import Post

TAGS = (
    *((1, "long_hair", 0), (2, "kohaku_(world)", 2), (3, "smile", 0)),
    *((4, "original", 3), (5, "amber", 1), (6, "hi", 4)),
)
WORDS = {0: "general", 1: "artist", 2: "character", 3: "copyright", 4: "meta"}
SITE = {0: 0, 1: 1, 2: 4, 3: 3, 4: 5}
POSTS = ((1, 0, 5), (2, 1, 9), (3, 2, -3), (4, 3, 0))
RATINGS = ("general", "sensitive", "questionable", "explicit")
PAIRS = tuple((post, tag) for post, *_ in POSTS for tag, *_ in TAGS)


def write(
    path: Path, tags: Any = TAGS, posts: Any = POSTS, pairs: Any = PAIRS, files: Any = (), mode: str = "delete"
) -> Path:
    """A booru of columns without types, which keep what they are given."""
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA journal_mode={mode}")
        db.executescript(
            """CREATE TABLE tag (id, name, type);
            CREATE TABLE post (id, created_at, image_width, image_height, file_ext, rating, score, fav_count);
            CREATE TABLE posttagrelation (id INTEGER PRIMARY KEY, post_id, tag_id);
            CREATE TABLE localpost (post_id, filepath);"""
        )
        db.executemany("INSERT INTO tag VALUES (?, ?, ?)", tags)
        db.executemany("INSERT INTO post VALUES (?, '2021-05-19', 640, 480, 'png', ?, ?, 3)", posts)
        db.executemany("INSERT INTO posttagrelation (post_id, tag_id) VALUES (?, ?)", pairs)
        db.executemany("INSERT INTO localpost VALUES (?, ?)", files)
        db.commit()
    return path


def write_parquet(folder: Path, tags: Any = TAGS, posts: Any = POSTS, pairs: Any = PAIRS) -> Path:
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder.mkdir()
    rest = {"created_at": "2021-05-19", "image_width": 640, "image_height": 480, "file_ext": "png", "fav_count": 3}
    tables = {
        "tag": [dict(zip(("id", "name", "type"), row, strict=True)) for row in tags],
        "post": [dict(zip(("id", "rating", "score"), row, strict=True)) | rest for row in posts],
        "posttagrelation": [dict(zip(("post_id", "tag_id"), row, strict=True)) for row in pairs],
    }
    for name, rows in tables.items():
        parquet.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    return folder


@pytest.fixture
def plain(tmp_path: Path) -> list[Post]:
    return read_posts(write(tmp_path / "plain.db"))


def test_the_plain_spelling(plain: list[Post]) -> None:
    assert [(post.id, post.rating, post.score) for post in plain] == [
        (n + 1, rating, score) for n, (rating, score) in enumerate(zip(RATINGS, (5, 9, -3, 0), strict=True))
    ]
    assert all(post.tags["character"] == ("kohaku_(world)",) for post in plain)
    assert all(post.tags["meta"] == ("hi",) and post.tags["general"] == ("long_hair", "smile") for post in plain)


def spelled(what: str) -> dict[str, Any]:
    """Rows that say the same in another spelling."""
    letter = {n: rating[0] for n, rating in enumerate(RATINGS)}
    return {
        "type as words": {"tags": [(i, n, WORDS[t]) for i, n, t in TAGS]},
        "type as words in capitals": {"tags": [(i, n, f" {WORDS[t].title()} ") for i, n, t in TAGS]},
        "type as digits": {"tags": [(i, n, str(t)) for i, n, t in TAGS]},
        "type as the site's numbers": {"tags": [(i, n, SITE[t]) for i, n, t in TAGS]},
        "type as floats": {"tags": [(i, n, float(t)) for i, n, t in TAGS]},
        "rating as letters": {"posts": [(i, letter[r], s) for i, r, s in POSTS]},
        "rating as words": {"posts": [(i, RATINGS[r].upper(), s) for i, r, s in POSTS]},
        "rating as digits": {"posts": [(i, str(r), s) for i, r, s in POSTS]},
        "score as digits": {"posts": [(i, r, str(s)) for i, r, s in POSTS]},
        "score as floats": {"posts": [(i, r, float(s)) for i, r, s in POSTS]},
        "score as floats in text": {"posts": [(i, r, f"{s}.0") for i, r, s in POSTS]},
        "everything as text": {
            "tags": [tuple(map(str, row)) for row in TAGS],
            "posts": [tuple(map(str, row)) for row in POSTS],
            "pairs": [tuple(map(str, row)) for row in PAIRS],
        },
    }[what]


SPELLINGS = ["type as words", "type as words in capitals", "type as digits", "type as the site's numbers"]
SPELLINGS += ["type as floats", "rating as letters", "rating as words", "rating as digits", "score as digits"]
SPELLINGS += ["score as floats", "score as floats in text", "everything as text"]


@pytest.mark.parametrize("what", SPELLINGS)
def test_other_spellings_say_the_same(tmp_path: Path, plain: list[Post], what: str) -> None:
    assert read_posts(write(tmp_path / "other.db", **spelled(what))) == plain
    assert read_posts(write_parquet(tmp_path / "parquet", **spelled(what))) == plain


def test_the_fingerprint_is_of_what_is_said(tmp_path: Path) -> None:
    def fingerprint(path: Path) -> str:
        return open_booru(path, tmp_path / "cache").fingerprint

    told = fingerprint(write(tmp_path / "a.db"))
    assert fingerprint(write(tmp_path / "b.db", **spelled("everything as text"))) == told
    assert fingerprint(write_parquet(tmp_path / "parquet")) == told
    assert fingerprint(write(tmp_path / "c.db", posts=[*POSTS[:3], (4, 3, 1)])) != told


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"tags": [*TAGS, (7, "x", "sprite")]}, r"tag\.type of 'x' \(id 7\) is 'sprite'"),
        ({"tags": [*TAGS, (7, "x", 9)]}, r"tag\.type of 'x' \(id 7\) is 9"),
        ({"tags": [*TAGS, (7, "x", 5)]}, r"tag\.type of 'kohaku_\(world\)' \(id 2\) is 2"),  # two numberings at once
        ({"tags": [*TAGS, (7, "x", None)]}, r"tag\.type of 'x' \(id 7\) is None"),
        ({"tags": [*TAGS, (None, "x", 0)]}, r"tag\.id is None"),
        ({"tags": [*TAGS, (7, b"\xff", 0)]}, r"tag\.name of the tag 7 is b"),
        ({"tags": [*TAGS, (3, "x", 0)]}, r"tag\.id repeats: 1 ids stand in several rows, 3 the first"),
        ({"posts": [*POSTS, (4, 3, 0)]}, r"post\.id repeats: 1 ids stand in several rows, 4 the first"),
        ({"posts": [*POSTS, (None, 3, 0)]}, r"post\.id is None"),
        ({"posts": [*POSTS, (9, 3, "many")]}, r"post\.score of post 9 is 'many'"),
        ({"posts": [*POSTS, (9, 3, 1.5)]}, r"post\.score of post 9 is 1\.5"),
        ({"posts": [*POSTS, (9, 3, "9" * 30)]}, r"post\.score of post 9 is '999"),
        ({"posts": [*POSTS, (9, "safe", 0)]}, r"post\.rating of post 9: rating 'safe' is not known"),
        ({"posts": [*POSTS, (9, 0.5, 0)]}, r"post\.rating of post 9 is 0\.5"),
        ({"posts": [*POSTS, ("nine", 0, 0)]}, r"post\.id is 'nine'"),
        ({"files": [("x", "a.png")]}, r"localpost\.post_id is 'x'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_meant_is_refused_by_column_and_row(tmp_path: Path, changed: Any, told: str) -> None:
    with pytest.raises(BadInput, match=told):
        read_posts(write(tmp_path / "a.db", **changed))


def test_what_is_left_out_is_counted_at_every_opening(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.db",
        tags=[*TAGS, (7, None, 0), (8, "  ", 0)],
        posts=[*POSTS, (5, 7, 0), (6, None, None)],
        pairs=[*PAIRS, (1, 7), (1, 99), (77, 1), (None, 1), ("x", 1), (1, 1)],
        files=[(1, None), (2, ""), (3, "c.png")],
    )
    for _ in range(2):
        told: list[str] = []
        booru = open_booru(path, tmp_path / "cache", tell=told.append)
        assert told == [
            "  a.db: 2 tags without a name are left out",
            "  a.db: 5 rows of posttagrelation are left out, their post or tag being in no table",
            "  a.db: 2 posts have a rating that is none of general, sensitive, questionable, explicit",
        ]
    first, *_, sixth = booru.posts(range(len(booru)))
    assert first.tags["general"] == ("long_hair", "smile")  # the pair that is there twice counts once; no tag "None"
    assert (sixth.rating, sixth.score) == ("unknown", 0)
    assert [booru.file_name(row) for row in range(4)] == ["1.png", "2.png", "c.png", "4.png"]


def test_damaged_lists_of_the_old_schema_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    kinds = ("general", "artist", "character", "copyright", "meta")
    with closing(sqlite3.connect(path)) as db:
        db.executescript(
            "CREATE TABLE tag (id, name, type); CREATE TABLE post (id, created_at, image_width, image_height, file_ext,"
            f"rating, score, fav_count, {', '.join(f'tag_list_{kind}' for kind in kinds)});"
        )
        db.executemany("INSERT INTO tag VALUES (?, ?, ?)", TAGS)
        db.execute("INSERT INTO post VALUES (8, '', 1, 1, 'png', 0, 0, 0, '$1#$!?#', '', '', '', NULL)")
        db.commit()
    with pytest.raises(BadInput, match="tag list of post 8"):
        read_posts(path)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[tuple[Path, sqlite3.Connection]]:
    """A database and the program that writes to it, whose commits are in the write-ahead log alone."""
    path = write(tmp_path / "live.db", mode="wal")
    with closing(sqlite3.connect(path)) as writer:
        writer.execute("PRAGMA wal_autocheckpoint=0")
        writer.execute("INSERT INTO post VALUES (5, '2021-', 1, 1, 'png', 0, 555, 3)")
        writer.commit()
        yield path, writer


def test_a_live_write_ahead_log_is_read(live: tuple[Path, sqlite3.Connection], tmp_path: Path) -> None:
    path, writer = live
    assert [post.score for post in read_posts(path)] == [5, 9, -3, 0, 555]
    writer.execute("UPDATE post SET score = 666 WHERE id = 5")  # not committed
    assert [post.score for post in read_posts(path)][-1] == 555
    first = open_booru(path, tmp_path / "cache")
    writer.commit()
    assert open_booru(path, tmp_path / "cache").post(4).score == 666
    writer.execute("UPDATE post SET score = 555 WHERE id = 5")
    writer.commit()
    assert open_booru(path, tmp_path / "cache").fingerprint == first.fingerprint


def test_a_change_within_a_large_file_is_seen(tmp_path: Path) -> None:
    path = write(tmp_path / "a.db", posts=[(n, 0, 1) for n in range(60_000)], mode="wal")
    before = open_booru(path, tmp_path / "cache")
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE post SET score = 2 WHERE id = 31234")  # by the log, the header counts no change
        db.commit()
    after = open_booru(path, tmp_path / "cache")
    assert after.post(31234).score == 2
    assert after.fingerprint != before.fingerprint
    assert not list(tmp_path.glob("a.db-*"))  # reading left no trace


def test_a_database_that_is_written_to_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.db")
    read = readers.SqliteReader.tags

    def disturbed(self: readers.SqliteReader) -> list[tuple[Any, Any, Any]]:
        with closing(sqlite3.connect(path)) as db:
            db.execute("DELETE FROM tag WHERE id = 3")
            db.commit()
        return read(self)

    monkeypatch.setattr(readers.SqliteReader, "tags", disturbed)
    with pytest.raises(BadInput, match="was written to while it was read"):
        open_booru(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_half_written_change_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.db", posts=[(n, 0, 1) for n in range(5000)])
    copy = tmp_path / "copy.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA cache_size=1")
        db.execute("UPDATE post SET score = 2")  # spilled to the file before the commit
        copy.write_bytes(path.read_bytes())
        copy.with_name("copy.db-journal").write_bytes(path.with_name("a.db-journal").read_bytes())
        db.rollback()
    with pytest.raises(BadInput, match=r"cannot be read[\s\S]*or was stopped while it did"):
        read_posts(copy)


def test_damaged_arrays_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.db")
    booru: Booru = open_booru(path, tmp_path / "cache")
    assert len(booru) == 4
    next((tmp_path / "cache").rglob("score.npy")).write_bytes(b"")
    with pytest.raises(BadInput, match="Remove that folder"):
        open_booru(path, tmp_path / "cache")
