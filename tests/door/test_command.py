"""The installed command: its help, its completion, a project of one's own, and that it is the pipelines themselves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ambergrade.door import command
from ambergrade.door.project import make_project
from ambergrade.errors import BadSetting

HOUSE = Path(__file__).parents[2]


def test_help_names_every_pipeline_with_its_own_first_line() -> None:
    found = command.pipelines()
    assert {"gamma", "data", "train", "merge", "sweep", "evaluate", "verify", "reindex"} <= found.keys()
    for name, line in found.items():
        assert (HOUSE / "pipelines" / f"{name}.py").read_text().startswith(f'"""{line}')


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ambergrade ga", ["gamma "]),
        ("ambergrade train tra", ["trainer=", "trained="]),
        ("ambergrade train memory=2", ["24gb "]),
        ("ambergrade gamma base", ["base="]),
        ("ambergrade nothing ", []),
    ],
)
def test_completion(line: str, words: list[str]) -> None:
    assert command.complete(line) == words


def test_an_unknown_command_comes_back_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["gama"]) == 1
    assert "Did you mean 'gamma'" in capsys.readouterr().err


@pytest.mark.parametrize("line", [["merge", "--nonsense"], ["digest"], ["ui", "--nonsense"], ["init"]])
def test_a_wrong_option_is_a_user_s_mistake(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(line) == 1
    told = capsys.readouterr().err
    assert told.startswith("usage: ambergrade")
    assert len(told.splitlines()) <= 10


def test_the_ui_calls_itself_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command.main(["ui", "--help"])
    assert not ended.value.code
    told = capsys.readouterr().out
    assert told.startswith("usage: ambergrade ui")
    assert "python -m" not in told


def test_the_command_is_the_pipeline(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(HOUSE / "src")}
    for line in (["train", "trainer.clip=x"], ["train", "--help"], ["gamma", "search.objektive=fid"]):
        ours = subprocess.run(
            [sys.executable, "-m", "ambergrade.door.command", *line],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        theirs = subprocess.run(
            [sys.executable, str(HOUSE / "pipelines" / f"{line[0]}.py"), *line[1:]],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert (ours.returncode, ours.stdout, ours.stderr) == (theirs.returncode, theirs.stdout, theirs.stderr)


def test_a_project_holds_an_experiment_that_composes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ambergrade.chain.settings import GammaSettings
    from ambergrade.door.compose import compose, read

    folder = tmp_path / "mine"
    make_project(folder)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("AMBERGRADE_ROOT", raising=False)
    settings = read(GammaSettings, compose("gamma", ["experiment=mine"]))
    assert (settings.name, settings.root) == ("mine", folder)
    assert settings.prompts.sweep == str(folder / "prompts" / "sweep.jsonl")
    with pytest.raises(BadSetting, match="not empty"):
        make_project(folder)
