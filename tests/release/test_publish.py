"""Publishing: to a folder, to fsspec's memory, and to a hub that runs on this machine."""

from __future__ import annotations

import hashlib
import json
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from ambergrade.door import command
from ambergrade.errors import BadInput, BadSetting
from ambergrade.release.publish import NotReached, plan

running_hub = runpy.run_path(str(Path(__file__).parent / "fake_hub.py"))["running_hub"]


def sealed(folder: Path, files: dict[str, bytes]) -> Path:
    """A folder with a release's two lists of files."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    listed = {name: {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)} for name, data in files.items()}
    manifest = json.dumps({"name": "g", "version": "1", "files": listed}, indent=1, sort_keys=True) + "\n"
    (folder / "MANIFEST.json").write_text(manifest)
    digests = {name: row["sha256"] for name, row in listed.items()}
    digests["MANIFEST.json"] = hashlib.sha256(manifest.encode()).hexdigest()
    (folder / "SHA256SUMS").write_text("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)))
    return folder


FILES = {"g-1.safetensors": b"weights" * 1000, "README.md": b"# card\n", "samples/one.png": b"png" * 50}
NAMES = {*FILES, "MANIFEST.json", "SHA256SUMS"}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return sealed(tmp_path / "release", FILES)


def test_a_folder_gets_all_files_with_the_lists_last(release: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "here"
    first = plan(release, str(target))
    assert set(first.differs.values()) == {None}
    assert [file.name for file in first.files[-2:]] == ["MANIFEST.json", "SHA256SUMS"]
    assert not target.exists()
    first.run()
    assert {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()} == NAMES
    assert subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=target).returncode == 0
    assert plan(release, str(target)).sent == []


def test_what_is_there_is_skipped_and_what_was_cut_short_is_sent_again(release: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    plan(release, str(target)).run()
    (target / "SHA256SUMS").unlink()
    (target / "README.md").unlink()
    again = plan(release, str(target))
    assert [file.name for file in again.sent] == ["README.md", "SHA256SUMS"]
    untouched = (target / "g-1.safetensors").stat().st_mtime_ns
    again.run()
    assert (target / "g-1.safetensors").stat().st_mtime_ns == untouched
    assert plan(release, str(target)).sent == []


def test_another_file_of_equal_size_is_seen_and_replaced_only_when_asked(release: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "g-1.safetensors").write_bytes(b"WEIGHTS" * 1000)
    (target / "diary.txt").write_text("mine")
    found = plan(release, str(target))
    assert found.replaced == ["g-1.safetensors"]
    with pytest.raises(BadSetting, match="--replace"):
        found.run()
    assert (target / "g-1.safetensors").read_bytes() == b"WEIGHTS" * 1000
    assert not (target / "README.md").exists()
    found.run(replace=True)
    assert (target / "g-1.safetensors").read_bytes() == FILES["g-1.safetensors"]
    assert (target / "diary.txt").read_text() == "mine"


@pytest.mark.parametrize("damage", ["changed", "missing", "added", "unsealed"])
def test_a_release_that_is_not_whole_goes_nowhere(release: Path, tmp_path: Path, damage: str) -> None:
    if damage == "changed":
        (release / "README.md").write_bytes(b"# Card\n")
    elif damage == "missing":
        (release / "samples" / "one.png").unlink()
    elif damage == "added":
        (release / "notes.txt").write_text("x")
    else:
        (release / "MANIFEST.json").unlink()
    with pytest.raises(BadInput):
        plan(release, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_any_file_system_that_fsspec_knows_will_do(release: Path) -> None:
    memory = fsspec.filesystem("memory")
    target = "memory://bucket/releases/g-1"
    plan(release, target).run()
    assert memory.cat("/bucket/releases/g-1/samples/one.png") == FILES["samples/one.png"]
    memory.pipe("/bucket/releases/g-1/README.md", b"# Card\n")  # as long, but other
    again = plan(release, target)
    assert ([file.name for file in again.sent], again.replaced) == (["README.md"], ["README.md"])
    memory.rm("/bucket", recursive=True)


def test_places_that_cannot_be_are_told(release: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotReached):
        plan(release, str(tmp_path / "file")).run()
    with pytest.raises(BadSetting, match="nonsense://"):
        plan(release, "nonsense://bucket")
    with pytest.raises(BadSetting, match="hf://OWNER/NAME"):
        plan(release, "hf://just-a-name")
    for nothing in ("", " ", "/"):
        with pytest.raises(BadSetting, match="names no place"):
            plan(release, nothing)
    with pytest.raises(BadSetting, match="in the release itself"):
        plan(release, str(release / "again"))
    with pytest.raises(NotReached, match="cannot be read"):  # fsspec raises IndexError
        plan(release, "data:,x")
    (tmp_path / "out" / "README.md").mkdir(parents=True)
    with pytest.raises(BadInput, match="where a file should go"):
        plan(release, str(tmp_path / "out"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with running_hub() as found:
        yield found


def test_the_hub_gets_a_private_repository_in_one_commit(release: Path, hub: Any) -> None:
    first = plan(release, "hf://kay/g", endpoint=hub.address)
    assert "private, new" in first.text
    assert not any(asked.startswith(("POST", "PUT")) for asked in hub.asked)  # looking changes nothing
    first.run()
    assert hub.private == {"kay/g": True}
    assert hub.repos["kay/g"].keys() == {*NAMES, ".gitattributes"}
    assert hub.repos["kay/g"]["g-1.safetensors"] == FILES["g-1.safetensors"]
    assert hub.commits == [sorted(NAMES)]
    again = plan(release, "hf://kay/g", endpoint=hub.address)
    assert again.sent == []
    hub.repos["kay/g"]["README.md"] = b"# Card\n"
    hub.repos["kay/g"]["g-1.safetensors"] = b"WEIGHTS" * 1000
    assert set(plan(release, "hf://kay/g", endpoint=hub.address).replaced) == {"README.md", "g-1.safetensors"}


def test_what_was_uploaded_before_a_failure_is_not_uploaded_again(release: Path, hub: Any) -> None:
    hub.fail_commits = 1
    with pytest.raises(NotReached, match="the same command again"):
        plan(release, "hf://kay/g", endpoint=hub.address).run()
    assert hub.repos["kay/g"].keys() == {".gitattributes"}
    sent = len(hub.uploads)
    assert sent == 2
    plan(release, "hf://kay/g", endpoint=hub.address).run()
    assert len(hub.uploads) == sent
    assert hub.repos["kay/g"].keys() == {*NAMES, ".gitattributes"}


def test_a_repository_is_seen_only_where_that_was_said(release: Path, hub: Any) -> None:
    plan(release, "hf://kay/g", public=True, endpoint=hub.address).run()
    assert hub.private == {"kay/g": False}
    with pytest.raises(BadSetting, match="--public"):
        plan(release, "hf://kay/g", endpoint=hub.address)


def test_a_private_repository_that_is_whole_is_opened_later(
    release: Path, hub: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["publish", str(release), "hf://kay/g", "--endpoint", hub.address, "--really"]
    assert command.main(line) == 0
    assert hub.private == {"kay/g": True}
    capsys.readouterr()
    assert command.main([*line, "--public"]) == 0
    assert hub.private == {"kay/g": False}
    assert "can see it now" in capsys.readouterr().out
    assert len(hub.commits) == 1


def test_no_password_of_an_address_is_printed(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for scheme in ("http", "ftp"):  # nobody listens at port 9
        assert command.main(["publish", str(release), f"{scheme}://kay:hunter2long@127.0.0.1:9/x", "--really"]) == 1
        told = capsys.readouterr()
        assert "127.0.0.1" in told.err
        assert "hunter2long" not in told.out + told.err


def test_without_a_token_the_hub_says_no_and_the_command_tells_it(
    release: Path, hub: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    line = ["publish", str(release), "hf://kay/g", "--endpoint", hub.address, "--really"]
    assert command.main(line) == 1
    told = capsys.readouterr()
    assert "hf auth login" in told.err
    assert "hf_wrong" not in told.out + told.err


def test_the_command_sends_nothing_until_it_is_told_to(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    assert command.main(["publish", str(release), str(target)]) == 0
    told = capsys.readouterr().out
    assert "Nothing was sent" in told
    assert "5 of 5 files" in told
    assert not target.exists()
    assert command.main(["publish", str(release), str(target), "--really"]) == 0
    assert (target / "SHA256SUMS").is_file()
    capsys.readouterr()
    assert command.main(["publish", str(release), str(target), "--really"]) == 0
    assert "All of it is there already" in capsys.readouterr().out
    assert command.main(["publish", str(tmp_path / "nowhere"), str(target)]) == 1
