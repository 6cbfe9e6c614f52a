"""pipelines/data.py as a user runs it: captions, explain, lint, build, percentiles; and its mistakes."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ambergrade.nouns import CaptionSet

REPOSITORY = Path(__file__).parents[2]
TAGS = [(1, "1girl", 0), (2, "long_hair", 0), (3, "amber_(world)", 2), (4, "original", 3), (5, "inkmoth", 1)]
TAGS += [(6, "bad_id", 4), (7, "highres", 4), (8, "^_^", 0), (9, "banned_artist", 1)]
POSTS = {  # id: (created_at, rating, score, tags in row order)
    100: ("2021-05-19T01:30:25.096-04:00", 0, 38, [2, 8, 1, 5, 4, 3, 6, 7]),
    200: ("2009-05-19T01:30:25.096-04:00", 3, 297, [2, 9]),
    300: ("soon", 7, 5, [1]),
    7000000: ("2024-05-19T01:30:25.096-04:00", 1, 500, [1, 2]),
}
# worked out by hand from HakuBooru's rules at acb89aa
CAPTIONS = {
    100: "1girl, amber (world), original, inkmoth, |||long hair, ^_^, highres, newest, safe, best quality",
    200: ", |||long hair, old, explicit, nsfw, masterpiece",
    7000000: "1girl, |||long hair, newest, sensitive",
}


def command(root: Path, *arguments: str, fails: bool = False) -> str:
    line = [sys.executable, "pipelines/data.py", f"root={root}", *arguments]
    done = subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert (done.returncode == 1) == fails, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr if fails else done.stdout


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("booru")
    with sqlite3.connect(folder / "booru.sqlite") as db:
        db.executescript(
            """CREATE TABLE tag (id INTEGER PRIMARY KEY, name TEXT, type INTEGER);
            CREATE TABLE post (id INTEGER PRIMARY KEY, created_at TEXT, image_width INTEGER, image_height INTEGER,
                file_ext TEXT, rating INTEGER, score INTEGER, fav_count INTEGER);
            CREATE TABLE posttagrelation (id INTEGER PRIMARY KEY, post_id INTEGER, tag_id INTEGER);"""
        )
        db.executemany("INSERT INTO tag VALUES (?, ?, ?)", TAGS)
        for post, (date, rating, score, tags) in POSTS.items():
            db.execute("INSERT INTO post VALUES (?, ?, 160, 128, 'png', ?, ?, 3)", (post, date, rating, score))
            pairs = [(post, tag) for tag in tags]
            db.executemany("INSERT INTO posttagrelation (post_id, tag_id) VALUES (?, ?)", pairs)
    db.close()
    for post in (100, 200, 7000000):
        noise = np.random.default_rng(post).integers(0, 256, (128, 160, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{post}.png")
    return folder / "booru.sqlite"


def test_captions_are_hakubooru_s_to_the_character(database: Path, tmp_path: Path) -> None:
    out = tmp_path / "captions.jsonl"
    told = command(tmp_path, "action=captions", f"database={database}", "captions=kohaku-2024-01", f"out={out}")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["id"]: row["caption"] for row in rows} == CAPTIONS
    assert [row["id"] for row in rows] == sorted(CAPTIONS)
    assert "1 posts left out" in told
    assert "300" in told
    command(tmp_path, "action=captions", f"database={database}", f"out={out}", "data.selection.score_min=100")
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == [200, 7000000]


def test_explain_says_which_rule_gave_each_part(database: Path, tmp_path: Path) -> None:
    told = command(tmp_path, "action=explain", "id=100", f"database={database}")
    assert CAPTIONS[100] in told
    for line in (
        "keep: special",
        "drop.meta: contains 'bad'",
        "flexible: meta",
        "band …–2024",
        "> 23 and ≤ 38 for general",
    ):
        assert line in told, line


def test_lint_writes_its_report(database: Path, tmp_path: Path) -> None:
    out = tmp_path / "lint"
    told = command(tmp_path, "action=lint", f"database={database}", f"pictures={database.parent}", f"out={out}")
    rows = [json.loads(line) for line in (out / "findings.jsonl").read_text().splitlines()]
    assert {(row["id"], row["rule"]) for row in rows} == {(300, "missing"), (300, "rating")}
    assert (out / "leave_out.txt").read_text() == "300\n"
    assert "missing" in told
    assert "<html" in (out / "lint.html").read_text()


@pytest.mark.slow  # torch and MLflow are imported
def test_build_writes_manifests(database: Path, tmp_path: Path) -> None:
    build = ["action=build", "family=sdxl_tiny", f"database={database}", f"pictures={database.parent}"]
    build += ["data.selection.heldout_share=0.5", "data.selection.seed=1"]
    told = command(tmp_path, *build, f"out={tmp_path / 'set'}")
    sets = [CaptionSet.read(tmp_path / "set" / f"{split}.jsonl") for split in ("train", "heldout")]
    assert sorted(p.post_id for captions in sets for p in captions.pictures) == [100, 200, 7000000]
    assert "picture file missing" in told
    assert "GB" in told


def test_percentiles_make_a_table_that_a_recipe_takes(database: Path, tmp_path: Path) -> None:
    told = command(tmp_path, "action=percentiles", f"database={database}", "percentiles.metric=score", fails=True)
    assert "No post with the rating 'questionable'" in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["action=lnt"], "lint"),
        ([], "action=…"),
        (["action=captions", "database=DB"], "out=FILE.jsonl"),
        (["action=captions", "database=nowhere.sqlite", "out=x"], "nowhere.sqlite"),
        (["action=explain", "database=DB", "id=101"], "100"),
        (["action=captions", "database=DB", "out=x", "captions.drop.metta=[a]"], "drop"),
        (["action=captions", "database=DB", "out=x", "captions.keep=[special,speciel]"], "special"),
        (["action=lint", "database=DB", "pictures=PICTURES", "limits.grit=1"], "grid"),
        (["action=captions", "database=DB", "out=x", "captions=kohaku-2024-1"], "kohaku-2024-01"),
    ],
)
def test_mistakes_are_told(arguments: list[str], told: str, database: Path, tmp_path: Path) -> None:
    given = [word.replace("DB", str(database)).replace("PICTURES", str(database.parent)) for word in arguments]
    assert told in command(tmp_path, *given, fails=True)


def test_a_database_without_the_expected_columns(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "x.sqlite") as db:
        db.executescript("CREATE TABLE post (id INTEGER, rating INTEGER); CREATE TABLE tag (id INTEGER, name TEXT)")
    db.close()
    told = command(tmp_path, "action=captions", f"database={tmp_path / 'x.sqlite'}", "out=x", fails=True)
    assert "lacks" in told
    assert "tag.type" in told
