"""Lines of what MLflow was told: whole after a full disk, whatever characters they hold."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ambergrade.track import lines


def test_a_line_that_a_full_disk_cut_does_not_take_the_next_one_along(tmp_path: Path) -> None:
    lines.append(tmp_path, "r", {"a": 1})
    file = lines.folder(tmp_path) / "r.jsonl"
    with file.open("a") as cut:
        cut.write('{"params": {"b')
    lines.append(tmp_path, "r", {"c": 3})
    lines.append(tmp_path, "r", {"d": 4})
    assert lines.read(file) == [{"a": 1}, {"c": 3}, {"d": 4}]


def test_a_full_disk_is_told_and_later_lines_are_whole(tmp_path: Path) -> None:
    """The kernel itself cuts the write, at the process's largest file size."""
    program = textwrap.dedent("""
        import resource, signal, sys; from pathlib import Path; from ambergrade.track import lines
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        root, free = Path(sys.argv[1]), resource.getrlimit(resource.RLIMIT_FSIZE)
        lines.append(root, "r", {"a": 1})
        resource.setrlimit(resource.RLIMIT_FSIZE, (30, free[1]))
        try:
            lines.append(root, "r", {"b": "x" * 100})
        except OSError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, free)
        lines.append(root, "r", {"c": 3})
    """)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "r.jsonl" in done.stdout
    assert lines.read(lines.folder(tmp_path) / "r.jsonl") == [{"a": 1}, {"c": 3}]


@pytest.mark.parametrize("text", ["a\u2028b", "\x85\x1c", "\ud800", "é\r\nx", "\0"])
def test_any_character_comes_back(tmp_path: Path, text: str) -> None:
    lines.append(tmp_path, "r", {"text": text})
    assert lines.read(lines.folder(tmp_path) / "r.jsonl") == [{"text": text}]


def test_damaged_files_are_no_runs(tmp_path: Path) -> None:
    for content in (b"", b"[1]\n", b"\xff\xfe\n", b'{"run": {"id": "../x"}, "tags": {}}\n', b'{"run": 1}\n'):
        (tmp_path / "r.jsonl").write_bytes(content)
        assert lines.read_run(tmp_path / "r.jsonl") is None


def test_paths_below_the_root_are_kept_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "real é").mkdir()
    os.symlink(tmp_path / "real é", tmp_path / "root")
    root = tmp_path / "root"
    assert lines.relative(root / "out" / "m.safetensors", tmp_path / "real é") == "out/m.safetensors"
    assert lines.relative_uri((root / "mlruns" / "artifacts").resolve().as_uri(), root) == "mlruns/artifacts"
    assert lines.relative_uri("mlflow-artifacts:/1/x", root) == "mlflow-artifacts:/1/x"
    assert lines.relative(Path("/elsewhere/m"), root) == "/elsewhere/m"
