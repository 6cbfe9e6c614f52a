"""What scoring adds to drawing: pictures alone, against pictures with every metric of a suite.

Scored twice: as evaluate.py does it (a thread draws ahead while others are scored), and one after the other.

python bench/scoring.py [--prompts 40] [--rounds 3] [--suite sweep]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ambergrade.door.compose import compose, plain
from ambergrade.family import sdxl
from ambergrade.generate.fast import drawn_ahead
from ambergrade.generate.stream import pictures
from ambergrade.identity import random_seed
from ambergrade.nouns import PromptSet, SamplerSettings
from ambergrade.score.scoring import load_metric, score
from ambergrade.store import find_file
from ambergrade.typed import settings as read_settings
from ambergrade.world.booru import write_prompts
from ambergrade.world.draw import draw
from ambergrade.world.grammar import sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--suite", default="full", choices=["quick", "sweep", "full"])
    asked = parser.parse_args()
    torch.set_num_threads(1)
    networks = sdxl.load(find_file("builtin://beta7.safetensors"), find_file("builtin://sdxl_tiny"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        metrics, sampler = suite(asked.suite, folder)
        write_prompts(folder / "prompts.jsonl", seed=random_seed(0, "bench"), count=asked.prompts)
        prompts = PromptSet.read(folder / "prompts.jsonl")
        list(pictures(networks, prompts.first(4), sampler, progress=None))  # first calls are slow
        score(pictures(networks, prompts.first(4), sampler, progress=None), prompts, metrics)
        alone = overlapped = scored = 0.0
        for _ in range(asked.rounds):  # in turn, so that both meet the same weather
            start = time.perf_counter()
            list(pictures(networks, prompts, sampler, progress=None))
            middle = time.perf_counter()
            score(pictures(networks, prompts, sampler, progress=None), prompts, metrics, sampler=sampler)
            after = time.perf_counter()
            drawn = drawn_ahead(pictures(networks, prompts, sampler, progress=None), ahead=2 * sampler.batch)
            score(drawn, prompts, metrics, sampler=sampler)
            overlapped += time.perf_counter() - after
            scored += after - middle
            alone += middle - start
    per = 1e3 / (asked.rounds * asked.prompts)
    print(f"scored by {', '.join(metric.name for metric in metrics)}")
    print(f"drawing alone          {alone * per:8.1f} ms a picture")
    print(f"drawing while scoring  {overlapped * per:8.1f} ms a picture  {100 * (overlapped / alone - 1):+.1f} %")
    print(f"drawing, then scoring  {scored * per:8.1f} ms a picture  {100 * (scored / alone - 1):+.1f} %")


def suite(name: str, folder: Path) -> tuple[list[Any], SamplerSettings]:
    """The metrics of conf/suite/<name>.yaml with 40 drawn pictures as their reference, and the tiny sampler."""
    for k in range(40):
        draw(sample(9, k, clean=True)).save(folder / f"{k:02}.png")
    (folder / "list.txt").write_text("".join(f"{k:02}.png\n" for k in range(40)))
    overrides = [f"suite={name}", f"reference={folder}/list.txt", f"reference_pictures={folder}"]
    if name == "sweep":
        overrides += [f"suite.metrics.fid.reference={folder}/list.txt", f"suite.metrics.fid.pictures={folder}"]
    settings = plain(compose("evaluate", overrides))
    metrics = [load_metric(**chosen) for chosen in settings["suite"]["metrics"].values()]
    return metrics, read_settings(SamplerSettings, settings["sampler"], where="sampler")


if __name__ == "__main__":
    main()
