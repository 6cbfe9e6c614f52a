"""Racing against the full evaluation on real pictures of the embedded world: the same winners, for fewer pictures?

    python bench/racing.py [--world planted|demo] [--prompts 240] [--block 48 96 144] [--repetitions 20] [--pool DIR]
    python bench/racing.py --root ROOT        the 25 points that `make demo` has drawn below ROOT

Every point of a 5 × 5 grid is drawn on every prompt of a pool, once, and its tag_prob is kept. A repetition takes a
block of the pool's prompts without replacement, in an order of its own, races on them with the product's class and
judge, and evaluates all points on all of them. Where the blocks together are more than the pool, repetitions share
pictures, and so they vary a little less than fresh ones would.

`planted`: beta7 + a·n1 + b·n2, two directions of random weights (UNet only), so that nothing is better than (0, 0),
which does not lie in the grid's middle. `demo`: the sweep of the Gamma story (--base7 FILE). An interrupted command
goes on where it was; --minutes 5 stops after so long. --screen 4 draws the first rung with 4 sampler steps as well, and
tells what a screening makes of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ambergrade.door.compose import compose, plain
from ambergrade.family import sdxl
from ambergrade.generate.stream import pictures
from ambergrade.generate.texts import TextEncoder
from ambergrade.identity import random_seed
from ambergrade.merge.formula import Formula
from ambergrade.merge.resident import ResidentMerge
from ambergrade.nouns import Prompt, PromptSet, SamplerSettings
from ambergrade.score.scoring import load_metric, score
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import prompt_means, winner_set
from ambergrade.search.racing import Race, Screening, rank_correlation
from ambergrade.store import Ledger, find_file
from ambergrade.typed import settings as read_settings
from ambergrade.world.booru import write_prompts

Point = dict[str, float]
OBJECTIVE = "tag_prob"
CHUNK = 48
"""Prompts of a point that are drawn and kept at once."""
STEP = 0.1
"""Sets the size of the planted grid: a direction's weights have the spread of the model's own."""
FORMULAS = {
    "planted": "beta7 + a * (n1 - beta7) + b * (n2 - beta7)",
    "demo": "beta7 + a * (anxl3 - anxl2) + b * (base7 - beta7)",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", default="planted", choices=list(FORMULAS))
    parser.add_argument("--base7", type=Path, default=None)
    parser.add_argument("--root", type=Path, default=None)
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--block", type=int, nargs="+", default=[48, 96, 144])
    parser.add_argument(
        "--first", type=int, default=12, help="prompts of the first rung; each further one doubles them"
    )
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--pool", type=Path, default=Path("mlruns/bench/racing"))
    parser.add_argument("--screen", type=int, default=None)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.root:
        names, scores = finished(asked.root)
    else:
        points = grid(asked.world)
        prompts = pool(asked)
        chunks = [PromptSet("chunk", prompts[start : start + CHUNK]) for start in range(0, len(prompts), CHUNK)]
        if not drawn(asked, points, chunks):
            return
        names = [label(point) for point in points]
        scores = np.stack([read(asked, point, chunks) for point in points])
        if asked.screen:
            first = [PromptSet("chunk", prompts[: asked.first])]
            if not drawn(asked, points, first, asked.screen):
                return
            cheap = np.stack([read(asked, point, first, asked.screen) for point in points])
            screened(names, cheap, scores[:, : asked.first], asked.screen)
    for block in sorted({min(block, scores.shape[1]) for block in asked.block}):
        doubled = (asked.first * 2**k for k in itertools.count())
        rungs = [*itertools.takewhile(lambda prompts, block=block: prompts < block, doubled), block]
        report(names, scores, rungs, asked.repetitions)


def grid(world: str) -> list[Point]:
    if world == "demo":
        values = plain(compose("sweep", ["search=gamma_grid"]))["search"]["values"]
    else:
        values = {"a": [STEP * k for k in (-1, 0, 1, 2, 3)], "b": [STEP * k for k in (-3, -2, -1, 0, 1)]}
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def label(point: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in point.items())


# --- the pool ---------------------------------------------------------------------------------------------------


def pool(asked: argparse.Namespace) -> Sequence[Prompt]:
    folder = asked.pool / asked.world
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(folder / "prompts.jsonl", seed=random_seed(0, "racing"), count=asked.prompts)
    return PromptSet.read(folder / "prompts.jsonl").prompts


def drawn(
    asked: argparse.Namespace, points: Sequence[Point], chunks: Sequence[PromptSet], steps: int | None = None
) -> bool:
    """Draw and score what the pool lacks; False where the time was over first."""
    left = [(chunk, point) for chunk in chunks for point in points if not file_of(asked, point, chunk, steps).exists()]
    if not left:
        return True
    merge, networks = live(asked)
    settings = plain(compose("sweep"))["sampler"]
    sampler = read_settings(SamplerSettings, settings, where="sampler")
    sampler = replace(sampler, steps=steps or sampler.steps)
    tagger, encoder = load_metric("tag_adherence", tagger="builtin://tagger"), None
    start, count = time.monotonic(), 0
    for done, (chunk, point) in enumerate(left):
        if time.monotonic() - start > 60 * asked.minutes:
            print(f"{count} pictures, {count / (time.monotonic() - start):.2f} a second;", end=" ")
            print(f"{len(left) - done} of {len(left)} parts are left: the same command goes on.")
            return False
        merge.assign(networks.modules(), point)
        if encoder is None or asked.world != "planted":  # the planted directions leave the text encoders alone
            encoder = TextEncoder(networks)
        stream = pictures(networks, chunk, sampler, progress=None, texts=encoder)
        score(stream, chunk, [tagger], sampler=sampler).write(file_of(asked, point, chunk, steps))
        count += len(chunk.prompts)
    print(f"{count} pictures, {count / (time.monotonic() - start):.2f} a second")
    return True


def live(asked: argparse.Namespace) -> tuple[ResidentMerge, sdxl.Networks]:
    paths = {name: find_file(f"builtin://{name}.safetensors") for name in ("beta7", "anxl2", "anxl3")}
    models = {name: sdxl.read_checkpoint(path) for name, path in paths.items()}
    if asked.world == "planted":
        models |= {name: elsewhere(models["beta7"], name) for name in ("n1", "n2")}
    elif asked.base7 is None:
        raise SystemExit("--world demo needs --base7 FILE: the fine-tune that `make demo` has trained.")
    else:
        models["base7"] = sdxl.read_checkpoint(asked.base7)
    formula = Formula.parse(FORMULAS[asked.world], models)
    networks = sdxl.load(paths["beta7"], find_file("builtin://sdxl_tiny"))
    return ResidentMerge(formula, {name: models[name] for name in formula.models}), networks


def elsewhere(model: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """The model a whole step away in a random direction: every UNet tensor plus noise of its own spread."""

    def moved(key: str, value: torch.Tensor) -> torch.Tensor:
        if not key.startswith("model.diffusion_model.") or value.numel() < 2:
            return value
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(random_seed(0, name, key) % 2**63))
        return (value.float() + value.float().std() * noise).to(value.dtype)

    return {key: moved(key, value) for key, value in model.items()}


def file_of(asked: argparse.Namespace, point: Mapping[str, float], chunk: PromptSet, steps: int | None = None) -> Path:
    name = f"{label(point).replace(', ', '_').replace(' ', '')}-{chunk.digest[:12]}"
    return Path(asked.pool / asked.world / f"{name}{f'-{steps}steps' if steps else ''}.parquet")


def read(
    asked: argparse.Namespace, point: Mapping[str, float], chunks: Sequence[PromptSet], steps: int | None = None
) -> Any:
    """(P,): the point's score on every prompt of the chunks."""
    sheets = [ScoreSheet.read(file_of(asked, point, chunk, steps)) for chunk in chunks]
    return np.concatenate([prompt_means(sheet.columns[OBJECTIVE], sheet.prompt_ids) for sheet in sheets])


def finished(root: Path) -> tuple[list[str], Any]:
    """Names and scores (K, P) of the points whose sheets `make demo` left below `root`."""
    ledger, found = Ledger(root / "mlruns"), {}
    for record in sorted((root / "mlruns" / "records" / "point").glob("*.json")):
        row = json.loads(record.read_text())
        sheet = ScoreSheet.read(ledger.store.path(row["files"]["scores"]))
        point = label(row["settings"]["recipe"]["coefficients"])
        found[point] = prompt_means(sheet.columns[OBJECTIVE], sheet.prompt_ids)
    return list(found), np.stack(list(found.values()))


# --- the races --------------------------------------------------------------------------------------------------


def judge(scores: Any, alive: Sequence[int], error: float) -> Sequence[int]:
    """As pipelines/sweeping.py."""
    return winner_set(scores, alive=alive, error=error).members


def raced(names: Sequence[str], scores: Any, rungs: Sequence[int]) -> Race:
    """A race on scores that are there."""
    race = Race(names, rungs, judge)
    while rung := race.ask():
        for point in rung.points:
            race.tell(point, scores[names.index(point), rung.start : rung.stop])
    return race


def screened(names: Sequence[str], cheap: Any, whole: Any, steps: int) -> None:
    """What a screening by fewer steps decides on the first rung's prompts."""
    screening = Screening(names, judge)
    for name, scores in zip(names, cheap, strict=True):
        screening.tell(name, scores)
    for name in screening.controls():
        screening.check(name, whole[names.index(name)])
    print(f"screening by {steps} steps on {cheap.shape[1]} prompts: {screening.decide().text}")
    rho, low, high = rank_correlation(cheap, whole)
    print(f"  all {len(names)} points: {rho:.2f} [{low:.2f}, {high:.2f}]")


def blocks(prompts: int, block: int, repetitions: int) -> Iterator[Any]:
    for number in range(repetitions):
        rng = np.random.Generator(np.random.Philox(key=random_seed(0, "repetition", number)))
        yield rng.permutation(prompts)[:block]


def report(names: list[str], scores: Any, rungs: Sequence[int], repetitions: int) -> None:
    """Race and evaluate on every block, and print how they compare."""
    mean = scores.mean(1)
    print(f"\n{len(names)} points, {scores.shape[1]} prompts in the pool, blocks of {rungs[-1]}, rungs {list(rungs)}")
    print(f"{OBJECTIVE} of the pool: best {names[int(mean.argmax())]} {mean.max():.3f}, worst {mean.min():.3f}")
    kept = ("picked", "best", "same", "shared", "full", "raced", "drawn")
    found: dict[str, list[float]] = {name: [] for name in kept}
    for order in blocks(scores.shape[1], rungs[-1], repetitions):
        some = scores[:, order]
        race, full = raced(names, some, rungs), winner_set(some)
        winners, left = {names[k] for k in full.members}, set(race.alive)
        pick = max(race.alive, key=lambda point, race=race: np.mean(race.rows(point)))
        row = {
            "picked": pick in winners,
            "best": pick == names[full.best],
            "same": winners == left,
            "shared": len(winners & left) / len(winners | left),
            "full": len(winners),
            "raced": len(left),
            "drawn": race.spent / race.full,
        }
        for name, value in row.items():
            found[name].append(value)
        odd = [names.index(point) for point in sorted(winners ^ left)]
        told = "; ".join(f"{names[k]} {full.behind[k]:.3f} [{full.low[k]:+.3f}, {full.high[k]:.3f}]" for k in odd)
        print(f"  full {len(winners):2}  raced {len(left):2}  pictures {row['drawn']:4.0%}  {told}", flush=True)
    print("(points that one set alone holds, with how far they lie behind the best in the full evaluation)")
    count = len(found["drawn"])
    sums = {name: int(sum(values)) for name, values in found.items()}
    means = {name: float(np.mean(values)) for name, values in found.items()}
    print(f"picks a member of the full evaluation's set  {sums['picked']} of {count}   (95 % wanted)")
    print(f"picks its very best point                    {sums['best']} of {count}")
    print(
        f"pictures                                     {means['drawn']:.1%}, at most {max(found['drawn']):.1%}", end=""
    )
    print("   (40 % wanted)")
    print(f"equal winner sets                            {sums['same']} of {count}", end="")
    print(f"; {means['shared']:.1%} of the points in either are in both")
    print(f"points in the set                            {means['full']:.1f} of the full evaluation's, ", end="")
    print(f"{means['raced']:.1f} of the race's")


if __name__ == "__main__":
    main()
