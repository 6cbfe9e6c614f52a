"""What a process that scores points keeps in memory from one to the next."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ambergrade.chain import point as chain_point
from ambergrade.chain.points import PointScorer
from ambergrade.chain.settings import Suite, SweepSettings
from ambergrade.door.compose import compose, read
from ambergrade.search.driver import Job
from ambergrade.store import find_file
from ambergrade.typed import Plugin


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


def test_a_points_identity_holds_whatever_it_is_made_of_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Sweep, preview and explanation ask this one: each of these is drawn anew, and the last ones are not."""

    class Scorer:
        def __init__(self, name: str, **more: Any) -> None:
            self.name, self.fingerprint = name, {"weights": more["weights"].read_text()}

    whole = Job("", {})

    def settings(**given: Any) -> SweepSettings:
        return replace(plain, **given)

    def identity(chosen: SweepSettings, job: Job = whole) -> str:
        return PointScorer().task(chosen, job).identity

    monkeypatch.setattr(chain_point, "load_metric", Scorer)
    weights, prompts, model = (tmp_path / name for name in ("scorer", "prompts.jsonl", "anxl3.safetensors"))
    weights.write_text("one")
    write = prompts.write_text
    write('{"id": "1", "text": "a girl", "seed": 1}\n{"id": "2", "text": "a dragon", "seed": 2}\n')
    shutil.copy(find_file("builtin://anxl3.safetensors"), model)
    given = [f"root={tmp_path}", f"models.base7={model}", "data.draw=null", f"prompts.sweep={prompts}"]
    plain = read(SweepSettings, compose("sweep", given))
    plain = replace(plain, suite=Suite({"tags": Plugin("tags", {"weights": weights})}))

    first = identity(plain)
    others = [
        identity(settings(sampler=replace(plain.sampler, guidance=9.0))),
        identity(settings(merge=replace(plain.merge, coefficients={"a": 0.1, "b": 0.5}))),
        identity(settings(prompts=replace(plain.prompts, sweep_count=1))),
        identity(plain, Job("", {}, (0, 1))),
    ]
    assert first == identity(settings(sheet=1, leaderboard=(), compute=replace(plain.compute, threads=3), name="else"))
    weights.write_text("two")
    others.append(identity(plain))
    write('{"id": "1", "text": "a girl", "seed": 1}\n{"id": "2", "text": "two dragons", "seed": 2}\n')
    others.append(identity(plain))
    shutil.copy(find_file("builtin://anxl2.safetensors"), model)
    others.append(identity(plain))
    assert len({first, *others}) == len(others) + 1
