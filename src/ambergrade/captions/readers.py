"""Read danbooru2023 releases in large pieces: SQLite of schema A or B, or a folder of parquet tables.

Every reader gives posts in ascending id and post–tag pairs in the row order of `posttagrelation`, as numpy arrays;
nothing is asked of the database post by post. What dumps spell in other ways (`values`) is brought to one form.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np

from ambergrade.captions.values import Array, rating_codes, whole_numbers
from ambergrade.errors import BadInput
from ambergrade.nouns import TAG_TYPES

ROWS = 500_000
"""Rows per piece."""
TAG_BITS = 24
"""Bits of a tag id in a packed pair; danbooru is at 2.3 million = 22 bits."""
NUMBERS = {"rating": -1, "score": 0, "fav_count": 0, "image_width": 0, "image_height": 0}
"""Columns of whole numbers, and what NULL counts as."""
WANTED = ("id", "created_at", *NUMBERS)
TABLES = ("post", "tag", "posttagrelation", "localpost")


class Reader(Protocol):
    """One release of the database."""

    def posts(self) -> Iterator[dict[str, Array]]:
        """Yield pieces of the post table: `id` and NUMBERS as int64, `created_at` and `file_ext` as bytes."""

    def pairs(self) -> Iterator[tuple[Array, Array]]:
        """Yield (post ids, tag ids), int64, in row order; where a row holds none, -1."""

    def tags(self) -> list[tuple[Any, Any, Any]]:
        """Return (id, name, type) of every tag, as they are spelled, in the order of ids."""

    def files(self) -> Iterator[tuple[Array, list[str]]]:
        """Yield (post ids, their picture files) where the database names some."""

    def state(self) -> list[list[Any]]:
        """Return what the disk says of the database's files: it changes when they are written to."""

    def close(self) -> None:
        """Let the database go."""


def open_reader(database: Path) -> Reader:
    """Return the reader for a SQLite file or a folder of parquet tables.

    Raises:
        BadInput: nothing there, not such a database, in use by somebody who lets nobody read, or columns missing.
    """
    if database.is_dir():
        return ParquetReader(database)
    if not database.is_file():
        raise BadInput(f"No database at {database}.\nName a danbooru2023 SQLite file, or its folder of parquet tables.")
    return SqliteReader(database)


class SqliteReader:
    """Schema B, and schema A of January 2024, where a post holds its tags as text.

    All is read in one transaction, so that a writer at work meanwhile cannot mix two states. A write-ahead log or a
    rollback journal beside the file is honoured; without one the file is opened as immutable, which leaves no trace.
    """

    def __init__(self, database: Path) -> None:
        self.database = database
        live = any(row[1] for row in self.state()[1:])
        uri = f"file:{quote(str(database.absolute()))}?mode=ro{'' if live else '&immutable=1'}"
        self._connection = sqlite3.connect(uri, uri=True, isolation_level=None)
        try:
            self._connection.execute("BEGIN")
            self.columns = self._table_columns()
        except sqlite3.DatabaseError as error:
            self.close()
            advice = (
                "\nA program is writing to it, or was stopped while it did: close it, or open the file with it once."
            )
            raise BadInput(
                f"{database} cannot be read as a danbooru2023 SQLite database: {error}.{advice if live else ''}"
            ) from error
        self.old = "posttagrelation" not in self.columns and "tag_list_general" in self.columns.get("post", ())
        wanted: dict[str, Sequence[str]] = {"post": WANTED, "tag": ("id", "name", "type")}
        if self.old:
            wanted["post"] = (*WANTED, *(f"tag_list_{kind}" for kind in TAG_TYPES))
        else:
            wanted["posttagrelation"] = ("post_id", "tag_id")
        _check(database, "schema A" if self.old else "schema B", wanted, self.columns)

    def close(self) -> None:
        self._connection.close()

    def state(self) -> list[list[Any]]:
        beside = (self.database.with_name(self.database.name + end) for end in ("-wal", "-journal"))
        return [_file_state(path) for path in (self.database, *beside)]

    def posts(self) -> Iterator[dict[str, Array]]:
        numbers = ", ".join(f"COALESCE({name}, {value})" for name, value in NUMBERS.items())
        extension = "COALESCE(file_ext, '')" if "file_ext" in self.columns["post"] else "''"
        query = f"SELECT id, {numbers}, COALESCE(created_at, ''), {extension} FROM post ORDER BY id"
        for rows in self._pieces(query):
            names = ("id", *NUMBERS, "created_at", "file_ext")
            yield _post_piece(self.database, dict(zip(names, zip(*rows, strict=True), strict=True)))

    def pairs(self) -> Iterator[tuple[Array, Array]]:
        yield from self._listed_pairs() if self.old else self._related_pairs()

    def tags(self) -> list[tuple[Any, Any, Any]]:
        return [row for rows in self._pieces("SELECT id, name, type FROM tag ORDER BY id") for row in rows]

    def files(self) -> Iterator[tuple[Array, list[str]]]:
        if {"post_id", "filepath"} <= self.columns.get("localpost", set()):
            query = "SELECT post_id, filepath FROM localpost WHERE filepath <> '' ORDER BY rowid"
            for rows in self._pieces(query):
                ids, names = zip(*rows, strict=True)
                yield whole_numbers(ids, f"{self.database}: localpost.post_id", absent=-1), list(map(str, names))

    def _related_pairs(self) -> Iterator[tuple[Array, Array]]:
        """The relation table from end to end.

        SQLite itself joins a piece's rows into one text of packed numbers: making a Python object per row would
        take three times as long. A text that is no number counts as 0 there.
        """
        query = (
            f"SELECT group_concat(COALESCE(packed, -1)), MAX(row), MAX(tag + 0) FROM (SELECT rowid AS row, "
            f"tag_id AS tag, post_id * {1 << TAG_BITS} + tag_id AS packed FROM posttagrelation WHERE rowid > ? "
            "ORDER BY rowid LIMIT ?)"
        )
        last = -(1 << 62)
        while True:
            text, row, highest = self._connection.execute(query, (last, ROWS)).fetchone()
            if row is None:
                return
            last = row
            if highest is not None and not 0 <= highest < 1 << TAG_BITS:
                raise BadInput(f"{self.database}: tag id {highest} is not below {1 << TAG_BITS}.")
            packed = np.fromstring(text or "", dtype=np.int64, sep=",")
            yield packed >> TAG_BITS, packed & ((1 << TAG_BITS) - 1)

    def _listed_pairs(self) -> Iterator[tuple[Array, Array]]:
        """Schema A: `$<base-36 tag id>#` after one another, in one column for each type."""
        lists = ", ".join(f"COALESCE(tag_list_{kind}, '')" for kind in TAG_TYPES)
        for rows in self._pieces(f"SELECT id, {lists} FROM post ORDER BY id", ROWS // 50):
            posts: list[int] = []
            tags: list[int] = []
            for post, *texts in rows:
                try:
                    ids = [int(word, 36) for text in texts if text for word in text[1:-1].split("#$") if word]
                except (TypeError, ValueError, AttributeError) as error:
                    told = f"a tag list of post {post} is not as schema A has it: {error}"
                    raise BadInput(f"{self.database}: {told}.") from error
                tags += ids
                posts += [post] * len(ids)
            yield whole_numbers(posts, f"{self.database}: post.id"), np.array(tags, np.int64)

    def _pieces(self, query: str, rows: int = ROWS // 5) -> Iterator[list[Any]]:
        cursor = self._connection.execute(query)
        while piece := cursor.fetchmany(rows):
            yield piece

    def _table_columns(self) -> dict[str, set[str]]:
        """Table name to its columns; releases differ in the columns that we do not read."""
        tables = [row[0] for row in self._connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        ours = [name for name in TABLES if name in tables]
        return {name: {row[1] for row in self._connection.execute(f"PRAGMA table_info({name})")} for name in ours}


class ParquetReader:
    """A folder with post.parquet, tag.parquet, posttagrelation.parquet, and perhaps localpost.parquet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        columns = {name: set(self._file(name).schema_arrow.names) for name in TABLES if self._path(name).is_file()}
        wanted = {"post": WANTED, "tag": ("id", "name", "type"), "posttagrelation": ("post_id", "tag_id")}
        _check(folder, "parquet tables", wanted, columns)
        self.columns = columns

    def state(self) -> list[list[Any]]:
        return [_file_state(self._path(name)) for name in sorted(self.columns)]

    def close(self) -> None:
        """Nothing is held open."""

    def posts(self) -> Iterator[dict[str, Array]]:
        extension = ["file_ext"] if "file_ext" in self.columns["post"] else []
        for piece in self._pieces("post", [*WANTED, *extension]):
            columns = {name: piece[name].to_pylist() for name in piece.schema.names}
            for name, absent in {**NUMBERS, "created_at": "", "file_ext": ""}.items():
                known = columns.get(name, [absent] * piece.num_rows)
                columns[name] = [absent if value is None else value for value in known]
            yield _post_piece(self.folder, columns)

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
            yield self._ids(piece, "posttagrelation", "post_id"), self._ids(piece, "posttagrelation", "tag_id")

    def tags(self) -> list[tuple[Any, Any, Any]]:
        found: list[tuple[Any, Any, Any]] = []
        for piece in self._pieces("tag", ["id", "name", "type"]):
            found += zip(*(piece[name].to_pylist() for name in ("id", "name", "type")), strict=True)
        order = np.argsort(whole_numbers([row[0] for row in found], f"{self._path('tag')}: id"), kind="stable")
        return [found[place] for place in order]

    def files(self) -> Iterator[tuple[Array, list[str]]]:
        if {"post_id", "filepath"} <= self.columns.get("localpost", set()):
            for piece in self._pieces("localpost", ["post_id", "filepath"]):
                ids, names = self._ids(piece, "localpost", "post_id"), piece["filepath"].to_pylist()
                named = [place for place, name in enumerate(names) if name]
                yield ids[named], [str(names[place]) for place in named]

    def _ids(self, piece: Any, table: str, column: str) -> Array:
        """(N,) int64, fast where the table holds numbers without gaps."""
        values = piece[column]
        if not values.null_count and str(values.type) in ("int64", "int32", "uint32", "int16"):
            return np.asarray(values, np.int64)
        return whole_numbers(values.to_pylist(), f"{self._path(table)}: {column}", absent=-1)

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


def _post_piece(database: Path, columns: Mapping[str, Sequence[Any]]) -> dict[str, Array]:
    """A piece of the post table in the form that `Reader.posts` promises."""
    ids = whole_numbers(columns["id"], f"{database}: post.id")
    piece = {"id": ids, "rating": rating_codes(columns["rating"], f"{database}: post.rating", ids)}
    for name in NUMBERS.keys() - {"rating"}:
        piece[name] = whole_numbers(columns[name], f"{database}: post.{name}", ids, absent=NUMBERS[name])
    for name in ("created_at", "file_ext"):
        piece[name] = np.array([str(value).encode() for value in columns[name]])
    return piece


def _file_state(path: Path) -> list[Any]:
    """[name, size, inode, times of change] of a file; of one that is not there, size 0."""
    try:
        about = path.stat()
    except FileNotFoundError:
        return [path.name, 0]
    return [path.name, about.st_size, about.st_ino, about.st_mtime_ns, about.st_ctime_ns]


def _check(place: Path, kind: str, wanted: Mapping[str, Sequence[str]], found: Mapping[str, set[str]]) -> None:
    absent = [f"{table}.{name}" for table in wanted for name in wanted[table] if name not in found.get(table, ())]
    if absent:
        tables = ", ".join(f"{table} ({len(names)} columns)" for table, names in sorted(found.items()))
        raise BadInput(
            f"{place} is not a danbooru2023 database of {kind}: it lacks {', '.join(absent)}.\n"
            f"Found: {tables or 'no table'}."
        )
