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
MINE = "{name: floor, metric: hands_are_right, bound: 0.5}"
"""A yaml of a user's conf/gate, on a metric of their own."""
STAND_INS = {"metric": "fit", "bound": 0.5, "margin": 0.1}
LOWER = ("rating_leak", "mosaic")
"""Metrics of the yamls of which less is better."""
NOTHING = Evidence("sdxl", {})
UNKNOWN = Measurement(float("nan"), float("nan"), float("nan"), 0)


def measured(value: float, width: float = 0.05, higher: bool = True) -> Measurement:
    return Measurement(value, value - width, value + width, 40, higher)


def cases(metric: str = "fit") -> list[Evidence]:
    """Good and bad candidates by any metric, of real and tiny families, with and without a person's tags and votes."""
    higher = metric not in LOWER
    good, bad = (0.9, 0.3) if higher else (0.0, -0.3), (0.2, -0.3) if higher else (0.8, 0.3)
    found = []
    for (level, apart), family, tiny, by_people, kept in itertools.product(
        (good, bad), ("sdxl", "sdxl_tiny"), (False, True), (False, True), (False, True)
    ):
        compared = {whom: {metric: measured(apart, higher=higher)} for whom in ("base", "champion")}
        said = "" if kept else "sampler: steps 2 / 4"
        found.append(
            Evidence(
                family,
                {metric: measured(level, higher=higher)},
                compared,
                {"clip_score": tiny},
                {"veto": "hands", "approved_by": "Kay"} if by_people else {},
                dict.fromkeys(compared, said),
                dict.fromkeys(compared, measured(0.5 + apart / 2)) if by_people else {},
                Judgement(kept, said or "apache-2.0") if tiny else None,
            )
        )
    return found


@pytest.fixture(params=[*YAMLS, MINE], ids=lambda one: one.stem if isinstance(one, Path) else "a_user_s_own")
def settings(request: Any) -> dict[str, Any]:
    found = yaml.safe_load(request.param.read_text() if isinstance(request.param, Path) else request.param)
    return {key: STAND_INS[key] if value == "???" else value for key, value in found.items()}


@pytest.fixture
def gate(settings: dict[str, Any]) -> Gate:
    return load_gate(**settings)


def function(settings: dict[str, Any]) -> Callable[..., Judgement]:
    return load_gate(**settings).func  # type: ignore[attr-defined, no-any-return]


def test_there_are_gates() -> None:
    known = {"better_than_base", "not_worse_than_champion", "no_tiny_scorers", "veto", "approval", "preferred"}
    assert known | {"floor", "pairing", "rating_leak", "mosaic", "licence"} <= {path.stem for path in YAMLS}


def test_a_yamls_keys_are_the_gates_settings_and_none_has_a_default_in_code(settings: dict[str, Any]) -> None:
    parameters = inspect.signature(function(settings)).parameters.values()
    assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} == settings.keys() - {"name"}
    assert all(parameter.default is parameter.empty for parameter in parameters)
    assert inspect.getdoc(function(settings))


def test_it_can_pass_and_it_can_fail(settings: dict[str, Any], gate: Gate) -> None:
    assert {gate(evidence).passed for evidence in cases(settings.get("metric", "fit"))} == {True, False}


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
    whom, metric = settings.get("than", "base"), settings["metric"]
    assert not gate(Evidence("sdxl", {metric: UNKNOWN}, {whom: {metric: UNKNOWN}})).passed
    assert not gate(Evidence("sdxl", {}, {whom: {}})).passed


def test_a_setting_that_a_gate_does_not_take_is_told(settings: dict[str, Any]) -> None:
    with pytest.raises(registry.BadSetting, match="lists its settings"):
        load_gate(**settings, nonsense=1)
