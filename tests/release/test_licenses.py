"""Licences: each yaml is whole, a merge bears what its parents leave, and nothing is assumed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ambergrade.errors import UnknownName
from ambergrade.places import CONF
from ambergrade.release.facts import Origin
from ambergrade.release.licenses import Incompatible, derive, load_license
from ambergrade.typed import settings

NAMES = sorted(path.stem for path in (CONF / "license").glob("*.yaml"))
HUB = {
    *("apache-2.0", "mit", "openrail++", "creativeml-openrail-m", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"),
    *("cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "other", "unknown"),
}
"""Ids that the hub's front matter knows (https://huggingface.co/docs/hub/repositories-licenses), of those we use."""


@pytest.mark.parametrize("name", NAMES)
def test_a_yaml_is_whole_and_names_only_licences_that_there_are(name: str) -> None:
    found = load_license(name)
    assert found.hub in HUB
    assert found.url.startswith("https://") or name == "unknown"
    assert isinstance(found.passes_to, str) or {*found.passes_to} <= {*NAMES}
    assert not (found.share_alike and found.passes_to)  # what must bear this licence bears no other


@pytest.mark.parametrize(
    ("parents", "name"),
    [
        ({"beta7": "openrail++", "anxl2": "openrail++", "anxl3": "faipl-1.0-sd"}, "faipl-1.0-sd"),  # Gamma rev1
        ({"a": "openrail++", "b": "openrail++"}, "openrail++"),
        ({"a": "apache-2.0", "b": "openrail++"}, "openrail++"),
        ({"a": "cc-by-nc-4.0", "b": "cc-by-4.0"}, "cc-by-nc-4.0"),
        ({"a": "cc-by-nc-4.0", "b": "circlestone-non-commercial"}, "circlestone-non-commercial"),
        ({"a": "unknown", "b": "openrail++"}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_a_merge_bears_what_its_parents_leave(parents: dict[str, str], name: str) -> None:
    found = derive(parents)
    assert found.name == name
    assert found.passed == (name != "unknown")


@pytest.mark.parametrize(
    ("parents", "asked", "says"),
    [
        ({"anxl3": "faipl-1.0-sd", "x": "openrail++"}, "openrail++", "anxl3 is under the Fair AI"),
        ({"anxl3": "faipl-1.0-sd", "anima": "circlestone-non-commercial"}, None, "no licence satisfies all"),
        ({"anxl3": "faipl-1.0-sd", "anima": "circlestone-non-commercial"}, None, "anima is under the CircleStone"),
        ({"x": "cc-by-nc-4.0"}, "apache-2.0", "x is under the Creative Commons Attribution-NonCommercial"),
        ({"x": "cc-by-nd-4.0"}, None, "allows nothing that is made of it"),
        ({"x": "apache-2.0", "y": "mit"}, None, r"Several licences.*\nName one: release\.license="),
        ({"x": "unknown", "y": "mit"}, "mit", r"nobody says what x is under.\nName it: origins\.x\.license"),
    ],
)
def test_what_cannot_be_given_on_is_refused_with_the_reason(
    parents: dict[str, str], asked: str | None, says: str
) -> None:
    with pytest.raises(Incompatible, match=says):
        derive(parents, asked)


def test_an_unknown_licence_comes_back_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match=r"Did you mean 'openrail\+\+'"):
        derive({"x": "openrail"})


def test_a_project_describes_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ambergrade.yaml").touch()
    (tmp_path / "conf" / "license").mkdir(parents=True)
    row = yaml.safe_load((CONF / "license" / "mit.yaml").read_text())
    (tmp_path / "conf" / "license" / "ours.yaml").write_text(yaml.safe_dump({**row, "title": "Ours"}))
    monkeypatch.chdir(tmp_path)
    assert load_license("ours").title == "Ours"


@pytest.mark.parametrize("file", sorted((CONF / "origins").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_origins_name_licences_that_there_are_and_models_of_their_sibling(file: Path) -> None:
    rows = {alias: settings(Origin, row) for alias, row in yaml.safe_load(file.read_text()).items()}
    assert rows.keys() == yaml.safe_load((CONF / "models" / file.name).read_text()).keys()
    assert {row.license for row in rows.values()} <= {*NAMES}


def test_gamma_rev1_bears_the_licence_that_the_real_one_bears() -> None:
    rows = yaml.safe_load((CONF / "origins" / "kohaku.yaml").read_text())
    parents = {alias: row["license"] for alias, row in rows.items()} | {"base7": rows["beta7"]["license"]}
    assert derive(parents).name == "faipl-1.0-sd"  # https://huggingface.co/KBlueLeaf/Kohaku-XL-gamma/blob/main/LICENSE


def test_the_chain_takes_the_origins_of_its_models_and_a_release_assumes_none() -> None:
    from ambergrade.door.compose import compose

    assert compose("gamma", ["models=kohaku"])["origins"]["anxl3"]["license"] == "faipl-1.0-sd"
    assert compose("gamma", [])["origins"]["anxl3"]["license"] == "apache-2.0"
    given = ["release.name=a", "release.version=1", "model=builtin://beta7.safetensors"]
    assert compose("release", given)["origins"] == {}
