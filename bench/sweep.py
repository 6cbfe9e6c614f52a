"""What a sweep costs beyond drawing and scoring: 25 points as one --multirun, against the same in a plain loop.

    python bench/sweep.py [--prompts 40] [--points 25]

Both are a command of their own and are timed from its start to its end. The plain loop reads the models once, merges
each point into live networks, draws and scores; it keeps no record, journal, picture or leaderboard. Both must give the
same scores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

REPOSITORY = Path(__file__).parents[1]
A, B = (0.0, 0.4, 0.8, 1.2, 1.6), (0.0, 0.25, 0.5, 0.75, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--points", type=int, default=25)
    parser.add_argument("--plain", type=Path, default=None, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    values = A, B[: -(-asked.points // len(A))]
    if asked.plain:
        plain(asked.plain, values)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(folder / "prompts.jsonl", asked.prompts)
        start = time.monotonic()
        child("bench/sweep.py", f"--plain={folder}", f"--points={asked.points}")
        middle = time.monotonic()
        swept = [f"coefficients.{key}={','.join(map(str, some))}" for key, some in zip("ab", values, strict=True)]
        child("pipelines/sweep.py", "--multirun", f"root={folder}", *swept, *overrides(folder))
        end = time.monotonic()
        report(folder, len(A) * len(values[1]), middle - start, end - middle)


def overrides(folder: Path) -> list[str]:
    """No base7 is trained here; anxl2 stands for it."""
    prompts = [f"prompts.{which}={folder}/prompts.jsonl" for which in ("sweep", "heldout")]
    return [
        "data.draw=null",
        "prompts=files",
        *prompts,
        "models.base7=builtin://anxl2.safetensors",
        "compute.threads=1",
    ]


def child(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def write_prompts(path: Path, count: int) -> None:
    from ambergrade.identity import random_seed
    from ambergrade.world.booru import write_prompts as write

    write(path, seed=random_seed(0, "bench"), count=count)


def plain(folder: Path, values: Any) -> None:
    """The loop that anyone would write."""
    import torch

    from ambergrade import config
    from ambergrade.family import sdxl
    from ambergrade.generate.stream import pictures
    from ambergrade.merge.formula import Formula
    from ambergrade.merge.resident import ResidentMerge
    from ambergrade.nouns import PromptSet, SamplerSettings
    from ambergrade.score.scoring import load_metric, score
    from ambergrade.store import find_file

    torch.set_num_threads(1)
    settings = config.plain(config.compose("sweep", overrides(folder)))
    paths = {alias: find_file(source) for alias, source in settings["models"].items()}
    formula = Formula.parse(settings["merge"]["formula"], paths)
    merge = ResidentMerge(formula, {alias: sdxl.read_checkpoint(path) for alias, path in paths.items()})
    networks = sdxl.load(paths["beta7"], find_file(settings["family"]["config"]))
    metrics = [load_metric(**chosen) for chosen in settings["suite"]["metrics"].values()]
    sampler = config.settings(SamplerSettings, settings["sampler"], where="sampler")
    prompts = PromptSet.read(folder / "prompts.jsonl")
    found, seconds = {}, 0.0
    for a in values[0]:
        for b in values[1]:
            start = time.monotonic()
            merge.assign(networks.modules(), {"a": a, "b": b})
            sheet = score(pictures(networks, prompts, sampler, progress=None), prompts, metrics, sampler=sampler)
            seconds += time.monotonic() - start
            found[f"a {a}, b {b}"] = float(np.nanmean(sheet.columns["tag_prob"]))
    (folder / "plain.json").write_text(json.dumps({"scores": found, "seconds": seconds}))


def report(folder: Path, points: int, alone: float, swept: float) -> None:
    """Where the sweep's time went, from what its jobs noted."""
    loop = json.loads((folder / "plain.json").read_text())
    outcomes = {}
    for file in sorted(folder.rglob("outcome.json")):
        point = json.loads((file.parent / "point.json").read_text())["point"]
        label = ", ".join(f"{key.rpartition('.')[2]} {float(value)}" for key, value in point.items())
        outcomes[label] = json.loads(file.read_text())
    apart = max(abs(outcomes[label]["value"]["score"] - score) for label, score in loop["scores"].items())
    if len(outcomes) != points or apart > 1e-6:
        raise SystemExit(f"{len(outcomes)} of {points} points, scores {apart} apart: the two did not do the same.")
    work = sum(row["value"]["seconds"] for row in outcomes.values())
    jobs = sum(row["seconds"] for row in outcomes.values())
    first = max(row["seconds"] - row["value"]["seconds"] for row in outcomes.values())
    print(f"{points} points, equal scores")
    print(f"plain loop    {alone:7.1f} s, {loop['seconds']:.1f} s of it merging, drawing and scoring")
    print(f"--multirun    {swept:7.1f} s, {work:.1f} s of it merging, drawing and scoring")
    print(f"beyond the plain loop               {100 * (swept - alone) / swept:5.1f} % of the total   (5 % wanted)")
    print(f"beyond merging, drawing and scoring {100 * (swept - work) / swept:5.1f} %, of which")
    print(f"  two processes, Hydra, leaderboard {swept - jobs:6.1f} s")
    print(f"  reading the models (first point)  {first:6.1f} s")
    print(f"  record and journal of a point     {1e3 * (jobs - work - first) / max(points - 1, 1):6.0f} ms")


if __name__ == "__main__":
    main()
