"""Many sheets against one, and a sheet against itself in another batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from scipy import stats

from ambergrade.errors import BadInput, UnknownName
from ambergrade.nouns import Picture, Prompt, PromptSet, SamplerSettings
from ambergrade.score.comparison import differences, family, kernel_noise
from ambergrade.score.scoring import load_metric, score
from ambergrade.score.sheet import ScoreSheet

SAMPLER = SamplerSettings("euler", 2, 3.0, 64, 64, batch=4)
PROMPTS = PromptSet("ten", tuple(Prompt(f"p{k}", "hair", k) for k in range(10)))


def sheet(prompts: int, values: np.ndarray) -> ScoreSheet:
    ids = tuple(f"p{k}" for k in range(prompts))
    return ScoreSheet(ids, (0,) * prompts, {"prob": values}, {}, {"prob": True}, {}, {}, {}, "")


def drawn(prompts: PromptSet, batch: int, shift: int = 0, steps: int = 2) -> ScoreSheet:
    rng = np.random.default_rng(0)
    shown = [Picture(p.id, p.seed, rng.integers(0, 200, (64, 64, 3), dtype=np.uint8) + shift) for p in prompts.prompts]
    shown = [dataclasses.replace(picture, pixels=picture.pixels.astype(np.uint8)) for picture in shown]
    sampler = dataclasses.replace(SAMPLER, batch=batch, steps=steps)
    return score(shown, prompts, [load_metric("mosaic")], sampler=sampler, how={"precision": "bf16"})


def test_a_family_of_points_has_wider_intervals_than_each_alone() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=60)
    points = {f"a{k}": sheet(60, base + 0.1 * k + rng.normal(0, 0.5, 60)) for k in range(8)}
    baseline = sheet(60, base)
    found = family(points, baseline, "prob")
    assert list(found) == list(points)
    for name, together in found.items():
        alone = differences(points[name], baseline)["prob"]
        t = stats.ttest_rel(points[name].columns["prob"], baseline.columns["prob"])
        assert together.value == pytest.approx(alone.value)
        assert together.high - together.low > 1.15 * (alone.high - alone.low)
        assert float(t.pvalue) <= together.p + 0.01  # never below the plain one, at most Bonferroni's
        assert together.p <= 8 * float(t.pvalue) + 0.02
    with pytest.raises(UnknownName, match="'prob'"):
        family(points, baseline, "prop")
    with pytest.raises(BadInput, match="cannot be compared"):
        family({"few": sheet(40, base[:40])}, baseline, "prob")


def test_kernel_noise_is_what_another_batch_changes_and_nothing_else_is_let_pass() -> None:
    whole = drawn(PROMPTS, 4)
    same = kernel_noise(whole, drawn(PROMPTS.first(6), 1))
    assert same["mosaic"].largest == 0
    assert same["mosaic"].mean.verdict == "undecided"
    again = drawn(PROMPTS.first(6), 1)
    moved = dataclasses.replace(again, columns={"mosaic": again.columns["mosaic"] + np.array([0, 0, 3, 0, 0, 1.0])})
    found = kernel_noise(whole, moved)["mosaic"]
    assert (found.typical, found.largest) == (pytest.approx(4 / 6), pytest.approx(3))
    assert found.mean.value == pytest.approx(4 / 6)
    with pytest.raises(BadInput, match="steps 3 / 2"):
        kernel_noise(whole, drawn(PROMPTS.first(6), 1, steps=3))
    with pytest.raises(BadInput, match="batch 1 / 4"):
        differences(drawn(PROMPTS, 1), whole)  # elsewhere a batch is part of what pairs


def test_what_made_the_pictures_pairs_them() -> None:
    whole = drawn(PROMPTS, 4)
    other = dataclasses.replace(whole, sampler={key: v for key, v in whole.sampler.items() if key != "precision"})
    with pytest.raises(BadInput, match="precision"):
        differences(whole, other)
