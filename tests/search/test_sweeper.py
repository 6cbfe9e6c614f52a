"""The sweeper through a toy task: continued, recalled, faulty points, searches, and what it makes of overrides."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from ambergrade.door.axes import read_axes
from ambergrade.errors import BadSetting
from ambergrade.search.points import decimal_range
from hydra_plugins.ambergrade_sweeper.sweeper import AmbergradeSweeper

APP = Path(__file__).with_name("toy_sweep.py")


def toy(root: Path, *overrides: str, launcher: str = "basic") -> subprocess.CompletedProcess:
    command = [sys.executable, str(APP), "--multirun", f"root={root}", f"hydra/launcher={launcher}", *overrides]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HYDRA_FULL_ERROR": "0"})


def calls(root: Path) -> list[str]:
    return (root / "calls").read_text().split()


def result(root: Path) -> dict:
    return json.loads((root / "result.json").read_text())


def axes(*lines: str, listed_only: bool = True, values=None):
    parsed = OverridesParser.create().parse_overrides(list(lines))
    return read_axes(parsed, values or {}, "merge.coefficients", listed_only=listed_only)


@pytest.mark.parametrize(
    ("line", "values", "texts"),
    [
        ("a=1,2", [1.0, 2.0], ["1", "2"]),
        ("a=range(0,3)", [0.0, 1.0, 2.0], ["0", "1", "2"]),
        ("a=range(0,1,0.1)", [k / 10 for k in range(10)], ["0.0", *(f"0.{k}" for k in range(1, 10))]),
        ("a=range(0,0.9,0.3)", [0.0, 0.3, 0.6], ["0.0", "0.3", "0.6"]),  # in binary, 3 * 0.3 is below 0.9
        ("a=range(1,0,-0.25)", [1.0, 0.75, 0.5, 0.25], ["1.0", "0.75", "0.5", "0.25"]),
        ("a=choice(0.5,1.0,0.50)", [0.5, 1.0], ["0.5", "1.0"]),
        ("a=x,y", ["x", "y"], ["x", "y"]),
        ("a=007,7,true", ["007", 7.0, "True"], ["007", "7", "True"]),
        ("a=9007199254740993,1", ["9007199254740993", 1.0], ["9007199254740993", "1"]),
    ],
)
def test_lists_ranges_and_choices_become_values_and_are_written_as_they_were_spelled(line, values, texts):
    found = axes(line, "c=7")
    assert found.specs == {"a": values}
    for value, text in zip(values, texts, strict=True):
        assert found.overrides({"a": value}) == [f"a={text}", "c=7"]
        assert found.label({"a": value}) == f"a {text}"


def test_a_shuffled_list_is_shuffled_alike_each_time():
    line = "a=shuffle(range(0,20))"
    assert axes(line).specs == axes(line).specs != axes("a=range(0,20)").specs


def test_a_range_that_never_ends_is_refused():
    with pytest.raises(BadSetting, match="the step is 0"):
        decimal_range(0, 1, 0)


def test_the_corners_hold_every_listed_value():
    assert axes("a=1,2", "m=x,y,z").corners() == [
        {"a": 1.0, "m": "x"},
        {"a": 2.0, "m": "x"},
        {"a": 1.0, "m": "y"},
        {"a": 1.0, "m": "z"},
    ]
    assert axes("a=interval(0,1)", listed_only=False).corners() == [{"a": 0.0}]


def test_of_two_overrides_of_a_key_the_last_holds():
    swept = axes("a=4", "b=2", "a=3,4")
    assert (swept.specs, dict(swept.fixed)) == ({"a": [3.0, 4.0]}, {"b": "2"})
    assert swept.overrides({"a": 3.0}) == ["a=3", "b=2"]
    fixed = axes("a=3,4", "b=1,2", "a=4")
    assert (fixed.specs, dict(fixed.fixed)) == ({"b": [1.0, 2.0]}, {"a": "4"})
    assert fixed.overrides({"b": 1.0}) == ["a=4", "b=1"]


def test_an_interval_needs_a_search_that_samples():
    with pytest.raises(BadSetting, match="search=tpe"):
        axes("a=interval(0,1)")
    assert axes("a=interval(0,1)", listed_only=False).specs["a"] == {"low": 0.0, "high": 1.0}
    whole = axes("a=int(interval(1,4))", listed_only=False)
    assert whole.overrides({"a": 3.0}) == ["a=3"]
    assert axes("a=tag(log,interval(0.1,1))", listed_only=False).specs["a"]["log"]


def test_the_searchs_own_values_serve_where_nothing_is_swept():
    found = axes("b=2", values={"a": [0.0, 0.8]})
    assert found.specs == {"merge.coefficients.a": [0.0, 0.8]}
    assert found.overrides({"merge.coefficients.a": 0.8}) == ["b=2", "merge.coefficients.a=0.8"]


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
    (failures,) = (tmp_path / "sweeps").glob("*/failures.txt")
    assert told in failures.read_text()
    assert ("at length" in failures.read_text()) == (how == "raise")  # the table has the first line only
    assert "at length" not in first.stdout
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


def test_a_search_hands_out_as_many_points_as_there_are_workers(tmp_path):
    search = ["hydra.sweeper.search.name=optuna", "+hydra.sweeper.search.sampler=qmc", "+hydra.sweeper.search.trials=5"]
    for workers in (1, 2):
        root = tmp_path / str(workers)
        root.mkdir()
        assert toy(root, "x=interval(0,1)", *search, f"workers={workers}", "seconds=0.3").returncode == 0
        prepared = [int(count) for count in (root / "prepared").read_text().split()]
        assert max(count - drawn for drawn, count in enumerate(sorted(prepared))) == workers
        assert len(set((root / "processes").read_text().split())) == workers  # what it loads is loaded once


@pytest.mark.slow
@pytest.mark.parametrize(("slots", "prepared"), [("null", "1 2 3 4"), ("2", "2 2 4 4")])
def test_a_launcher_gets_as_many_points_as_it_has_slots(tmp_path, slots, prepared):
    search = ["hydra.sweeper.search.name=optuna", "+hydra.sweeper.search.sampler=qmc", "+hydra.sweeper.search.trials=4"]
    batch = f"hydra.sweeper.max_batch_size={slots}"
    done = toy(tmp_path, "x=interval(0,1)", *search, batch, "hydra.launcher.n_jobs=1", launcher="joblib")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "prepared").read_text().split() == prepared.split()


def test_what_the_points_are_made_of_names_the_sweep(tmp_path):
    for of in ("one", "two", "one"):
        assert toy(tmp_path, "x=1,2", f"of={of}").returncode == 0
    assert calls(tmp_path) == ["1", "2", "1", "2"]


def test_a_later_value_is_the_same_point_however_it_is_spelled(tmp_path):
    assert toy(tmp_path, "x=range(0.6,0.8,0.1)").returncode == 0
    assert toy(tmp_path, "x=0.60,0.70").returncode == 0
    assert calls(tmp_path) == ["0.6", "0.7"]


def test_points_that_do_not_compose_are_told_once_and_before_the_first(tmp_path):
    done = toy(tmp_path, "x=1", "z=1,2")
    assert done.returncode == 1
    assert done.stderr.count("Could not override 'z'") == 1
    assert not (tmp_path / "calls").exists()


def test_a_screening_without_a_race_is_refused():
    with pytest.raises(BadSetting, match="before a race"):
        AmbergradeSweeper(search={"name": "grid"}, screen=["steps=2"])


def test_a_keyed_sweep_sweeps_over_nothing_too(tmp_path):
    for _ in range(2):
        assert toy(tmp_path, "x=4").returncode == 0
    assert calls(tmp_path) == ["4"]
    assert result(tmp_path)["scores"] == {"the point": 4.0}
