"""What every conf/gate/*.yaml promises; subjects are found by listing the folder."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from ambergrade.nouns import Measurement
from ambergrade.release import gate as registry
from ambergrade.release.gate import Evidence, Gate, Judgement, load_gate

ROOT = Path(__file__).parents[2]
YAMLS = sorted((ROOT / "conf" / "gate").glob("*.yaml"))
STAND_INS = {"metric": "fit", "bound": 0.5, "margin": 0.1}
NOTHING = Evidence("sdxl", {})
UNKNOWN = Measurement(float("nan"), float("nan"), float("nan"), 0)


def measured(value: float, width: float = 0.05, higher: bool = True) -> Measurement:
    return Measurement(value, value - width, value + width, 40, higher)


def cases() -> list[Evidence]:
    """Good and bad candidates, of real and tiny families, with and without a person's tags."""
    good = {"scores": {"fit": measured(0.9)}, "differences": {"base": {"fit": measured(0.3)}}}
    bad = {"scores": {"fit": measured(0.2)}, "differences": {"base": {"fit": measured(-0.3)}}}
    found = []
    for numbers, family, tiny, tags in itertools.product(
        (good, bad), ("sdxl", "sdxl_tiny"), (False, True), ({}, {"veto": "hands", "approved_by": "Kay"})
    ):
        champion = {"champion": numbers["differences"]["base"]}
        compared = {**numbers["differences"], **champion}
        found.append(Evidence(family, numbers["scores"], compared, {"clip_score": tiny}, tags))
    return found


@pytest.fixture(params=YAMLS, ids=lambda path: path.stem)
def settings(request: Any) -> dict[str, Any]:
    found = yaml.safe_load(request.param.read_text())
    return {key: STAND_INS[key] if value == "???" else value for key, value in found.items()}


@pytest.fixture
def gate(settings: dict[str, Any]) -> Gate:
    return load_gate(**settings)


def function(settings: dict[str, Any]) -> Callable[..., Judgement]:
    return load_gate(**settings).func  # type: ignore[attr-defined, no-any-return]


def test_there_are_gates() -> None:
    assert {"floor", "better_than_base", "not_worse_than_champion", "no_tiny_scorers", "veto"} <= {
        p.stem for p in YAMLS
    }


def test_a_yamls_keys_are_the_gates_settings_and_none_has_a_default_in_code(settings: dict[str, Any]) -> None:
    parameters = inspect.signature(function(settings)).parameters.values()
    assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == settings.keys() - {"name"}
    assert all(parameter.default is parameter.empty for parameter in parameters)
    assert inspect.getdoc(function(settings))


def test_it_can_pass_and_it_can_fail(gate: Gate) -> None:
    assert {gate(evidence).passed for evidence in cases()} == {True, False}


def test_it_tells_one_short_line_changes_nothing_and_repeats_itself(gate: Gate) -> None:
    for evidence in [*cases(), NOTHING]:
        before = copy.deepcopy(evidence)
        said = gate(evidence)
        assert said == gate(evidence)
        assert evidence == before
        assert said.told
        assert "\n" not in said.told
        assert len(said.told) < 1000


def test_what_was_not_measured_never_passes_a_gate_that_asks_for_a_metric(settings: dict[str, Any], gate: Gate) -> None:
    if "metric" not in settings:
        pytest.skip("it asks for no metric")
    whom = settings.get("than", "base")
    assert not gate(Evidence("sdxl", {"fit": UNKNOWN}, {whom: {"fit": UNKNOWN}})).passed
    assert not gate(Evidence("sdxl", {}, {whom: {}})).passed


def test_a_setting_that_a_gate_does_not_take_is_told(settings: dict[str, Any]) -> None:
    with pytest.raises(registry.BadSetting, match="lists its settings"):
        load_gate(**settings, nonsense=1)
