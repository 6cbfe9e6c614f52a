"""The door: a throw-away pipeline is run by hand, with mistakes of every kind."""

import dataclasses
import importlib.util
import io
import math
import os
import re
import resource
import subprocess
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal

import pytest

from ambergrade import config
from ambergrade.errors import BadSetting

PIPELINE = '''\
"""Toast bread.

Examples:
    python toast.py bread=rye minutes=3
"""
import sys
from pathlib import Path
from ambergrade import config
from ambergrade.errors import BadInput

@config.main("toast", conf=Path(__file__).parent / "conf")
def run(cfg):
    values = config.plain(cfg)
    if values["minutes"] > 20:
        raise BadInput("It burns.\\nTake fewer minutes.")
    if values["minutes"] == 13:
        raise ZeroDivisionError("our bug")
    if values["minutes"] == 14:
        cfg.no_such_key
    print("toasted", values["bread"]["name"], values["minutes"], values["heat"]["watts"], "torch" in sys.modules)
    return values["minutes"]

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
root: ${oc.env:AMBERGRADE_ROOT,${repository:}}
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
    assert (done.returncode, done.stdout) == (0, "toasted rye 3 800.0 False\n")
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
    (["minutes"], ["Cannot read 'minutes': missing EQUAL", "key=value"]),
    (["label=a b=(c"], ["Cannot read 'label=a b=(c'"]),
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
]


@pytest.mark.parametrize(("arguments", "parts"), MISTAKES, ids=[" ".join(m[0]) for m in MISTAKES])
def test_mistakes_are_told(kitchen: Path, arguments: list[str], parts: list[str]) -> None:
    told = complaint(kitchen, *arguments)
    assert all(part in told for part in parts), told


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
    printed = [line for line in done.stdout.splitlines() if line.startswith("toasted")]
    assert printed == [f"toasted rye {minutes} 0.001 False" for minutes in (1, 3)]
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
    cfg = config.compose("toast", ["bread=rye", "root=here"], conf=kitchen / "conf")
    assert config.plain(cfg.bread) == {"name": "rye", "grain": "rye", "caraway": 1}
    with pytest.raises(BadSetting, match="Did you mean 'rye'"):
        config.compose("toast", ["bread=rey"], conf=kitchen / "conf")
    with pytest.raises(BadSetting, match=r"spread\.salted"):
        config.compose("toast", ["spread=butter"], conf=kitchen / "conf")


def test_the_root_is_the_repository(kitchen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AMBERGRADE_ROOT", raising=False)
    cfg = config.compose("toast", conf=kitchen / "conf")
    assert config.plain(cfg)["root"] == str(Path(__file__).parents[1])


@dataclasses.dataclass(frozen=True)
class Rate:
    unet: float
    text: float = 0.0


@dataclasses.dataclass(frozen=True)
class Trainer:
    steps: int
    rate: Rate
    kind: Literal["fast", "slow"] = "fast"
    betas: tuple[float, float] = (0.9, 0.999)
    names: tuple[str, ...] = ()
    share: float | None = None
    table: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    folder: Path = Path()

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise BadSetting("steps cannot be negative.")


def test_settings_build_nested_dataclasses() -> None:
    values: dict[str, Any] = {
        "steps": 3,
        "rate": {"unet": 1},
        "betas": [0.5, 1],
        "names": ["a"],
        "share": 1,
        "table": {"x": [1, 2]},
        "folder": "here",
    }
    built = config.settings(Trainer, values)
    assert built == Trainer(3, Rate(1.0), "fast", (0.5, 1.0), ("a",), 1.0, {"x": (1, 2)}, None, Path("here"))
    assert isinstance(built.rate.unet, float)


def test_settings_gather_all_complaints() -> None:
    values: dict[str, Any] = {
        "step": 3,
        "rate": {"unett": 1, "unet": "x"},
        "kind": "fsat",
        "betas": [1],
        "names": "abc",
        "share": "much",
        "seed": True,
    }
    with pytest.raises(BadSetting) as told:
        config.settings(Trainer, values, where="trainer")
    text = str(told.value)
    for part in (
        "Did you mean 'trainer.steps'",
        "trainer.steps: no value given",
        "Did you mean 'trainer.rate.unet'",
        "trainer.rate.unet: a number is needed, found 'x'",
        "Did you mean 'fast'",
        "trainer.betas: 2 values are needed",
        "trainer.names: a list is needed, found 'abc'",
        "trainer.share: a number or null is needed, found 'much'",
        "trainer.seed: a whole number or null is needed, found True",
    ):
        assert part in text, part
    with pytest.raises(BadSetting, match="trainer: steps cannot be negative"):
        config.settings(Trainer, {"steps": -1, "rate": {"unet": 1.0}}, where="trainer")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"steps": None, "rate": {"unet": 1.0}}, "trainer.steps: a whole number is needed, found None."),
        ({"steps": 1.5, "rate": {"unet": 1.0}}, "trainer.steps: a whole number is needed, found 1.5."),
        ({"steps": 1, "rate": {"unet": None}}, "trainer.rate.unet: a number is needed, found None."),
        ({"steps": 1, "rate": {"unet": math.nan}}, "trainer.rate.unet: a finite number is needed, found nan."),
        ({"steps": 1, "rate": {"unet": -math.inf}}, "trainer.rate.unet: a finite number is needed, found -inf."),
        ({"steps": True, "rate": {"unet": 1.0}}, "trainer.steps: a whole number is needed, found True."),
        ({"steps": 1, "rate": "false"}, "trainer.rate: a mapping is needed, found 'false'."),
    ],
)
def test_nulls_and_numbers_that_are_none_are_told_with_their_key(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadSetting, match=re.escape(complaint)):
        config.settings(Trainer, values, where="trainer")


def test_infinity_hides_nowhere_in_an_open_value() -> None:
    @dataclasses.dataclass(frozen=True)
    class Open:
        parameters: Mapping[str, Any]

    with pytest.raises(BadSetting, match=re.escape("parameters.betas[1]: a finite number is needed, found inf.")):
        config.settings(Open, {"parameters": {"betas": [0.9, math.inf]}})
