"""The house in order: what is committed, what the README points at, and that every yaml has what it configures."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from ambergrade.door.compose import compose
from ambergrade.errors import BadSetting

HOUSE = Path(__file__).parents[1]
CONF = HOUSE / "conf"
WEIGHTS = HOUSE / "src" / "ambergrade" / "world" / "weights"
MOST_WEIGHTS = 36e6  # bytes
YAMLS = sorted(CONF.rglob("*.yaml"))
# Spelled in two halves, so that this file does not name them itself.
HOSTS = ["pypi" + ".org", "pythonhosted" + ".org", "download.pytorch" + ".org", "registry" + ".npmjs.org"]


def plug_package(kind: str) -> Path | None:
    """The package of a kind of plug, `src/ambergrade/<room>/<kind>s`, if there is one."""
    plural = {"loss": "losses", "search": "searches"}.get(kind, f"{kind}s")
    found = [path for path in (HOUSE / "src" / "ambergrade").glob(f"*/{plural}") if path.is_dir()]
    assert len(found) <= 1
    return found[0] if found else None


def committed() -> list[Path]:
    """Files of the work tree that git tracks, or would (all but the ignored)."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=HOUSE, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git work tree")
    return [HOUSE / name for name in done.stdout.split("\0") if name and (HOUSE / name).is_file()]


def text_of(path: Path) -> str:
    data = path.read_bytes()
    return "" if b"\0" in data[:4096] else data.decode(errors="replace")


def test_no_registry_is_named_in_any_file() -> None:
    named = [(path, host) for path in committed() for host in HOSTS if host in text_of(path)]
    assert named == []


def test_no_path_of_a_machine_is_in_the_code() -> None:
    machine = re.compile(r"/work/(main|shared)|[\s\"'=(]/(roo" + r"t|home|Users)/")
    code = [path for path in committed() if path.suffix in {".py", ".yaml", ".toml", ".md"} or path.name == "Makefile"]
    code = [path for path in code if HOUSE / "tests" not in path.parents]
    assert [path for path in code if machine.search(text_of(path))] == []


def test_weights_are_small_and_never_pickles() -> None:
    files = [path for path in committed() if WEIGHTS in path.parents]
    assert sum(path.stat().st_size for path in files) <= MOST_WEIGHTS
    pickles = {".bin", ".ckpt", ".pt", ".pth", ".pkl"}
    assert [path for path in committed() if path.suffix in pickles] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", (HOUSE / page).read_text())
    links += re.findall(r"<img[^>]+src=\"(?!https?://)([^\"]+)\"", (HOUSE / page).read_text())
    assert [link for link in links if not (HOUSE / link).exists()] == []


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.relative_to(CONF).as_posix())
def test_a_yaml_parses_and_its_plug_exists(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    assert isinstance(values, dict)
    assert not re.search(r"_target_\s*:", path.read_text())  # arbitrary imports from a config are a hole
    package = plug_package(path.parent.name)
    if package:
        name = values.get("name", path.stem)
        assert (package / f"{name}.py").is_file(), f"{path.relative_to(HOUSE)} configures {name}.py in {package}"


def test_every_plug_can_be_chosen() -> None:
    kinds = {path.parent.name for path in YAMLS if plug_package(path.parent.name)}
    assert {"metric", "sampler"} <= kinds
    for kind in kinds:
        package = plug_package(kind)
        assert package is not None
        modules = {path.stem for path in package.glob("*.py")} - {"__init__"}
        named = {yaml.safe_load(path.read_text()).get("name", path.stem) for path in (CONF / kind).glob("*.yaml")}
        assert modules == named, kind


PIPELINES = sorted(path.stem for path in CONF.glob("*.yaml"))


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_pipeline_has_a_root_with_the_common_keys_and_a_docstring(pipeline: str) -> None:
    root = yaml.safe_load((CONF / f"{pipeline}.yaml").read_text())
    assert root["root"] == "${default_root:}"
    assert root["debug"] is False
    assert f"python pipelines/{pipeline}.py" in (HOUSE / "pipelines" / f"{pipeline}.py").read_text().split('"""')[1]


def root_of(experiment: str) -> str:
    """The pipeline that an experiment is for: the one it names, else the one its own name begins with."""
    named = re.search(r"pipelines/(\w+)\.py", (CONF / "experiment" / f"{experiment}.yaml").read_text())
    return named[1] if named else next(name for name in PIPELINES if experiment.startswith(name))


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (CONF / "experiment").glob("*.yaml")))
def test_an_experiment_composes_but_for_what_the_user_must_name(experiment: str) -> None:
    root = root_of(experiment)
    try:
        compose(root, [f"experiment={experiment}"])
    except BadSetting as error:
        assert str(error).startswith("No value for: ")  # noqa: PT017


def test_no_source_file_is_long_and_a_pipeline_is_a_call() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in committed() if path.suffix == ".py"}
    rooms, pipelines = HOUSE / "src", HOUSE / "pipelines"
    assert {path.name: n for path, n in lengths.items() if path.is_relative_to(rooms) and n > 450} == {}
    assert {path.name: n for path, n in lengths.items() if path.is_relative_to(pipelines) and n > 30} == {}
