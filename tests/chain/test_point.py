"""A point: what its identity is made of, and what a process loads once for all points."""

import pytest

from ambergrade.chain import point as module
from ambergrade.chain.point import Scoring, label_of
from ambergrade.chain.settings import Suite
from ambergrade.nouns import SamplerSettings
from ambergrade.typed import Plugin

SAMPLER = SamplerSettings("euler", 2, 4.0, 64, 64)


def test_scorers_are_loaded_once_for_all_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a real tagger and CLIP for each point would cost seconds a point."""
    loaded: list[str] = []

    class Scorer:
        def __init__(self, name: str, device: str) -> None:
            loaded.append(name)
            self.name, self.fingerprint = name, {"weights": name}

    monkeypatch.setattr(module, "load_metric", Scorer)
    scoring = Scoring(SAMPLER, Suite({"a": Plugin("a", {}), "b": Plugin("b", {})}), "cpu")
    assert len({scoring.fingerprint for _ in range(3)}) == 1
    assert [metric.name for metric in scoring.metrics] == ["a", "b"]
    assert loaded == ["a", "b"]


def test_a_point_is_named_by_its_values() -> None:
    assert label_of({"a": 0.8, "b": 1.0, "merge": "plain"}) == "a 0.8, b 1, merge plain"
