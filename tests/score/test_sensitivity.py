"""Every metric moves the way it claims when pictures of the embedded world are made worse in known steps.

FD does not see prompts that were shuffled, recall does not see a collapse; the pair of families catches both.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ambergrade.nouns import Picture, PromptSet
from ambergrade.score.comparison import aggregates
from ambergrade.score.scoring import Metric, load_metric, score
from ambergrade.world import grammar
from ambergrade.world.booru import prompt as world_prompt
from ambergrade.world.draw import draw

N, REAL = 60, 120
Damage = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@pytest.fixture(scope="module")
def world() -> tuple[PromptSet, list[np.ndarray], list[np.ndarray]]:
    """Prompts, the pictures that answer them rightly, and real pictures to compare with."""
    scenes = [grammar.sample(41, k, clean=True) for k in range(N)]
    prompts = PromptSet("world", tuple(world_prompt(scene, f"{k:03}", k) for k, scene in enumerate(scenes)))
    real = [np.asarray(draw(grammar.sample(42, k, clean=True))) for k in range(REAL)]
    return prompts, [np.asarray(draw(scene)) for scene in scenes], real


@pytest.fixture(scope="module")
def metrics(world: Any, tmp_path_factory: Any) -> list[Metric]:
    folder = tmp_path_factory.mktemp("real")
    for k, pixels in enumerate(world[2]):
        Image.fromarray(pixels).save(folder / f"{k:03}.png")
    (folder / "list.txt").write_text("".join(f"{k:03}.png\n" for k in range(REAL)))
    real = {"reference": str(folder / "list.txt"), "pictures": str(folder)}
    sets = [load_metric(name, extractor="builtin://features", **real) for name in ("fid", "kid", "mind", "prdc")]
    clip = load_metric("clip_score", model="builtin://clip")
    return [clip, load_metric("tag_adherence", tagger="builtin://tagger"), load_metric("mosaic"), *sets]


def judged(world: Any, metrics: list[Metric], damage: Damage) -> dict[str, float]:
    prompts, pictures, _ = world
    rng = np.random.default_rng(0)
    shown = [Picture(p.id, 0, damage(pixels, rng)) for p, pixels in zip(prompts.prompts, pictures, strict=True)]
    return {name: m.value for name, m in aggregates(score(shown, prompts, metrics)).items()}


def noise(level: float) -> Damage:
    return lambda x, rng: np.clip(x + rng.normal(0, level, x.shape), 0, 255).astype(np.uint8)


def downscale(times: int) -> Damage:
    def small(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        image = Image.fromarray(x)
        side = x.shape[0] // times
        return np.asarray(image.resize((side, side), Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC))

    return small


def desaturate(share: float) -> Damage:
    return lambda x, rng: np.rint(x * (1 - share) + x.mean(2, keepdims=True) * share).astype(np.uint8)


def lossy(quality: int) -> Damage:
    def saved(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(x).save(file, "JPEG", quality=quality, subsampling=2)
        return np.asarray(Image.open(file))

    return saved


@pytest.fixture(scope="module")
def clean(world: Any, metrics: list[Metric]) -> dict[str, float]:
    return judged(world, metrics, lambda x, rng: x)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "names"),
    [
        (
            [noise(25), noise(70)],
            {"fid": False, "kid": False, "mind": False, "tag_prob": True, "clip_score": True},
        ),
        ([noise(10), noise(25), noise(70)], {"fid": False, "mind": False}),  # what the tagger was taught to bear
        ([downscale(4), downscale(10)], {"fid": False, "mind": False, "tag_prob": True, "tag_recall": True}),
        ([desaturate(0.5), desaturate(1.0)], {"fid": False, "mind": False, "tag_prob": True, "clip_score": True}),
        (
            [lambda x, rng: x[..., ::-1].copy()],
            {"fid": False, "tag_prob": True, "tag_auroc": True, "clip_margin": True},
        ),
        ([lossy(60), lossy(10)], {"fid": False, "mind": False, "mosaic": False}),  # trap 5: FD hears the codec
    ],
    ids=["noise", "faint noise", "downscale", "desaturate", "channel swap", "jpeg"],
)
def test_damage_moves_every_metric_the_way_it_claims(
    world: Any, metrics: list[Metric], clean: dict[str, float], steps: list[Damage], names: dict[str, bool]
) -> None:
    rows = [clean, *(judged(world, metrics, damage) for damage in steps)]
    for name, higher in names.items():
        values = [row[name] for row in rows]
        assert values == sorted(values, reverse=higher), (name, values)
        assert values[0] != values[-1]


def test_a_shuffle_is_seen_by_adherence_alone_and_a_collapse_by_distances_alone(
    world: Any, metrics: list[Metric], clean: dict[str, float]
) -> None:
    prompts, pictures, _ = world
    order = np.random.default_rng(1).permutation(N)
    half = np.where(np.arange(N) < N // 2, order[np.argsort(order)], order)

    def of(which: Any) -> dict[str, float]:
        shown = [Picture(p.id, 0, pictures[k]) for p, k in zip(prompts.prompts, which, strict=True)]
        return {name: m.value for name, m in aggregates(score(shown, prompts, metrics)).items()}

    partly, wholly = of(half), of(order)
    for name in ("fid", "kid", "mind", "recall", "coverage"):
        assert wholly[name] == pytest.approx(clean[name], rel=1e-3, abs=1e-6), name
    for name in ("tag_prob", "tag_recall", "tag_lift", "clip_score", "clip_margin", "clip_r1"):
        assert clean[name] > partly[name] > wholly[name], name
    assert wholly["tag_lift"] == pytest.approx(0, abs=0.1)
    assert wholly["tag_auroc"] == pytest.approx(0.5, abs=0.12)
    assert clean["tag_auroc"] > 0.9

    some, few = of(np.arange(N) % 20), of(np.arange(N) % 6)  # 20 pictures over and over, then six
    for name in ("fid", "kid", "mind"):
        assert few[name] > some[name] > clean[name], name
        assert few[name] > clean[name] + abs(clean[name]), name
    for name in ("recall", "coverage"):
        assert few[name] < some[name] < clean[name], name


def test_adherence_is_blind_to_a_collapse_that_answers_every_prompt(world: Any, metrics: list[Metric]) -> None:
    """Each prompt twice, with the very same picture: recall is untouched, which is why FD must stand beside it."""
    prompts, pictures, _ = world
    same = [Picture(p.id, seed, pictures[k]) for k, p in enumerate(prompts.prompts[:30]) for seed in (0, 1)]
    few = PromptSet("few", prompts.prompts[:30])
    adherence = aggregates(score(same, few, metrics[:2]))
    once = aggregates(score(same[::2], few, metrics[:2]))
    assert adherence["tag_recall"].value == pytest.approx(once["tag_recall"].value)


@pytest.mark.slow
def test_distances_measure_the_prompts_where_the_reference_has_others(
    world: Any, metrics: list[Metric], clean: dict[str, float]
) -> None:
    """Trap 7: every picture is right, yet a set of prompts unlike the reference's has a larger distance."""
    prompts, _, _ = world
    scenes = [grammar.sample(43, k, clean=True) for k in range(900)]
    scenes = [scene for scene in scenes if "blue_sky" in grammar.visible_tags(scene)]
    skewed = [np.asarray(draw(scene)) for scene in scenes[:N]]
    assert len(skewed) == N
    shown = [Picture(p.id, 0, pixels) for p, pixels in zip(prompts.prompts, skewed, strict=True)]
    found = aggregates(score(shown, prompts, [m for m in metrics if m.name in ("fid", "mind")]))
    for name in ("fid", "mind"):
        assert found[name].value > 1.3 * clean[name], name
