"""What a sweep's process loads once and hands from point to point."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

PIPELINES = Path(__file__).parents[2] / "pipelines"


def test_scorers_are_loaded_once_for_all_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each point has a chain of its own; loading a real tagger and CLIP for each would cost seconds a point."""
    monkeypatch.syspath_prepend(str(PIPELINES))
    stages, sweeping = (importlib.import_module(name) for name in ("stages", "sweeping"))
    loaded: list[str] = []

    class Scorer:
        def __init__(self, name: str, device: str) -> None:
            loaded.append(name)
            self.name, self.fingerprint = name, {"weights": name}

    monkeypatch.setattr(stages, "load_metric", Scorer)
    settings: dict[str, Any] = {
        "suite": {"metrics": {"a": {"name": "a"}, "b": {"name": "b"}}},
        "compute": {"device": "cpu"},
        "root": "nowhere",
    }
    chain = stages.Chain(settings, "a journal", "a run")
    points = [sweeping._told_to(chain, f"journal {k}", f"run {k}") for k in range(3)]
    assert [point.scorers for point in points] == [chain.scorers] * 3
    assert loaded == ["a", "b"]
    assert [(point.journal, point.parent) for point in points] == [(f"journal {k}", f"run {k}") for k in range(3)]
    assert (chain.journal, chain.parent) == ("a journal", "a run")
