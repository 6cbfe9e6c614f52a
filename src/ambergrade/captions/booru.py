"""A danbooru2023 database as memory-mapped arrays: millions of posts and their tags, opened in seconds.

<cache>/<state>/       id.npy rating.npy …    one array for each property of a post, in ascending id
                      offsets.npy tags.npy   the tags of post i are tags[offsets[i]:offsets[i + 1]], in row order
                      names.json             every tag's name and type
                      about.json             the fingerprint of all that, and what was left out of the database
"""

from __future__ import annotations

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ambergrade.captions.readers import Reader, open_reader
from ambergrade.captions.values import Array, tag_table
from ambergrade.errors import BadInput
from ambergrade.identity import digest, file_digest
from ambergrade.nouns import RATINGS, TAG_TYPES, Post

UNKNOWN_RATING = "unknown"
LAYOUT = 2
"""The cache's version; raise it when the files change."""
COLUMNS: Mapping[str, Any] = {
    "rating": np.int8,
    "score": np.int32,
    "fav_count": np.int32,
    "image_width": np.int32,
    "image_height": np.int32,
    "created_at": "S32",
    "file_ext": "S8",
}


@dataclass(frozen=True, eq=False)
class Booru:
    """Arrays over N posts and M post–tag pairs; what is memory-mapped is read when it is used."""

    columns: Mapping[str, Array]
    """`id` (N,) int64 rising, and COLUMNS, (N,) each."""
    offsets: Array
    """(N + 1,) int64"""
    tags: Array
    """(M,) int32 places in `tag_names`"""
    tag_names: tuple[str, ...]
    tag_types: Array
    """(number of tags,) int8, an index into TAG_TYPES"""
    file_offsets: Array
    """(N + 1,) int64 into `file_names`; (1,) if the database names no file."""
    file_names: Array
    """uint8, the picture files' names one after another, UTF-8."""
    fingerprint: str
    """sha256 over all of the above: of what the database says, not of how or where it is stored."""
    left_out: Mapping[str, int]
    """What of the database is not in the arrays, and how often."""

    def __len__(self) -> int:
        return len(self.columns["id"])

    @cached_property
    def tag_place(self) -> Mapping[str, int]:
        """Raw name to place in `tag_names`."""
        return {name: place for place, name in enumerate(self.tag_names)}

    def rows(self, ids: Collection[int]) -> Array:
        """The rows of the posts with these ids, rising; ids that the database does not hold are left out."""
        wanted = np.array(sorted(ids), np.int64)
        places = np.searchsorted(self.columns["id"], wanted)
        inside = places < len(self)
        places, wanted = places[inside], wanted[inside]
        found: Array = places[self.columns["id"][places] == wanted]
        return found

    def posts(self, rows: Iterable[int]) -> Iterator[Post]:
        """Posts one by one, for the given rows."""
        for row in rows:
            yield self.post(int(row))

    def post(self, row: int) -> Post:
        listed: dict[str, list[str]] = {kind: [] for kind in TAG_TYPES}
        for place in dict.fromkeys(self.tags[self.offsets[row] : self.offsets[row + 1]].tolist()):  # each once
            listed[TAG_TYPES[self.tag_types[place]]].append(self.tag_names[place])
        values = {name: column[row] for name, column in self.columns.items()}
        rating = int(values["rating"])
        return Post(
            id=int(values["id"]),
            tags={kind: tuple(names) for kind, names in listed.items()},
            rating=RATINGS[rating] if rating in range(len(RATINGS)) else UNKNOWN_RATING,
            created_at=values["created_at"].decode(errors="replace"),
            score=int(values["score"]),
            fav_count=int(values["fav_count"]),
            width=int(values["image_width"]),
            height=int(values["image_height"]),
            file_name=self.file_name(row),
        )

    def pictures(self, rows: Iterable[int]) -> Iterator[tuple[int, str]]:
        """Yield (id, file name) of the posts of the given rows, as `PictureFiles.fingerprint` takes them."""
        for row in rows:
            yield int(self.columns["id"][row]), self.file_name(row)

    def file_name(self, row: int) -> str:
        """As the database names it, else `<id>.<extension>`."""
        if len(self.file_offsets) > 1 and self.file_offsets[row + 1] > self.file_offsets[row]:
            name = self.file_names[self.file_offsets[row] : self.file_offsets[row + 1]]
            return bytes(name).decode(errors="replace")
        return f"{self.columns['id'][row]}.{self.columns['file_ext'][row].decode()}"


def read_posts(database: Path, *, ids: Collection[int] | None = None) -> list[Post]:
    """Return every post of a database in ascending id, or those whose id is in `ids` (a set, or a range of ids).

    For databases that fit into memory; `open_booru` keeps the arrays for the next time. A rating that the enum does
    not hold becomes "unknown". Raises BadInput as `open_booru` does.
    """
    with tempfile.TemporaryDirectory() as folder:
        booru = open_booru(database, Path(folder))
        return list(booru.posts(range(len(booru)) if ids is None else booru.rows(ids)))


def open_booru(database: Path, cache: Path, *, tell: Callable[[str], None] = print) -> Booru:
    """Return the database's arrays, made in `cache` at the first opening and mapped from there afterwards.

    What is left out of them is told at every opening.

    Raises:
        BadInput: not a danbooru2023 database, columns missing, values that cannot be meant, ids that repeat, or a
            database that is written to while it is read.
    """
    with closing(open_reader(database)) as reader:
        state = reader.state()
        folder = cache / digest([LAYOUT, state])[:24]
        if not folder.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=".part-", dir=cache))
            try:
                _write_arrays(reader, aside, database)
                if reader.state() != state:
                    raise BadInput(
                        f"{database} was written to while it was read. Close what writes to it and try again."
                    )
                aside.rename(folder)
            except sqlite3.DatabaseError as error:
                raise BadInput(f"{database} cannot be read as a danbooru2023 SQLite database: {error}.") from error
            except OSError:
                if not folder.is_dir():  # another process may have been first
                    raise
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    booru = _mapped(folder)
    for what, count in booru.left_out.items():
        tell(f"  {database.name}: {count:,} {what}")
    return booru


def _mapped(folder: Path) -> Booru:
    def array(name: str) -> Array:
        path = folder / f"{name}.npy"
        loaded: Array = np.load(path, mmap_mode="r" if path.stat().st_size > 4096 else None)
        return loaded

    try:
        tags, about = (json.loads((folder / f"{name}.json").read_text("utf-8")) for name in ("names", "about"))
        columns = {name: array(name) for name in ("id", *COLUMNS)}
        pairs, files = (array("offsets"), array("tags")), (array("file_offsets"), array("file_names"))
        types = np.array(tags["types"], np.int8)
        return Booru(columns, *pairs, tuple(tags["names"]), types, *files, about["fingerprint"], about["left_out"])
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise BadInput(
            f"The arrays in {folder} are damaged ({error}). Remove that folder; they are made again."
        ) from error


def _write_arrays(reader: Reader, folder: Path, database: Path) -> None:
    ids, unrated = _write_posts(reader, folder, database)
    tag_ids, names, types, nameless = tag_table(reader.tags(), database)
    (folder / "names.json").write_text(json.dumps({"names": names, "types": types}), "utf-8")
    post_place = _places(ids, database, "post")
    without_owner = _write_pairs(reader, folder, len(ids), post_place, _places(tag_ids, database, "tag"))
    _write_files(reader, folder, len(ids), post_place)
    counts = {
        "tags without a name are left out": nameless,
        "rows of posttagrelation are left out, their post or tag being in no table": without_owner,
        f"posts have a rating that is none of {', '.join(RATINGS)}": unrated,
    }
    parts = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
    about = {"fingerprint": digest(parts), "left_out": {what: count for what, count in counts.items() if count}}
    (folder / "about.json").write_text(json.dumps(about), "utf-8")


def _write_posts(reader: Reader, folder: Path, database: Path) -> tuple[Array, int]:
    """Write the posts' columns; return their ids, rising, and how many have an unknown rating."""
    pieces: dict[str, list[Array]] = {name: [] for name in ("id", *COLUMNS)}
    for piece in tqdm(reader.posts(), "reading posts", disable=None, unit="piece"):
        pieces["id"].append(piece["id"])
        for name, kind in COLUMNS.items():
            values = piece[name]
            if np.issubdtype(kind, np.integer):
                limits = np.iinfo(kind)
                values = values.clip(limits.min, limits.max)
            pieces[name].append(values.astype(kind))
    ids = np.concatenate([np.zeros(0, np.int64), *pieces["id"]])
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    np.save(folder / "id.npy", ids)
    for name, kind in COLUMNS.items():
        np.save(folder / f"{name}.npy", np.concatenate([np.zeros(0, kind), *pieces[name]])[order])
    ratings = np.concatenate([np.zeros(0, np.int8), *pieces["rating"]])
    return ids, int(((ratings < 0) | (ratings >= len(RATINGS))).sum())


def _refuse_repeated(ids: Array, database: Path, table: str) -> None:
    """Raise BadInput for ids, rising, that repeat: which row is meant cannot be known."""
    repeated = np.unique(ids[1:][np.diff(ids) == 0])
    if len(repeated):
        raise BadInput(
            f"{database}: {table}.id repeats: {len(repeated):,} ids stand in several rows, {repeated[0]} the first.\n"
            "Keep one row of each; two dumps in one table need that too."
        )


def _places(ids: Array, database: Path, table: str) -> Array:
    """Id to place, -1 where there is none: a table, since a search per row would take minutes."""
    if len(ids) and not 0 <= ids.min() <= ids.max() < 1 << 28:
        raise BadInput(f"{database}: ids of {table} run from {ids.min()} to {ids.max()}; 0 to {1 << 28} can be held.")
    _refuse_repeated(np.sort(ids), database, table)
    table_of_places = np.full(int(ids.max(initial=-1)) + 2, -1, np.int32)
    table_of_places[ids] = np.arange(len(ids), dtype=np.int32)
    return table_of_places


def _looked_up(places: Array, ids: Array) -> Array:
    found: Array = places[np.clip(ids, -1, len(places) - 1)]  # the last entry is -1
    return found


def _write_pairs(reader: Reader, folder: Path, posts: int, post_place: Array, tag_place: Array) -> int:
    """Write offsets and tags. Pairs of unknown posts or tags are left out, as a join leaves them out, and counted."""
    counts, last, ordered, unknown = np.zeros(posts, np.int64), -1, True, 0
    with (folder / "raw_posts").open("wb") as post_file, (folder / "raw_tags").open("wb") as tag_file:
        for post_ids, tag_ids in tqdm(reader.pairs(), "reading tags", disable=None, unit="piece"):
            rows, tags = _looked_up(post_place, post_ids), _looked_up(tag_place, tag_ids)
            known = (rows >= 0) & (tags >= 0)
            unknown += len(known) - int(known.sum())
            rows, tags = rows[known], tags[known]
            if not len(rows):
                continue
            ordered = ordered and rows[0] >= last and bool((np.diff(rows) >= 0).all())
            last = int(rows[-1])
            lowest = int(rows.min())
            here = np.bincount(rows - lowest)
            counts[lowest : lowest + len(here)] += here
            rows.tofile(post_file)
            tags.tofile(tag_file)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    np.save(folder / "offsets.npy", offsets)
    _write_in_order(folder, offsets, ordered)
    (folder / "raw_posts").unlink()
    (folder / "raw_tags").unlink()
    return unknown


def _write_in_order(folder: Path, offsets: Array, ordered: bool) -> None:
    """tags.npy from the raw pairs: as they came if posts came in order, else placed post by post."""
    total, piece = int(offsets[-1]), 4_000_000
    target = np.lib.format.open_memmap(folder / "tags.npy", mode="w+", dtype=np.int32, shape=(total,))
    following = offsets[:-1].copy()
    for start in range(0, total, piece):
        tags = np.fromfile(folder / "raw_tags", np.int32, piece, offset=4 * start)
        if ordered:
            target[start : start + len(tags)] = tags
            continue
        rows = np.fromfile(folder / "raw_posts", np.int32, piece, offset=4 * start)
        order = np.argsort(rows, kind="stable")
        sorted_rows = rows[order]
        first = np.flatnonzero(np.diff(sorted_rows, prepend=-1))
        lengths = np.diff(np.append(first, len(rows)))
        within = np.arange(len(rows)) - np.repeat(first, lengths)
        target[following[sorted_rows] + within] = tags[order]
        following[sorted_rows[first]] += lengths
    target.flush()


def _write_files(reader: Reader, folder: Path, posts: int, post_place: Array) -> None:
    named: dict[int, bytes] = {}
    for ids, names in reader.files():
        for row, name in zip(_looked_up(post_place, ids).tolist(), names, strict=True):
            if row >= 0:
                named[row] = name.encode()  # the last row of a post counts
    lengths = np.zeros(posts if named else 0, np.int64)
    for row, text in named.items():
        lengths[row] = len(text)
    np.save(folder / "file_offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
    joined = b"".join(named[row] for row in sorted(named))
    np.save(folder / "file_names.npy", np.frombuffer(joined, np.uint8))
