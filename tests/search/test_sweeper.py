"""The sweeper through a toy task: continued, recalled, faulty points, searches, and what a plan makes of overrides."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from ambergrade.errors import BadSetting
from hydra_plugins.ambergrade_sweeper._outcomes import Outcome, Trial, failure_table, read, write
from hydra_plugins.ambergrade_sweeper._plan import point_key, read_plan

APP = Path(__file__).with_name("toy_sweep.py")


def toy(root: Path, *overrides: str, launcher: str = "basic") -> subprocess.CompletedProcess:
    command = [sys.executable, str(APP), "--multirun", f"root={root}", f"hydra/launcher={launcher}", *overrides]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HYDRA_FULL_ERROR": "0"})


def calls(root: Path) -> list[str]:
    return (root / "calls").read_text().split()


def result(root: Path) -> dict:
    return json.loads((root / "result.json").read_text())


def plan(*lines: str, listed_only: bool = True, values=None):
    parsed = OverridesParser.create().parse_overrides(list(lines))
    return read_plan(parsed, values or {}, "merge.coefficients", listed_only=listed_only)


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("a=1,2", ["1", "2"]),
        ("a=range(0,3)", ["0", "1", "2"]),
        ("a=choice(0.5,1.0,0.5)", ["0.5", "1.0"]),
        ("a=x,y", ["x", "y"]),
    ],
)
def test_lists_ranges_and_choices_become_values_as_they_were_spelled(line, values):
    found = plan(line, "c=7")
    assert found.axes == {"a": values}
    assert found.overrides({"a": values[1]}) == [f"a={values[1]}", "c=7"]
    assert found.label({"a": values[0]}) == f"a {values[0]}"
    assert found.swept({"a": values[0]}) == [f"a={values[0]}"]


def test_of_two_overrides_of_a_key_the_last_holds():
    swept = plan("a=4", "b=2", "a=3,4")
    assert (swept.axes, dict(swept.fixed)) == ({"a": ["3", "4"]}, {"b": "2"})
    assert swept.overrides({"a": "3"}) == ["a=3", "b=2"]
    fixed = plan("a=3,4", "b=1,2", "a=4")
    assert (fixed.axes, dict(fixed.fixed)) == ({"b": ["1", "2"]}, {"a": "4"})
    assert fixed.overrides({"b": "1"}) == ["a=4", "b=1"]


def test_an_interval_needs_a_search_that_samples():
    with pytest.raises(BadSetting, match="search=tpe"):
        plan("a=interval(0,1)")
    assert plan("a=interval(0,1)", listed_only=False).spec("a") == {"low": 0.0, "high": 1.0}
    whole = plan("a=int(interval(1,4))", listed_only=False)
    assert whole.overrides({"a": 3.0}) == ["a=3"]
    assert plan("a=tag(log,interval(0.1,1))", listed_only=False).spec("a")["log"]


def test_the_searchs_own_values_serve_where_nothing_is_swept():
    found = plan("b=2", values={"a": [0.0, 0.8]})
    assert found.axes == {"merge.coefficients.a": [0.0, 0.8]}
    assert found.overrides({"merge.coefficients.a": 0.8}) == ["b=2", "merge.coefficients.a=0.8"]


def test_a_points_folder_is_named_by_its_overrides_in_any_order():
    assert point_key(["a=1", "b=2"]) == point_key(["b=2", "a=1"]) != point_key(["a=1", "b=3"])


def test_an_outcome_is_read_as_it_was_written_and_a_failure_keeps_its_trace(tmp_path):
    trial = Trial("a 1", {"a": 1.0}, ["a=1"], tmp_path)
    assert not trial.recall()
    write(trial.file, Outcome("done", {"score": 0.5, "rows": [0.5]}, "", 2.0))
    assert trial.recall()
    assert trial.outcome.score == 0.5
    trial.fail(ValueError("odd\nnumbers"))
    assert not trial.recall()
    assert "ValueError: odd" in failure_table([trial])
    assert "numbers" in json.loads(trial.file.read_text())["trace"]
    assert read(tmp_path / "none.json") is None


@pytest.mark.parametrize("how", ["raise", "exit", "kill", "memory"])
def test_a_faulty_point_is_told_the_others_go_on_and_the_same_command_finishes(tmp_path, how):
    command = ["x=1,2,3", f"fault={2} {how}"]
    (tmp_path / "faulty").touch()
    first = toy(tmp_path, *command)
    assert first.returncode != 0
    told = {"raise": "ValueError: this point fails", "exit": "exit code 3", "kill": "SIGKILL", "memory": "MemoryError"}[
        how
    ]
    assert "1 of 3 points failed" in first.stdout
    assert told in first.stdout
    assert result(tmp_path)["scores"] == {"x 1": 1.0, "x 3": 3.0}
    (tmp_path / "faulty").unlink()
    second = toy(tmp_path, *command)
    assert second.returncode == 0, second.stderr
    assert result(tmp_path)["scores"] == {"x 1": 1.0, "x 2": 2.0, "x 3": 3.0}
    assert sorted(calls(tmp_path)) == ["1", "2", "2", "3"]  # what was finished is not run again
    assert len(list((tmp_path / "sweeps").glob("*/*/outcome.json"))) == 3


def test_a_search_counts_its_trials_in_all_and_never_repeats_a_point(tmp_path):
    search = ["x=interval(0,1)", "hydra.sweeper.search.name=optuna", "+hydra.sweeper.search.sampler=tpe"]
    for trials in (4, 7):
        done = toy(tmp_path, *search, f"+hydra.sweeper.search.trials={trials}")
        assert done.returncode == 0, done.stderr
        assert len(calls(tmp_path)) == trials
    assert len(set(calls(tmp_path))) == 7
    scores = result(tmp_path)["scores"].values()
    assert result(tmp_path)["best"][1] == max(scores)


@pytest.mark.parametrize(("slots", "prepared"), [("null", "1 2 3 4 5"), ("2", "2 2 4 4 5")])
def test_a_search_that_learns_hands_out_as_many_points_as_there_are_slots(tmp_path, slots, prepared):
    search = ["hydra.sweeper.search.name=optuna", "+hydra.sweeper.search.sampler=qmc", "+hydra.sweeper.search.trials=5"]
    assert toy(tmp_path, "x=interval(0,1)", *search, f"hydra.sweeper.max_batch_size={slots}").returncode == 0
    assert (tmp_path / "prepared").read_text().split() == prepared.split()
    assert len(set((tmp_path / "processes").read_text().split())) == 1  # what it loads is loaded once


def test_a_hook_can_be_called_in_the_process_that_drew_the_points(tmp_path):
    assert toy(tmp_path, "x=1,2", "after=return").returncode == 0
    assert {(tmp_path / "after").read_text()} == set((tmp_path / "processes").read_text().split())
    again = toy(tmp_path, "x=1,2", "after=return")  # nothing is left to draw, and the process is there all the same
    assert again.returncode == 0, again.stderr
    assert calls(tmp_path) == ["1", "2"]


@pytest.mark.parametrize(("how", "told"), [("raise", "BadSetting: so it is"), ("kill", "ended by SIGKILL")])
def test_what_such_a_hook_fails_of_is_told_and_the_points_are_kept(tmp_path, how, told):
    first = toy(tmp_path, "x=1,2", f"after={how}")
    assert first.returncode == 1
    assert told in first.stderr
    assert toy(tmp_path, "x=1,2", "after=return").returncode == 0
    assert calls(tmp_path) == ["1", "2"]


def test_points_that_do_not_compose_are_told(tmp_path):
    done = toy(tmp_path, "x=1", "z=1,2")
    assert done.returncode == 1
    assert "2 of 2 points failed" in done.stdout
    assert done.stdout.count("Could not override 'z'") == 2
    assert "exit code" not in done.stdout
