"""Read danbooru2023 releases in large pieces: SQLite of schema A or B, or a folder of parquet tables.

Every reader gives posts in ascending id and post–tag pairs in the row order of `posttagrelation`, as numpy arrays;
nothing is asked of the database post by post.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from ambergrade.errors import BadInput

Array = npt.NDArray[Any]
ROWS = 500_000
"""Rows per piece."""
TAG_TYPE_ORDER = ("general", "artist", "character", "copyright", "meta")
"""The database writes a tag's type as an index into this."""
TAG_BITS = 24
"""Bits of a tag id in a packed pair; danbooru is at 2.3 million = 22 bits."""
NUMBERS = {"rating": -1, "score": 0, "fav_count": 0, "image_width": 0, "image_height": 0}
"""Columns of whole numbers, and what NULL counts as."""
WANTED = ("id", "created_at", *NUMBERS)


class Reader(Protocol):
    """One release of the database."""

    def posts(self) -> Iterator[dict[str, Array]]:
        """Pieces of the post table: `id` and NUMBERS as int64, `created_at` and `file_ext` as bytes; ids rise."""

    def pairs(self) -> Iterator[tuple[Array, Array]]:
        """(post ids, tag ids), int64, in row order."""

    def tags(self) -> list[tuple[int, str, int]]:
        """(id, name, type) of every tag."""

    def files(self) -> Iterator[tuple[int, str]]:
        """(post id, picture file) where the database names one."""

    def fingerprint(self) -> str:
        """Digest of the size and of samples from end to end, taken in a moment whatever the size."""


def open_reader(database: Path) -> Reader:
    """The reader for a SQLite file or a folder of parquet tables.

    Raises:
        BadInput: nothing there, not such a database, or columns missing.
    """
    if database.is_dir():
        return ParquetReader(database)
    if not database.is_file():
        raise BadInput(f"No database at {database}.\nName a danbooru2023 SQLite file, or its folder of parquet tables.")
    try:
        columns = _table_columns(database)
    except sqlite3.DatabaseError as error:
        raise BadInput(f"{database} cannot be read as a danbooru2023 SQLite database: {error}.") from error
    old = "posttagrelation" not in columns and "tag_list_general" in columns.get("post", ())
    wanted: dict[str, Sequence[str]] = {"post": WANTED, "tag": ("id", "name", "type")}
    if old:
        wanted["post"] = (*WANTED, *(f"tag_list_{kind}" for kind in TAG_TYPE_ORDER))
    else:
        wanted["posttagrelation"] = ("post_id", "tag_id")
    _check(database, "schema A" if old else "schema B", wanted, columns)
    return SqliteReader(database, columns, old)


def sample_digest(path: Path) -> str:
    """sha256 of a file's size, its first 64 KiB (a SQLite header counts changes) and 64 pages spread over it."""
    size = path.stat().st_size
    hasher = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        hasher.update(file.read(1 << 16))
        for step in range(64):
            file.seek(size * step // 64)
            hasher.update(file.read(4096))
        file.seek(max(0, size - (1 << 16)))
        hasher.update(file.read())
    return hasher.hexdigest()


class SqliteReader:
    """Schema B, and with `old` schema A of January 2024, where a post holds its tags as text."""

    def __init__(self, database: Path, columns: Mapping[str, set[str]], old: bool) -> None:
        self.database = database
        self.columns = columns
        self.old = old

    def fingerprint(self) -> str:
        return sample_digest(self.database)

    def posts(self) -> Iterator[dict[str, Array]]:
        numbers = ", ".join(f"COALESCE({name}, {value})" for name, value in NUMBERS.items())
        extension = "COALESCE(file_ext, '')" if "file_ext" in self.columns["post"] else "''"
        query = f"SELECT id, {numbers}, COALESCE(created_at, ''), {extension} FROM post ORDER BY id"
        for rows in self._pieces(query):
            columns = list(zip(*rows, strict=True))
            piece = {name: np.array(columns[place], np.int64) for place, name in enumerate(("id", *NUMBERS))}
            piece["created_at"] = np.array([str(value).encode() for value in columns[-2]])
            piece["file_ext"] = np.array([str(value).encode() for value in columns[-1]])
            yield piece

    def pairs(self) -> Iterator[tuple[Array, Array]]:
        yield from self._listed_pairs() if self.old else self._related_pairs()

    def tags(self) -> list[tuple[int, str, int]]:
        return [row for rows in self._pieces("SELECT id, name, type FROM tag ORDER BY id") for row in rows]

    def files(self) -> Iterator[tuple[int, str]]:
        if {"post_id", "filepath"} <= self.columns.get("localpost", set()):
            query = "SELECT post_id, filepath FROM localpost WHERE filepath IS NOT NULL ORDER BY rowid"
            for rows in self._pieces(query):
                yield from rows

    def _related_pairs(self) -> Iterator[tuple[Array, Array]]:
        """The relation table from end to end.

        SQLite itself joins a piece's rows into one text of packed numbers: making a Python object per row would
        take three times as long.
        """
        query = (
            f"SELECT group_concat(packed), MAX(row), MAX(tag) FROM (SELECT rowid AS row, tag_id AS tag, "
            f"post_id * {1 << TAG_BITS} + tag_id AS packed FROM posttagrelation WHERE rowid > ? ORDER BY rowid LIMIT ?)"
        )
        last = -(1 << 62)
        with self._opened() as connection:
            while True:
                text, row, highest = connection.execute(query, (last, ROWS)).fetchone()
                if row is None:
                    return
                last = row
                if highest is not None and not 0 <= highest < 1 << TAG_BITS:
                    raise BadInput(f"{self.database}: tag id {highest} is not below {1 << TAG_BITS}.")
                packed = np.fromstring(text or "", dtype=np.int64, sep=",")
                yield packed >> TAG_BITS, packed & ((1 << TAG_BITS) - 1)

    def _listed_pairs(self) -> Iterator[tuple[Array, Array]]:
        """Schema A: `$<base-36 tag id>#` after one another, in one column for each type."""
        lists = ", ".join(f"COALESCE(tag_list_{kind}, '')" for kind in TAG_TYPE_ORDER)
        for rows in self._pieces(f"SELECT id, {lists} FROM post ORDER BY id", ROWS // 50):
            posts: list[int] = []
            tags: list[int] = []
            for post, *texts in rows:
                ids = [int(word, 36) for text in texts if text for word in text[1:-1].split("#$") if word]
                tags += ids
                posts += [post] * len(ids)
            yield np.array(posts, np.int64), np.array(tags, np.int64)

    def _pieces(self, query: str, rows: int = ROWS // 5) -> Iterator[list[Any]]:
        with self._opened() as connection:
            cursor = connection.execute(query)
            while piece := cursor.fetchmany(rows):
                yield piece

    def _opened(self) -> closing[sqlite3.Connection]:
        return closing(_connect(self.database))


class ParquetReader:
    """A folder with post.parquet, tag.parquet, posttagrelation.parquet, and perhaps localpost.parquet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = ("post", "tag", "posttagrelation", "localpost")
        columns = {name: set(self._file(name).schema_arrow.names) for name in names if self._path(name).is_file()}
        wanted = {"post": WANTED, "tag": ("id", "name", "type"), "posttagrelation": ("post_id", "tag_id")}
        _check(folder, "parquet tables", wanted, columns)
        self.columns = columns

    def fingerprint(self) -> str:
        found = [f"{name} {sample_digest(self._path(name))}" for name in sorted(self.columns)]
        return hashlib.sha256("\n".join(found).encode()).hexdigest()

    def posts(self) -> Iterator[dict[str, Array]]:
        extension = ["file_ext"] if "file_ext" in self.columns["post"] else []
        for piece in self._pieces("post", [*WANTED, *extension]):
            made: dict[str, Array] = {"id": np.array(piece["id"], np.int64)}
            for name, value in NUMBERS.items():
                made[name] = np.array([value if v is None else v for v in piece[name].to_pylist()], np.int64)
            for name in ("created_at", "file_ext"):
                texts = piece[name].to_pylist() if name in piece.column_names else [""] * len(made["id"])
                made[name] = np.array([str(text or "").encode() for text in texts])
            yield made

    def pairs(self) -> Iterator[tuple[Array, Array]]:
        last = -1
        ordered = ["id"] if "id" in self.columns["posttagrelation"] else []
        for piece in self._pieces("posttagrelation", ["post_id", "tag_id", *ordered]):
            if ordered and len(piece):
                rows = np.asarray(piece["id"])
                if rows[0] <= last or (np.diff(rows) <= 0).any():
                    raise BadInput(
                        f"{self._path('posttagrelation')} is not in the order of its ids, and that order is the order\n"
                        "of tags in captions. Write it again sorted by id."
                    )
                last = int(rows[-1])
            yield np.asarray(piece["post_id"], np.int64), np.asarray(piece["tag_id"], np.int64)

    def tags(self) -> list[tuple[int, str, int]]:
        found: list[tuple[int, str, int]] = []
        for piece in self._pieces("tag", ["id", "name", "type"]):
            columns = (piece[name].to_pylist() for name in ("id", "name", "type"))
            found += zip(*columns, strict=True)
        return sorted(found)

    def files(self) -> Iterator[tuple[int, str]]:
        if {"post_id", "filepath"} <= self.columns.get("localpost", set()):
            for piece in self._pieces("localpost", ["post_id", "filepath"]):
                rows = zip(piece["post_id"].to_pylist(), piece["filepath"].to_pylist(), strict=True)
                yield from (row for row in rows if row[1] is not None)

    def _path(self, table: str) -> Path:
        return self.folder / f"{table}.parquet"

    def _file(self, table: str) -> Any:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile

        try:
            return ParquetFile(self._path(table))
        except (ArrowInvalid, OSError) as error:
            raise BadInput(f"{self._path(table)} cannot be read as parquet: {error}.") from error

    def _pieces(self, table: str, columns: list[str]) -> Iterator[Any]:
        yield from self._file(table).iter_batches(ROWS, columns=columns)


def _connect(database: Path) -> sqlite3.Connection:
    uri = f"file:{quote(str(database.absolute()))}?mode=ro&immutable=1"  # never locks, never leaves a journal
    return sqlite3.connect(uri, uri=True)


def _table_columns(database: Path) -> dict[str, set[str]]:
    """Table name to its columns; releases differ in the columns that we do not read."""
    with closing(_connect(database)) as connection:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {t: {row[1] for row in connection.execute(f'PRAGMA table_info("{t}")')} for t in tables}


def _check(place: Path, kind: str, wanted: Mapping[str, Sequence[str]], found: Mapping[str, set[str]]) -> None:
    absent = [f"{table}.{name}" for table in wanted for name in wanted[table] if name not in found.get(table, ())]
    if absent:
        tables = ", ".join(f"{table} ({len(names)} columns)" for table, names in sorted(found.items()))
        raise BadInput(
            f"{place} is not a danbooru2023 database of {kind}: it lacks {', '.join(absent)}.\n"
            f"Found: {tables or 'no table'}."
        )
