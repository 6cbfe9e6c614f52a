"""What a process that scores points keeps in memory from one to the next."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ambergrade.chain import point as chain_point
from ambergrade.chain.points import PointScorer
from ambergrade.chain.settings import SweepSettings
from ambergrade.door.compose import compose, read


def test_scorers_and_models_are_loaded_once_for_all_points(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Loading a real tagger and CLIP for each point would cost seconds a point."""
    loaded: list[str] = []

    class Scorer:
        def __init__(self, name: str, **more: Any) -> None:
            loaded.append(name)
            self.name, self.fingerprint = name, {"weights": name}

    monkeypatch.setattr(chain_point, "load_metric", Scorer)
    settings = read(SweepSettings, compose("sweep", [f"root={tmp_path}", "models.base7=builtin://anxl2.safetensors"]))
    scorer = PointScorer()
    merge, scoring = scorer.loaded(settings)
    fingerprint = scoring.fingerprint
    assert loaded == [one.name for one in settings.suite.metrics.values()]

    at_another_point = replace(settings, merge=replace(settings.merge, coefficients={"a": 0.1, "b": 0.2}))
    assert scorer.loaded(at_another_point) == (merge, scoring)
    sampled = replace(settings, sampler=replace(settings.sampler, steps=3))
    same, other = scorer.loaded(sampled)
    assert same is merge
    assert (other.sampler.steps, other.fingerprint) == (3, fingerprint)
    assert len(loaded) == len(settings.suite.metrics)

    formula = replace(
        settings, merge=replace(settings.merge, formula="beta7 + b * (anxl3 - anxl2) + a * (base7 - beta7)")
    )
    assert scorer.loaded(formula)[0] is not merge
