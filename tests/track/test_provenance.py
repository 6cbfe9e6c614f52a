"""What made a run: judged by git itself, by /proc and by hashlib."""

import hashlib
import json
import os
import subprocess
import timeit
from pathlib import Path

import pytest

from ambergrade.track import provenance as room
from ambergrade.track.database import MlflowClient
from ambergrade.track.journal import Journal

pytestmark = pytest.mark.usefixtures("quick_database")


def git(place: Path, *arguments: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    return subprocess.run(
        ["git", *who, "-C", str(place), *arguments], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    place = tmp_path / "code"
    (place / "src").mkdir(parents=True)
    (place / "src" / "a.py").write_text("one\ntwo\n")
    (place / "gone.txt").write_text("x\n")
    (place / "picture.bin").write_bytes(bytes(range(256)))
    (place / ".gitignore").write_text("*.log\n")
    git(place, "init", "-q")
    git(place, "add", ".")
    git(place, "commit", "-qm", "first")
    return place


def change(place: Path) -> None:
    (place / "src" / "a.py").write_text("one\n2\n")
    (place / "gone.txt").unlink()
    (place / "picture.bin").write_bytes(bytes(range(255, -1, -1)))
    (place / "src" / "new.py").write_text("é\nno newline")
    (place / "src" / "empty.py").touch()
    (place / "src" / "noise.log").write_text("ignored")
    (place / "notes.txt").write_text("outside the code")


def test_the_patch_makes_the_commit_what_ran_and_untracked_files_are_listed_by_name_only(
    checkout: Path, tmp_path: Path
) -> None:
    change(checkout)
    (checkout / "conf").mkdir()
    (checkout / "conf" / ".env").write_text("TOKEN=swordfish")
    tags, files = room.code(checkout)
    assert tags["git.sha"] == tags["mlflow.source.git.commit"] == git(checkout, "rev-parse", "HEAD").strip()
    assert tags["git.dirty"] == "true"
    assert tags["git.diff_sha"] == hashlib.sha256(files["diff.patch"].encode()).hexdigest()
    again = tmp_path / "again"
    subprocess.run(["git", "clone", "-q", str(checkout), str(again)], check=True)
    patch = tmp_path / "diff.patch"
    patch.write_text(files["diff.patch"])
    git(again, "apply", str(patch))
    for name in ("src/a.py", "picture.bin"):
        assert (again / name).read_bytes() == (checkout / name).read_bytes(), name
    assert not (again / "gone.txt").exists()
    assert files["untracked.txt"] == "conf/.env\nsrc/empty.py\nsrc/new.py\n"
    assert "no newline" not in str(files)
    assert "swordfish" not in str(files)


def test_a_clean_checkout_has_no_patch_and_no_checkout_is_said(checkout: Path, tmp_path: Path) -> None:
    tags, files = room.code(checkout)
    assert (tags["git.dirty"], files) == ("false", {})
    assert "git.diff_sha" not in tags
    (checkout / "src" / "new.py").touch()
    tags, files = room.code(checkout)
    assert (tags["git.dirty"], list(files)) == ("true", ["untracked.txt"])
    (tmp_path / "none").mkdir()
    assert room.code(tmp_path / "none") == ({"git.sha": "unknown", "git.dirty": "unknown"}, {})


def test_a_patch_that_is_too_long_is_cut_where_it_says_so(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (checkout / "src" / "a.py").write_text("x = 1\n" * 150)
    whole = room.code(checkout)[1]["diff.patch"]
    monkeypatch.setattr(room, "MOST_DIFF", 500)
    tags, files = room.code(checkout)
    diff = files["diff.patch"]
    assert tags["git.diff_sha"] == hashlib.sha256(whole.encode()).hexdigest()
    assert tags["git.diff"] == f"{len(whole)} bytes, cut to 500"
    assert diff.startswith(f"This patch is cut after 500 of {len(whole)} bytes")
    assert whole.startswith(diff.partition("\n")[2])


def test_hardware_is_what_the_kernel_says() -> None:
    found = room.hardware()
    assert found["cpu"] in Path("/proc/cpuinfo").read_text()
    assert found["cpu.cores"] == len(os.sched_getaffinity(0))
    kilobytes = int(Path("/proc/meminfo").read_text().split()[1])
    assert found["memory_gb"] == pytest.approx(kilobytes * 1024 / 1e9, abs=0.06)


def test_cards_are_read_from_the_drivers_files(tmp_path: Path) -> None:
    for number, name in enumerate(["NVIDIA H100 80GB HBM3", "NVIDIA L4"]):
        folder = tmp_path / "gpus" / f"0000:0{number}:00.0"
        folder.mkdir(parents=True)
        (folder / "information").write_text(f"Model: \t\t {name}\nIRQ:   \t\t 42\n")
    version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version:\n"
    (tmp_path / "version").write_text(version)
    assert room._cards(tmp_path) == (["NVIDIA H100 80GB HBM3", "NVIDIA L4"], "550.54.15")


def test_a_parent_keeps_files_a_child_only_tags_and_it_costs_less_than_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkout: Path
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(room, "CODE", checkout)
    change(checkout)
    (checkout / "pyproject.toml").write_text("")
    (checkout / "requirements.lock").write_text("torch==2\n")
    journal = Journal.open(tmp_path, "gamma")
    looks = timeit.repeat(lambda: room.provenance.__wrapped__(tmp_path), number=1, repeat=3)
    assert min(looks) < 1  # 0.05 on a quiet machine
    with journal.run("chain", key="c", kind="chain") as parent:
        parent.provenance({"a": 0.8, "name": "é"}, ["a=0.8"])
        with journal.run("point", key="p", kind="point", parent=parent) as child:
            pass
    client = MlflowClient(journal.uri)
    files = {file.path for file in client.list_artifacts(parent.id)}
    assert files == {
        "config.yaml",
        "overrides.yaml",
        "diff.patch",
        "untracked.txt",
        "requirements.lock",
        "hardware.json",
    }

    def text(name: str) -> str:
        return Path(client.download_artifacts(parent.id, name)).read_text()

    assert text("config.yaml") == "a: 0.8\nname: é\n"
    assert text("overrides.yaml") == "- a=0.8\n"
    assert json.loads(text("hardware.json"))["cpu.cores"] == len(os.sched_getaffinity(0))
    assert not client.list_artifacts(child.id)
    for run in (parent, child):
        tags = client.get_run(run.id).data.tags
        assert tags["env.lock_sha"] == hashlib.sha256(b"torch==2\n").hexdigest()
        assert tags["git.diff_sha"] == hashlib.sha256(text("diff.patch").encode()).hexdigest()
        assert tags["git.dirty"] == "true"
        assert tags["cpu"]
