"""The store holds bytes by content; the ledger runs each stage once, whatever is killed."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ambergrade.errors import MissingObject, UnknownName
from ambergrade.identity import file_digest
from ambergrade.store import Finished, Ledger, Outputs, Store, find_file, link_or_copy, write_json, written_aside


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def test_bytes_go_in_and_come_out_read_only(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    source = tmp_path / "a.bin"
    source.write_bytes(b"amber" * 1000)
    sha256 = store.put(source)
    assert sha256 == file_digest(source) == store.put(source)
    place = store.path(sha256)
    assert place.read_bytes() == source.read_bytes()
    assert stat.S_IMODE(place.stat().st_mode) == 0o444
    source.write_bytes(b"changed afterwards")  # must not reach into the store
    assert file_digest(place) == sha256
    assert leftovers(tmp_path) == []
    assert not store.holds("0" * 64)
    with pytest.raises(MissingObject, match="0" * 12):
        store.path("0" * 64)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.json"
    write_json(target, {"b": 1, "a": [2]})
    assert json.loads(target.read_text()) == {"a": [2], "b": 1}

    def fail_half_way() -> None:
        with written_aside(target) as aside:
            aside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert json.loads(target.read_text()) == {"a": [2], "b": 1}
    assert leftovers(tmp_path) == []


def test_links_replace_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("new")
    (tmp_path / "b").write_text("old")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    link_or_copy(tmp_path / "a", tmp_path / "b")  # the two are one file by now
    assert (tmp_path / "b").read_text() == "new"
    assert leftovers(tmp_path) == []


def test_files_are_found_by_path_or_among_what_ships(tmp_path: Path) -> None:
    assert find_file(str(tmp_path)) == tmp_path
    with pytest.raises(MissingObject, match="No file or folder"):
        find_file(str(tmp_path / "absent"))
    with pytest.raises(UnknownName, match="builtin 'no-such-thing'"):
        find_file("builtin://no-such-thing")


def write(ledger: Ledger, text: str, calls: list[str], **changes: object) -> Finished:
    def work(scratch: Path) -> Outputs:
        calls.append(text)
        (scratch / "out.txt").write_text(text)
        return Outputs({"out": scratch / "out.txt"}, {"length": len(text)})

    stage = {"stage": "write", "version": 1, "settings": {"text": text}, "inputs": {"base": "ab"}, **changes}
    return ledger.once(**stage, work=work)  # type: ignore[arg-type]


def test_a_stage_runs_once_per_identity(tmp_path: Path) -> None:
    ledger, calls = Ledger(tmp_path), list[str]()
    first = write(ledger, "amber", calls)
    again = write(ledger, "amber", calls)
    assert (first.fresh, again.fresh) == (True, False)
    assert again.values == {"length": 5}
    assert again.files["out"].read_text() == "amber"
    assert again.digests == {"out": file_digest(again.files["out"])}
    assert first.identity == again.identity
    for change in ({"version": 2}, {"settings": {"text": "x"}}, {"inputs": {"base": "cd"}}, {"stage": "other"}):
        assert write(ledger, "amber", calls, **change).fresh
    assert len(calls) == 5
    assert list((tmp_path / "work").rglob("*.txt")) == []


def test_a_deleted_object_is_made_again(tmp_path: Path) -> None:
    ledger, calls = Ledger(tmp_path), list[str]()
    done = write(ledger, "amber", calls)
    done.files["out"].unlink()
    assert write(ledger, "amber", calls).fresh
    assert write(ledger, "amber", calls).files["out"].read_text() == "amber"
    assert len(calls) == 2


def test_a_failed_stage_leaves_no_record_and_keeps_its_scratch(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    seen: list[list[str]] = []

    def work(scratch: Path) -> Outputs:
        seen.append(sorted(path.name for path in scratch.iterdir()))
        (scratch / f"part{len(seen)}").touch()
        if len(seen) == 1:
            raise RuntimeError("no luck")
        return Outputs()

    with pytest.raises(RuntimeError, match="no luck"):
        ledger.once("flaky", 1, {}, {}, work)
    assert list((tmp_path / "records").rglob("*.json")) == []
    assert ledger.once("flaky", 1, {}, {}, work).fresh
    assert seen == [[], ["part1"]]  # the second try could resume from what the first left


SCRIPT = """
import os, sys, time
from pathlib import Path
from ambergrade.store import Ledger, Outputs

root, patience = Path(sys.argv[1]), float(sys.argv[2])

def work(scratch):
    with (root / "calls").open("a") as file:
        file.write(f"{os.getpid()}\\n")
    (root / "begun").touch()
    time.sleep(patience)
    (scratch / "out").write_text("amber")
    return Outputs({"out": scratch / "out"}, {})

done = Ledger(root / "mlruns").once("slow", 1, {}, {}, work)
print(done.fresh, done.files["out"].read_text())
"""


def start(root: Path, patience: float) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(root), str(patience)], stdout=subprocess.PIPE, text=True)


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def test_a_killed_stage_is_run_again_and_its_lock_is_gone(tmp_path: Path) -> None:
    first = start(tmp_path, 600)
    wait_for(tmp_path / "begun")
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert list((tmp_path / "mlruns" / "records").rglob("*.json")) == []
    second = start(tmp_path, 0)
    assert second.communicate(timeout=60)[0] == "True amber\n"
    assert len((tmp_path / "calls").read_text().splitlines()) == 2


def test_two_processes_share_one_piece_of_work(tmp_path: Path) -> None:
    both = [start(tmp_path, 1.0) for _ in range(2)]
    printed = sorted(process.communicate(timeout=60)[0] for process in both)
    assert printed == ["False amber\n", "True amber\n"]
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
