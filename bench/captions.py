"""Captions at danbooru's scale: captions a second from arrays, and the first and second opening of 8 million posts.

python bench/captions.py [--posts 8000000] [--folder /tmp/ambergrade-bench] [--form parquet|sqlite] [--only write|open]

The database is made up in schema B (31 tags a post, Zipf frequencies) and written before the clock starts; one that is
in --folder already is kept. Each opening is a process of its own; its peak memory is what the kernel says (VmHWM),
mapped files included.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ambergrade.captions.booru import open_booru
from ambergrade.captions.lines import caption_lines
from ambergrade.captions.recipe import CaptionRecipe
from ambergrade.door.compose import compose, plain
from ambergrade.typed import settings

TAGS, PER_POST, PIECE = 100_000, 31, 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--posts", type=int, default=200_000, help="8000000 is the whole claim and takes 10 GB of disk")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument("--form", choices=["parquet", "sqlite"], default="parquet")
    parser.add_argument("--only", choices=["write", "open"], help="one half; needs --folder")
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        measure(*asked.measure)
        return
    if asked.only and asked.folder is None:
        parser.error("--only needs --folder, where the database is kept between the halves")
    place = asked.folder or Path(tempfile.mkdtemp(prefix="ambergrade-bench-"))
    place.mkdir(parents=True, exist_ok=True)
    try:
        database = place / f"{asked.form}-{asked.posts}"
        print(f"{asked.posts:,} posts, {asked.posts * PER_POST:,} pairs as {asked.form}", end="")
        if asked.only != "open" and not database.exists():
            start = time.perf_counter()
            aside = Path(tempfile.mkdtemp(prefix=".part-", dir=place)) / "database"
            write_parquet(aside, asked.posts) if asked.form == "parquet" else write_sqlite(aside, asked.posts)
            aside.rename(database)
            aside.parent.rmdir()
            print(f" (written in {time.perf_counter() - start:.0f} s)", end="")
        print(flush=True)
        if asked.only == "write":
            return
        shutil.rmtree(place / "arrays", ignore_errors=True)  # or the first opening would be a second one
        rows = []
        for which in ("first opening", "second opening"):
            line = [sys.executable, __file__, "--measure", str(database), str(place / "arrays")]
            done = subprocess.run(line, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{which:<16}{rows[-1]['seconds']:9.2f} s   peak {rows[-1]['peak_gb']:.2f} GB", flush=True)
        print(f"captions        {rows[-1]['captions']:9,.0f} a second, one core (kohaku-2024-01)")
        print(f"second / first  {rows[1]['seconds'] / rows[0]['seconds']:9.4f}")
    finally:
        if asked.folder is None:
            shutil.rmtree(place)


def measure(database: Path, cache: Path) -> None:
    """Open, then write captions of up to 500,000 posts; one line of JSON."""
    start = time.perf_counter()
    booru = open_booru(database, cache)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    values = plain(compose("data", ["action=captions"]))["captions"]
    rows = np.arange(min(len(booru), 500_000))
    start = time.perf_counter()
    count = sum(text is not None for _, text in caption_lines(booru, settings(CaptionRecipe, values), rows))
    rate = count / (time.perf_counter() - start)
    print(json.dumps({"seconds": seconds, "peak_gb": peak, "captions": rate}))


def tag_rows() -> list[tuple[int, str, int]]:
    kinds = np.random.default_rng(1).choice(5, TAGS, p=[0.3, 0.35, 0.25, 0.05, 0.05])
    named = {0: "1girl", 1: "solo", 2: "long_hair", 3: "highres", 4: "translated"}
    return [(n + 1, named.get(n, f"tag_number_{n}"), 0 if n < 3 else int(kinds[n])) for n in range(TAGS)]


def post_pieces(posts: int) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, posts, PIECE):
        draw = np.random.default_rng([2, start])
        size = min(PIECE, posts - start)
        years = draw.integers(2005, 2024, size)
        yield {
            "id": np.arange(start, start + size) + 1,
            "created_at": np.char.add(years.astype(str), "-05-19T01:30:25.096-04:00"),
            "rating": draw.integers(0, 4, size),
            "score": draw.geometric(0.05, size) - 5,
            "fav_count": draw.geometric(0.04, size),
            "image_width": draw.integers(500, 4000, size),
            "image_height": draw.integers(500, 4000, size),
            "file_ext": draw.choice(["jpg", "png"], size),
        }


def pair_pieces(posts: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(id, post id, tag id), in the order of posts, as the real relation is."""
    for start in range(0, posts, PIECE):
        draw = np.random.default_rng([3, start])
        size = min(PIECE, posts - start)
        count = size * PER_POST
        tags = np.minimum((TAGS ** draw.random(count)).astype(np.int64), TAGS)  # density 1/rank
        owners = np.repeat(np.arange(start, start + size) + 1, PER_POST)
        yield np.arange(start * PER_POST, start * PER_POST + count) + 1, owners, tags


def write_parquet(folder: Path, posts: int) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(
        pa.table(dict(zip(("id", "name", "type"), map(list, zip(*tag_rows(), strict=True)), strict=True))),
        folder / "tag.parquet",
    )
    for name, pieces in (
        ("post", (pa.table(piece) for piece in post_pieces(posts))),
        ("posttagrelation", (pa.table({"id": i, "post_id": p, "tag_id": t}) for i, p, t in pair_pieces(posts))),
    ):
        writer = None
        for piece in pieces:
            writer = writer or parquet.ParquetWriter(folder / f"{name}.parquet", piece.schema, compression="zstd")
            writer.write_table(piece)
        assert writer is not None
        writer.close()


def write_sqlite(path: Path, posts: int) -> None:
    with sqlite3.connect(path) as db:
        db.executescript(
            """PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;
            CREATE TABLE tag (id INTEGER PRIMARY KEY, name TEXT, type INTEGER);
            CREATE TABLE post (id INTEGER PRIMARY KEY, created_at TEXT, rating INTEGER, score INTEGER, fav_count INT,
                image_width INTEGER, image_height INTEGER, file_ext TEXT);
            CREATE TABLE posttagrelation (id INTEGER PRIMARY KEY, post_id INTEGER, tag_id INTEGER);"""
        )
        db.executemany("INSERT INTO tag VALUES (?, ?, ?)", tag_rows())
        for piece in post_pieces(posts):
            db.executemany(
                "INSERT INTO post VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                zip(*(v.tolist() for v in piece.values()), strict=True),
            )
        for columns in pair_pieces(posts):
            db.executemany(
                "INSERT INTO posttagrelation VALUES (?, ?, ?)", zip(*(v.tolist() for v in columns), strict=True)
            )
    db.close()


if __name__ == "__main__":
    main()
