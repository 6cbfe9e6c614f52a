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

from ambergrade.door.outputs import refuse_overwrite
from ambergrade.errors import BadInput, BadSetting, MissingObject, UnknownName
from ambergrade.identity import file_digest
from ambergrade.store import (
    Digests,
    Finished,
    Ledger,
    Outputs,
    Store,
    copy_file,
    find_file,
    link_or_copy,
    write_json,
    written_aside,
)


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


def test_a_copy_shares_nothing_with_its_source(tmp_path: Path) -> None:
    source, target = tmp_path / "a", tmp_path / "deep" / "b"
    source.write_bytes(os.urandom(3_000_000))
    copy_file(source, target)
    before = target.read_bytes()
    assert before == source.read_bytes()
    with source.open("r+b") as file:
        file.write(b"changed")
    assert target.read_bytes() == before
    assert target.stat().st_nlink == 1
    assert leftovers(tmp_path) == []


def overwrite_at(path: Path, length: int | None = None) -> None:
    """Damage a read-only object as a bad disk would: other bytes, and the same times; or another length."""
    before = path.stat()
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data[:length])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    path.chmod(0o444)


def test_a_damaged_object_is_told_and_replaced_when_it_is_put_again(tmp_path: Path) -> None:
    store, source = Store(tmp_path / "store"), tmp_path / "a.bin"
    source.write_bytes(b"amber" * 1000)
    sha256 = store.put(source)
    assert store.verified(sha256, 5000).read_bytes() == source.read_bytes()
    overwrite_at(store.path(sha256))
    with pytest.raises(MissingObject, match=f"{sha256[:12]}.*damaged"):
        store.verified(sha256)
    assert store.put(source) == sha256
    assert store.verified(sha256).read_bytes() == source.read_bytes()
    overwrite_at(store.path(sha256), length=17)
    with pytest.raises(MissingObject, match=r"17 bytes of 5,000"):
        store.path(sha256, 5000)
    assert not store.holds(sha256, 5000)
    store.put(source)
    assert store.holds(sha256, 5000)
    assert leftovers(tmp_path) == []


def test_a_sound_object_is_read_once_and_again_after_any_change(tmp_path: Path) -> None:
    """Known by inode, size, mtime and ctime: the same mtime and size do not help a changed file."""
    file, cache = tmp_path / "a.bin", tmp_path / "digests.json"
    file.write_bytes(b"amber")
    time.sleep(0.1)  # older than a tick of the clock that stamps files
    digests = Digests(cache)
    first = digests.of_file(file)
    digests.save()
    assert Digests(cache).known(file) == first
    overwrite_at(file)
    assert Digests(cache).known(file) is None
    assert Digests(cache).of_file(file) == file_digest(file) != first
    for foreign in ("{torn", "[1]", '{"x": 1}', "[" * 100_000, '"\\ud800"'):
        cache.write_text(foreign)
        assert Digests(cache).known(file) is None


def test_digests_that_cannot_be_kept_are_told_and_stop_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    time.sleep(0.1)
    digests = Digests(tmp_path / "file" / "digests.json")  # under a file there is no folder
    digests.of_file(tmp_path / "file")
    digests.save()
    assert "not remembered" in caplog.text


def test_a_file_that_was_just_written_is_not_remembered(tmp_path: Path) -> None:
    """A second change within one tick of the file system's clock leaves the same times."""
    file, digests = tmp_path / "a.bin", Digests(tmp_path / "digests.json")
    file.write_bytes(b"amber")
    digests.of_file(file)
    assert digests.known(file) is None


def test_outputs_replace_only_what_they_may(tmp_path: Path) -> None:
    def is_ours(path: Path) -> None:
        if path.read_text() != "ours":
            raise BadInput("it holds other things.")

    ours, other = tmp_path / "ours.jsonl", tmp_path / "other.jsonl"
    ours.write_text("ours")
    other.write_text("a thesis")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "link.jsonl").symlink_to(ours)
    (tmp_path / "broken.jsonl").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.jsonl")
    refusals = {
        "ours.txt": "must end in .jsonl",
        "folder.jsonl": "is a folder",
        "link.jsonl": "is a link",
        "broken.jsonl": "is a link",
        "pipe.jsonl": "is a device",
        "other.jsonl": "other things",
        "ours.jsonl/x.jsonl": "cannot be written",
        "x" * 300 + ".jsonl": "cannot be written",
        "x\0.jsonl": "cannot be written",
    }
    for name, says in refusals.items():
        with pytest.raises(BadSetting, match=says):
            refuse_overwrite(tmp_path / name, [".jsonl"], overwrite=True, check=is_ours)
    with pytest.raises(BadSetting, match="read by this very command"):
        refuse_overwrite(ours, [".jsonl"], overwrite=True, inputs=[tmp_path / "nowhere", ours])
    with pytest.raises(BadSetting, match="is there already"):
        refuse_overwrite(ours, [".jsonl"], check=is_ours)
    refuse_overwrite(ours, [".jsonl"], overwrite=True, check=is_ours)
    refuse_overwrite(tmp_path / "new" / "new.jsonl", [".json", ".jsonl"])


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


@pytest.mark.parametrize("length", [3, None])
def test_a_damaged_object_is_told_and_its_stage_runs_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, length: int | None
) -> None:
    """A wrong size is seen at every use, other bytes where they are verified."""
    ledger, calls = Ledger(tmp_path), list[str]()
    done = write(ledger, "amber", calls)
    assert done.sizes == {"out": 5}
    overwrite_at(done.files["out"], length)
    if length is None:
        assert ledger.find("write", done.identity) is not None
    assert ledger.find("write", done.identity, verify=True) is None
    assert done.digests["out"][:12] in caplog.text
    assert "write" in caplog.text
    again = write(ledger, "amber", calls, verify=True)
    assert again.fresh
    assert again.files["out"].read_text() == "amber"
    assert not write(ledger, "amber", calls, verify=True).fresh


def test_a_record_without_sizes_is_read(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    done = write(ledger, "amber", [])
    (record,) = (tmp_path / "records").rglob("*.json")
    values = json.loads(record.read_text())
    del values["sizes"]
    record.write_text(json.dumps(values))
    found = ledger.find("write", done.identity, verify=True)
    assert found is not None
    assert found.sizes == {}


ODD_RECORDS = [
    "",
    "{",
    "null",
    "[]",
    "{}",
    "[" * 100_000,
    "\x00",
    '{"files": {"out": "../../../etc/passwd"}}',
    '{"files": {"out": 7}}',
    '{"files": null}',
    '{"identity": "other"}',
    '{"seconds": "long"}',
    '{"sizes": {"out": "5"}}',
]


@pytest.mark.parametrize("odd", ODD_RECORDS)
def test_a_torn_or_foreign_record_counts_as_not_finished(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, odd: str
) -> None:
    ledger, calls = Ledger(tmp_path), list[str]()
    write(ledger, "amber", calls)
    (record,) = (tmp_path / "records").rglob("*.json")
    whole = json.loads(record.read_text())
    record.write_text(json.dumps(whole | json.loads(odd)) if odd.startswith('{"') else odd)
    assert write(ledger, "amber", calls).fresh
    assert "not finished" in caplog.text
    assert not write(ledger, "amber", calls).fresh


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
