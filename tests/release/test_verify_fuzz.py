"""Damaged and hostile releases: every mutation ends in a clear error, soon and in little memory."""

from __future__ import annotations

import json
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ambergrade.chain.verification import Asked, verify_release
from ambergrade.chain.versions import compare_releases
from ambergrade.errors import AmbergradeError
from ambergrade.family.header import read_header
from ambergrade.merge.files import read_recipe, recipe_of
from ambergrade.release.sums import check_sums
from ambergrade.score.comparison import aggregates
from ambergrade.score.sheet import ScoreSheet, suspected

MOST_SECONDS, MOST_BYTES = 2.0, 200 << 20
WORDS = [b"0", b"-1", b"1e999", b"99999999999999999999", b"null", b"true", b"[]", b"{}", b'""', b'"\\ud800"', b"NaN"]
WORDS += [b'"../../etc/passwd"', b'"/etc/passwd"', b"\x00", b"\xff", b"'", b'"', b"\n", b"*a"]
WORDS += [b"[" * 2000, b'{"a":' * 900]
ODD = [
    None,
    True,
    -1,
    0,
    1 << 80,
    1e300,
    -0.0,
    "",
    "../x",
    "/etc/passwd",
    "\u202e\n",
    [],
    {},
    [[]],
    {"": {}},
    "x" * 4000,
]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """Change bytes in one to three places: flip, cut out, double, or put something odd in place of something."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(found) + 1)
        end = min(len(found), place + chance.choice([0, 1, 1, 2, 4, 16, 64, 512]))
        match chance.randrange(5):
            case 0:
                if place < len(found):
                    found[place] ^= 1 << chance.randrange(8)
            case 1:
                del found[place:end]
            case 2:
                found[place:place] = found[place:end]
            case 3:
                found[place:end] = chance.choice(WORDS)
            case 4:
                found[place:end] = bytes(chance.randrange(256) for _ in range(end - place))
    return bytes(found)


def with_other_value(text: str, chance: random.Random) -> str:
    """Put another value at a random place of a JSON text, which stays JSON."""
    value = json.loads(text)
    here = value
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        key = chance.choice(keys)
        inner = here[key]
        if not isinstance(inner, dict | list) or not inner or chance.random() < 0.15:
            break
        here = inner
    here[key] = chance.choice(ODD)
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def tried(step: Callable[[], object]) -> None:
    """Run one step: it may refuse, in a few lines, and may not take long."""
    start, told = time.process_time(), "x"
    try:
        step()
    except AmbergradeError as error:
        told = str(error)
    assert 0 < len(told) < 4000
    assert time.process_time() - start < MOST_SECONDS


def facts_and_papers(folder: Path) -> None:
    for found in verify_release(folder, Asked(skip=("sums", "headers", "scores", "inputs"))):
        assert len("\n".join(found.wrong)) < 500_000


def sheet_and_numbers(file: Path) -> None:
    sheet = ScoreSheet.read(file)
    with suspected(file.name):
        aggregates(sheet)


CASES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "header": ("gamma-rev1.safetensors", lambda folder: recipe_of(folder / "gamma-rev1.safetensors")),
    "tensors": ("gamma-rev1.safetensors", lambda folder: read_header(folder / "gamma-rev1.safetensors")),
    "recipe": ("recipe.yaml", lambda folder: read_recipe(folder / "recipe.yaml")),
    "manifest": ("MANIFEST.json", check_sums),
    "sums": ("SHA256SUMS", check_sums),
    "facts": ("release.json", facts_and_papers),
    "bom": ("bom.cdx.json", facts_and_papers),
    "provenance": ("provenance.intoto.json", facts_and_papers),
    "sheet": ("scores/released.parquet", lambda folder: sheet_and_numbers(folder / "scores" / "released.parquet")),
}


@pytest.fixture
def release(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / sound.name))


def fuzz(release: Path, case: str, count: int) -> None:
    name, step = CASES[case]
    data = (release / name).read_bytes()
    step(release)  # as it is: what it loads is not counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(count):
        chance = random.Random(f"{case} {number}")
        if name.endswith(".json") and number % 2:
            changed = with_other_value(data.decode(), chance).encode()
        elif case == "header" and number % 2:  # inside of the JSON, the lengths made right
            size = struct.unpack("<Q", data[:8])[0]
            text = mutated(data[8 : 8 + size], chance)
            changed = struct.pack("<Q", len(text)) + text + data[8 + size :]
        else:
            changed = mutated(data, chance)
        (release / name).write_bytes(changed)
        try:
            tried(lambda: step(release))
        except Exception as error:
            raise AssertionError(f"{case} {number}: {type(error).__name__} {error}") from error
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) << 10 < MOST_BYTES


@pytest.mark.parametrize("case", CASES)
def test_some_damaged_files_end_in_clear_errors(release: Path, case: str) -> None:
    fuzz(release, case, 30)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ten_thousand_damaged_files_end_in_clear_errors(release: Path, case: str) -> None:
    fuzz(release, case, 1200)


@pytest.mark.slow
def test_sheets_whose_header_says_what_no_scorer_said(release: Path) -> None:
    file = release / "scores" / "released.parquet"
    table = pq.read_table(file)
    header = table.schema.metadata[b"ambergrade.score_sheet"].decode()
    for number in range(1500):
        chance = random.Random(f"sheet's header {number}")
        text = with_other_value(header, chance)
        if number % 3 == 0:  # another metric is said to have scored
            text = text.replace('"mosaic"', f'"{chance.choice(["fid", "clip_score", "tag_adherence", "os", "kid"])}"')
        pq.write_table(table.replace_schema_metadata({b"ambergrade.score_sheet": text.encode()}), file)
        tried(lambda: sheet_and_numbers(file))


def test_facts_that_contradict_themselves_are_told(release: Path) -> None:
    for path, value in [
        (("evaluation", "sheets"), {}),
        (("evaluation", "sheets"), {"gamma": "../../etc/passwd"}),
        (("evaluation", "sheets"), {"gamma": "/etc/passwd"}),
        (("evaluation", "scores"), {}),
        (("licenses",), {}),
        (("weights", "listed"), {}),
        (("recipe", "models"), {}),
    ]:
        before = (release / "release.json").read_bytes()
        values = json.loads(before)
        here = values
        for key in path[:-1]:
            here = here[key]
        here[path[-1]] = value
        (release / "release.json").write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", "utf-8")
        wrong = [line for found in verify_release(release, Asked()) for line in found.wrong]
        assert wrong, path
        tried(lambda: compare_releases(release, release))
        (release / "release.json").write_bytes(before)
