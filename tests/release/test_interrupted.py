"""Releases whose build is killed, finds a full disk or may not write: never one that looks finished and is not."""

from __future__ import annotations

import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ambergrade.chain.verification import Asked, verify_release
from ambergrade.release.build import Payload, build_release
from ambergrade.release.facts import Draft

PROGRAM = textwrap.dedent("""
    import pickle, sys; from pathlib import Path; from ambergrade.release.build import build_release
    from ambergrade.errors import AmbergradeError
    draft, payload = pickle.loads(Path(sys.argv[1]).read_bytes())
    print("ready", flush=True)
    try:
        build_release(Path(sys.argv[2]), draft, payload)
    except (AmbergradeError, OSError) as error:
        sys.exit(f"told: {error}")
""")


@pytest.fixture
def given(both: tuple[Draft, Payload], tmp_path: Path) -> Path:
    """What a build takes, for another process; a summary of some length makes its papers larger."""
    draft, payload = both
    (tmp_path / "given").write_bytes(pickle.dumps((replace(draft, version="rev2"), payload)))
    return tmp_path / "given"


def whole(folder: Path) -> bool:
    """Say whether a folder's files are those that it lists; scores are not looked at, these sheets are made up."""
    return not any(found.wrong for found in verify_release(folder, Asked(skip=("scores",))))


def started(given: Path, out: Path) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", PROGRAM, str(given), str(out)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_a_build_that_is_killed_at_any_moment_leaves_the_old_release_or_the_new_one(
    both: tuple[Draft, Payload], given: Path, tmp_path: Path
) -> None:
    out = tmp_path / "releases" / "gamma"
    build_release(out, *both)
    old = (out / "MANIFEST.json").read_bytes()
    begun = time.monotonic()
    process = started(given, out)
    assert process.wait() == 0, process.communicate()
    longest = time.monotonic() - begun
    chance = random.Random(0)
    ended = set()
    for _ in range(30):
        build_release(out, *both)
        process = started(given, out)
        time.sleep(chance.uniform(0, min(longest, 2.0)))
        process.kill()
        ended.add(process.wait())
        found = out if out.exists() else out.with_name(f".{out.name}.old")  # between the two renames
        assert whole(found)
        assert found == out or (found / "MANIFEST.json").read_bytes() == old
    assert -signal.SIGKILL in ended
    build_release(out, *both)
    assert sorted(path.name for path in out.parent.iterdir()) == ["gamma"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that a release does not fit into; making one takes root."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a file system can be made by root only")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_told_and_leaves_nothing(given: Path, small_disk: Path) -> None:
    process = started(given, small_disk / "gamma")
    _, told = process.communicate()
    assert process.returncode == 1
    assert "told: " in told
    assert "No space left" in told or "no room" in told
    assert list(small_disk.iterdir()) == []


def test_a_target_that_may_not_be_written_is_told(given: Path, tmp_path: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    process = started(given, small_disk / "gamma")
    _, told = process.communicate()
    assert process.returncode == 1
    assert "Read-only" in told
