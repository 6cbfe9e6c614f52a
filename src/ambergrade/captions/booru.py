"""Read posts from a danbooru2023 database (schema B, since February 2024)."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from tqdm import tqdm

from ambergrade.errors import BadInput
from ambergrade.nouns import RATINGS, TAG_TYPES, Post

UNKNOWN_RATING = "unknown"
# The database writes enums as integers: a rating is an index into RATINGS, a type one into this.
TAG_TYPE_ORDER = ("general", "artist", "character", "copyright", "meta")
POST_COLUMNS = ("id", "created_at", "rating", "score", "fav_count", "image_width", "image_height")


def read_posts(database: Path, *, ids: Collection[int] | None = None) -> list[Post]:
    """Every post of a database in ascending id, or those whose id is in `ids` (a set, or a range of ids).

    Tags keep the row order of `posttagrelation` within their type. The relation table is scanned once
    from end to end, so time goes with the size of the database, not with the number of posts asked for.
    A rating that the enum does not hold becomes "unknown".

    Raises:
        BadInput: not a SQLite database, or one of another schema.
    """
    assert set(TAG_TYPE_ORDER) == set(TAG_TYPES)
    try:
        with _opened(database) as connection:
            columns = _checked_columns(connection, database)
            names = _picture_names(connection, columns)
            rows = [row for row in _post_rows(connection, columns) if ids is None or row["id"] in ids]
            tags = _tags_by_post(connection, {row["id"] for row in rows})
            return [_post(row, tags[row["id"]], names) for row in rows]
    except sqlite3.DatabaseError as error:
        raise BadInput(f"{database} cannot be read as a danbooru2023 SQLite database: {error}.") from error


@contextmanager
def _opened(database: Path) -> Iterator[sqlite3.Connection]:
    if not database.is_file():
        raise BadInput(f"No database at {database}.\nName the danbooru2023 SQLite file (schema B).")
    uri = f"file:{quote(str(database.absolute()))}?mode=ro&immutable=1"  # never locks, never leaves a journal
    with closing(sqlite3.connect(uri, uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        yield connection


def _checked_columns(connection: sqlite3.Connection, database: Path) -> dict[str, set[str]]:
    """Table name to its columns; releases differ in the columns that we do not read."""
    tables = [row["name"] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    columns = {table: {row["name"] for row in connection.execute(f"PRAGMA table_info({table})")} for table in tables}
    wanted = {"post": POST_COLUMNS, "tag": ("id", "name", "type"), "posttagrelation": ("post_id", "tag_id")}
    absent = [f"{t}.{c}" for t, names in wanted.items() for c in names if c not in columns.get(t, ())]
    if absent:
        old = "\nIt looks like schema A of January 2024 (tags inside post): take the release of February 2024 or later."
        raise BadInput(
            f"{database} is not of schema B: it lacks {', '.join(absent)}."
            + (old if "posttagrelation" not in columns and "tag_list_general" in columns.get("post", ()) else "")
        )
    return columns


def _post_rows(connection: sqlite3.Connection, columns: dict[str, set[str]]) -> Iterator[sqlite3.Row]:
    extension = "file_ext" if "file_ext" in columns["post"] else "NULL AS file_ext"
    yield from connection.execute(f"SELECT {', '.join(POST_COLUMNS)}, {extension} FROM post ORDER BY id")


def _picture_names(connection: sqlite3.Connection, columns: dict[str, set[str]]) -> dict[int, str]:
    if not {"post_id", "filepath"} <= columns.get("localpost", set()):
        return {}
    rows = connection.execute("SELECT post_id, filepath FROM localpost WHERE filepath IS NOT NULL ORDER BY id")
    return {row["post_id"]: row["filepath"] for row in rows}


def _tags_by_post(connection: sqlite3.Connection, posts: set[int]) -> dict[int, dict[str, list[str]]]:
    tag: dict[int, tuple[str, str]] = {
        row["id"]: (TAG_TYPE_ORDER[row["type"]], row["name"])
        for row in connection.execute("SELECT id, name, type FROM tag")
        if row["type"] in range(len(TAG_TYPE_ORDER))
    }
    found: dict[int, dict[str, list[str]]] = {post: {kind: [] for kind in TAG_TYPES} for post in posts}
    total = connection.execute("SELECT MAX(rowid) FROM posttagrelation").fetchone()[0]
    scan = connection.cursor()
    scan.row_factory = None
    scan.execute("SELECT post_id, tag_id FROM posttagrelation ORDER BY rowid")
    for post_id, tag_id in tqdm(scan, "reading tags", total, disable=None, unit="pair", unit_scale=True):
        if post_id in found and tag_id in tag:
            kind, name = tag[tag_id]
            found[post_id][kind].append(name)
    return found


def _post(row: sqlite3.Row, tags: dict[str, list[str]], names: dict[int, str]) -> Post:
    rating = row["rating"]
    return Post(
        id=row["id"],
        tags={kind: tuple(tags[kind]) for kind in TAG_TYPES},
        rating=RATINGS[rating] if rating in range(len(RATINGS)) else UNKNOWN_RATING,
        created_at=str(row["created_at"] or ""),
        score=row["score"] or 0,
        fav_count=row["fav_count"] or 0,
        width=row["image_width"] or 0,
        height=row["image_height"] or 0,
        file_name=names.get(row["id"], f"{row['id']}.{row['file_ext'] or ''}"),
    )
