"""The door: a throw-away pipeline is run by hand, with mistakes of every kind."""

import importlib.util
import io
import os
import resource
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from ambergrade.door.compose import compose, plain
from ambergrade.errors import BadSetting

PIPELINE = '''\
"""Toast bread.

Examples:
    python toast.py bread=rye minutes=3
"""
import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from ambergrade.chain.settings import Invocation
from ambergrade.door.main import pipeline
from ambergrade.errors import BadInput

@dataclass(frozen=True)
class Heat:
    watts: float
    even: bool

@dataclass(frozen=True)
class Bread:
    name: str
    grain: str
    caraway: int = 0

@dataclass(frozen=True)
class Toast:
    bread: Bread
    minutes: int
    heat: Heat
    label: str
    slices: tuple[int, ...]
    toppings: Mapping[str, int]
    root: Path
    debug: bool
    butter_path: str | None = None
    spread: Mapping[str, Any] | None = None
    extra: int = 0

@pipeline("toast", conf=Path(__file__).parent / "conf")
def run(settings: Toast, invocation: Invocation):
    if settings.minutes > 20:
        raise BadInput("It burns.\\nTake fewer minutes.")
    if settings.minutes == 13:
        raise ZeroDivisionError("our bug")
    if settings.minutes == 14:
        settings.no_such_key
    if settings.minutes == 15:
        logging.getLogger("oven").warning("a crumb is %s", "burnt")
        logging.getLogger("fridge").warning("a crumb is burnt")
    shown = settings.bread.name, settings.minutes, settings.heat.watts
    print("toasted", *shown, "torch" in sys.modules, *settings.toppings.items(), settings.butter_path or "")
    return settings.minutes

if __name__ == "__main__":
    run()
'''
ROOT = """\
defaults:
  - _self_
  - bread: white
  - optional spread: null

# how long
minutes: 2        # of toasting
heat: {watts: 800.0, even: true}
label: plain
slices: [1, 2]
toppings: {cheese: 1}
butter_path: null
root: ${default_root:}
debug: false
"""


@pytest.fixture
def kitchen(tmp_path: Path) -> Path:
    files = {
        "toast.py": PIPELINE,
        "conf/toast.yaml": ROOT,
        "conf/bread/white.yaml": "name: white\ngrain: wheat\n",
        "conf/bread/rye.yaml": "name: rye\ngrain: rye\ncaraway: 1\n",
        "conf/spread/butter.yaml": "salted: ???\nsweet: ${.salted}\n",
        "conf/spread/odd.yaml": "defaults: [/bread@other: sourdough]\n",
        "conf/spread/broken.yaml": "a: [1, 2\nb: }\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def toast(kitchen: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "AMBERGRADE_ROOT": str(kitchen / "root")}
    env.pop("HYDRA_FULL_ERROR", None)
    command = [sys.executable, str(kitchen / "toast.py"), *arguments]
    (kitchen / "cwd").mkdir(exist_ok=True)
    return subprocess.run(command, capture_output=True, text=True, cwd=kitchen / "cwd", env=env, check=False)


def complaint(kitchen: Path, *arguments: str) -> str:
    """What a mistaken command prints (run in this process, for speed): exit code 1, at most ten lines, no traceback."""
    spec = importlib.util.spec_from_file_location("toast", kitchen / "toast.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [str(kitchen / "toast.py"), *arguments])
        patch.setitem(sys.modules, "toast", module)
        patch.setenv("AMBERGRADE_ROOT", str(kitchen / "root"))
        spec.loader.exec_module(module)
        with pytest.raises(SystemExit) as ended:
            module.run()
    assert ended.value.code == 1
    assert "Traceback" not in err.getvalue()
    assert out.getvalue() == ""
    assert 1 <= len(err.getvalue().splitlines()) <= 10
    return err.getvalue()


def test_a_run_leaves_no_files_and_imports_no_torch(kitchen: Path) -> None:
    done = toast(kitchen, "bread=rye", "minutes=3", "bread.caraway=2", "+extra=1")
    assert (done.returncode, done.stdout) == (0, "toasted rye 3 800.0 False ('cheese', 1) \n")
    assert done.stderr == ""
    assert list((kitchen / "cwd").iterdir()) == []
    assert not (kitchen / "root").exists()


MISTAKES = [
    (["minuts=3"], ["'minuts'", "Did you mean 'minutes'"]),
    (["heat.wats=3"], ["'heat.wats'", "Did you mean 'heat.watts'"]),
    (["watts=3"], ["'heat.watts'"]),
    (["bred=rye"], ["Did you mean 'bread'"]),
    (["bread=rey"], ["Option of 'bread' 'rey'", "Did you mean 'rye'", "rye, white"]),
    (["bread.caraway=1"], ["'bread.caraway'", "bread.grain"]),
    (["spread=odd"], ["Option of 'bread' 'sourdough'", "rye", "white", "spread/odd"]),
    (["spread=butter"], ["No value for: spread.salted", "spread.salted=…"]),
    (["spread=broken"], ["yaml", "broken.yaml"]),
    (["minutes=long"], ["minutes=long", "a number", "2"]),
    (["heat.even=3"], ["true or false"]),
    (["slices=3", "label=[1]"], ["slices=3: a list", "label=[1]: a text"]),
    (["minutes=2,3"], ["Ambiguous value", "--multirun"]),
    (["minutes"], ["Cannot read 'minutes': there is no =", "key=value"]),
    (["label=a b=(c"], ["Cannot read 'label=a b=(c'", "Write 'label=\"a b=(c\"'"]),
    (["label=/a=b.safetensors"], ["Write 'label=\"/a=b.safetensors\"'"]),
    (["label=${nowhere}"], ["label: ", "'nowhere' not found"]),
    (["+minutes=1"], ["minutes"]),
    (["~nothing"], ["nothing"]),
    (["--mutirun"], ["Did you mean '--multirun'"]),
    (["--cfg", "jobb"], ["jobb", "job"]),
    (["--cfg", "job", "--multirun"], ["exclude each other"]),
    (["--resolve"], ["--cfg job --resolve"]),
    (["--config-name", "toats"], ["Did you mean 'toast'"]),
    (["--cfg", "job", "minuts=3"], ["Did you mean 'minutes'"]),
    (["--multirun", "bread=rye,whit"], ["Did you mean 'white'"]),
    (["--multirun", "heat.wats=1,2"], ["Did you mean 'heat.watts'"]),
    (["--multirun", "minutes=1,long"], ["minutes=long", "a number"]),
    (["minutes=21"], ["It burns.", "Take fewer minutes."]),
    (["minutes=1.5"], ["minutes: a whole number is needed, found 1.5."]),
    (["minutes=null"], ["minutes: a whole number is needed, found None."]),
    (["heat.watts=inf"], ["heat.watts: a finite number is needed"]),
    (["toppings.ham=much"], ["toppings.ham: a whole number is needed, found 'much'."]),
    (["bread.salt=1"], ["bread.salt"]),
]


@pytest.mark.parametrize(("arguments", "parts"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_mistakes_are_told(kitchen: Path, arguments: list[str], parts: list[str]) -> None:
    told = complaint(kitchen, *arguments)
    assert all(part in told for part in parts), told


def test_open_keys_are_added_and_a_key_like_a_group_is_resolved_by_its_path(kitchen: Path) -> None:
    (kitchen / "conf" / "butter").mkdir()
    (kitchen / "conf" / "butter" / "salted.yaml").write_text("salt: 1\n")
    done = toast(kitchen, "toppings.ham=2", "butter=some/file.txt")
    assert done.stdout == "toasted white 2 800.0 False ('cheese', 1) ('ham', 2) some/file.txt\n", done.stderr


def test_a_path_may_bear_a_group_s_name_beside_the_group(kitchen: Path) -> None:
    (kitchen / "conf" / "toast.yaml").write_text(ROOT.replace("butter_path: null", "spread_path: null"))
    program = (kitchen / "toast.py").read_text()
    (kitchen / "toast.py").write_text(program.replace("butter_path", "spread_path"))
    (kitchen / "cwd").mkdir()
    (kitchen / "cwd" / "larder").mkdir()
    (kitchen / "conf" / "spread" / "jam.yaml").write_text("sweet: 1\n")
    for given, shown in (("spread=larder", "larder"), ("spread=./jam", "./jam"), ("spread=jam", "")):
        done = toast(kitchen, given)
        assert done.stdout == f"toasted white 2 800.0 False ('cheese', 1) {shown}\n", done.stderr


def test_a_warning_is_told_once_and_as_it_is(kitchen: Path) -> None:
    done = toast(kitchen, "minutes=15")
    assert (done.stdout + done.stderr).count("a crumb is burnt") == 1
    assert "[HYDRA]" not in done.stdout + done.stderr


def test_a_reader_that_leaves_is_no_error(kitchen: Path) -> None:
    command = f"{sys.executable} {kitchen / 'toast.py'} --help | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=kitchen, check=False)
    assert (done.stdout, done.stderr) == ("Toast bread.\n", "")


def test_several_mistakes_are_told_at_once(kitchen: Path) -> None:
    told = complaint(kitchen, "minuts=3", "heat.even=maybe")
    assert "'minutes'" in told
    assert "heat.even=maybe" in told


def test_bugs_and_debugging_show_tracebacks(kitchen: Path) -> None:
    for arguments in (["minutes=13"], ["minutes=14"], ["minutes=21", "debug=true"], ["minuts=1", "debug=true"]):
        done = toast(kitchen, *arguments)
        assert done.returncode == 1
        assert "Traceback" in done.stderr, arguments


def test_a_sweep_runs_every_point_even_when_one_fails(kitchen: Path) -> None:
    done = toast(kitchen, "--multirun", "minutes=1,21,3", "bread=rye", "heat.watts=1e-3")
    printed = [line.rstrip() for line in done.stdout.splitlines() if line.startswith("toasted")]
    assert printed == [f"toasted rye {minutes} 0.001 False ('cheese', 1)" for minutes in (1, 3)]
    assert done.returncode == 1
    assert "It burns." in done.stderr
    assert "Traceback" not in done.stderr
    assert list((kitchen / "cwd").iterdir()) == []
    fine = toast(kitchen, "--multirun", "minutes=1,2")
    assert fine.returncode == 0, fine.stderr


def test_flags_may_stand_anywhere(kitchen: Path) -> None:
    for arguments in (["minutes=5", "--cfg", "job", "bread=rye"], ["--cfg", "job", "bread=rye", "minutes=5"]):
        done = toast(kitchen, *arguments)
        assert "minutes: 5" in done.stdout
        assert "caraway" in done.stdout


def test_hydras_own_flags_work(kitchen: Path) -> None:
    done = toast(kitchen, "--cfg", "job", "minutes=5")
    assert done.returncode == 0
    assert "minutes: 5" in done.stdout
    assert "job_logging" not in done.stdout
    assert "rye" in toast(kitchen, "--cfg", "job", "--package", "bread", "bread=rye").stdout
    assert "Hydra (1." in toast(kitchen, "--hydra-help").stdout
    assert toast(kitchen, "--info", "searchpath").returncode == 0


def test_help(kitchen: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = toast(kitchen, "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # CPU seconds, which a busy machine does not stretch as it does the clock
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert done.returncode == 0
    told = (
        "Toast bread.",
        "python toast.py bread=rye",
        "rye | [white]",
        "minutes: 2        # of toasting",
        "--multirun",
    )
    assert all(part in done.stdout for part in told), done.stdout
    assert "defaults" not in done.stdout


def test_compose_for_tests_and_notebooks(kitchen: Path) -> None:
    cfg = compose("toast", ["bread=rye", "root=here"], conf=kitchen / "conf")
    assert plain(cfg.bread) == {"name": "rye", "grain": "rye", "caraway": 1}
    with pytest.raises(BadSetting, match="Did you mean 'rye'"):
        compose("toast", ["bread=rey"], conf=kitchen / "conf")
    with pytest.raises(BadSetting, match=r"spread\.salted"):
        compose("toast", ["spread=butter"], conf=kitchen / "conf")


def test_a_project_has_its_own_yamls_and_gets_the_results(kitchen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ambergrade.door import compose as door

    monkeypatch.delenv("AMBERGRADE_ROOT", raising=False)
    project = kitchen / "project"
    (project / "conf" / "bread").mkdir(parents=True)
    (project / "ambergrade.yaml").write_text("")
    (project / "conf" / "bread" / "mine.yaml").write_text("name: mine\n")
    (project / "deep").mkdir()
    monkeypatch.chdir(project / "deep")
    monkeypatch.setattr(door, "CONF", kitchen / "conf")
    found = plain(compose("toast", ["bread=mine"], conf=kitchen / "conf"))
    assert (found["bread"], found["root"]) == ({"name": "mine"}, str(project))
    with pytest.raises(BadSetting, match="Did you mean 'mine'"):
        compose("toast", ["bread=mien"], conf=kitchen / "conf")


def test_the_root_is_the_repository(kitchen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AMBERGRADE_ROOT", raising=False)
    cfg = compose("toast", conf=kitchen / "conf")
    assert plain(cfg)["root"] == str(Path(__file__).parents[2])
