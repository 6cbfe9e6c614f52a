"""What a sweep costs beyond drawing and scoring: 25 points as one --multirun, against the same in a plain loop.

    python bench/sweep.py [--prompts 40] [--points 25]

Both are a command of their own and are timed from its start to its end. The plain loop reads the models once, merges
each point into live networks, draws and scores; it keeps no record, journal, picture or leaderboard. Both must give the
same scores. Wall time, and CPU time, which says the same where another process is at work beside the bench.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
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
    values = A, B[: max(2, -(-asked.points // len(A)))]
    if asked.plain:
        plain(asked.plain, values)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(folder / "prompts.jsonl", asked.prompts)
        alone = child("bench/sweep.py", f"--plain={folder}", f"--points={asked.points}")
        swept = [f"coefficients.{key}={','.join(map(str, some))}" for key, some in zip("ab", values, strict=True)]
        whole = child("pipelines/sweep.py", "--multirun", f"root={folder}", *swept, *overrides(folder))
        report(folder, len(A) * len(values[1]), alone, whole)


def overrides(folder: Path) -> list[str]:
    """No base7 is trained here; anxl2 stands for it."""
    prompts = [f"prompts.{which}={folder}/prompts.jsonl" for which in ("sweep", "heldout")]
    return [
        "data.draw=null",
        "prompts=files",
        *prompts,
        "models.base7=builtin://anxl2.safetensors",
        "compute.threads=1",
        "compute.workers=1",  # as many as the loop has
    ]


def child(*command: str) -> tuple[float, float]:
    """Run a command to its end: seconds of wall and of CPU, its own children's included."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    before, start = cpu(), time.monotonic()
    done = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.monotonic() - start, cpu() - before


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def write_prompts(path: Path, count: int) -> None:
    from ambergrade.identity import random_seed
    from ambergrade.world.booru import write_prompts as write

    write(path, seed=random_seed(0, "bench"), count=count)


def plain(folder: Path, values: Any) -> None:
    """The loop that anyone would write."""
    import torch

    from ambergrade.chain.settings import SweepSettings
    from ambergrade.door.compose import compose, read
    from ambergrade.family import sdxl
    from ambergrade.generate.stream import pictures
    from ambergrade.merge.formula import Formula
    from ambergrade.merge.resident import ResidentMerge
    from ambergrade.nouns import PromptSet
    from ambergrade.score.scoring import load_metric, score
    from ambergrade.store import find_file

    torch.set_num_threads(1)
    settings = read(SweepSettings, compose("sweep", overrides(folder)))
    paths = {alias: find_file(source or "") for alias, source in settings.models.items()}
    formula = Formula.parse(settings.merge.formula, paths)
    merge = ResidentMerge(formula, {alias: sdxl.read_checkpoint(path) for alias, path in paths.items()})
    networks = sdxl.load(paths["beta7"], find_file(settings.family.config))
    metrics = [load_metric(one.name, **one.parameters, device="cpu") for one in settings.suite.metrics.values()]
    sampler = settings.sampler
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


def report(folder: Path, points: int, alone: tuple[float, float], swept: tuple[float, float]) -> None:
    """Where the sweep's time went, from what its jobs noted."""
    loop = json.loads((folder / "plain.json").read_text())
    outcomes = {}
    for file in sorted(folder.rglob("outcome.json")):
        point = json.loads((file.parent / "point.json").read_text())["point"]
        label = ", ".join(f"{key.rpartition('.')[2]} {float(value)}" for key, value in point.items())
        outcomes[label] = (file.stat().st_mtime, json.loads(file.read_text()))
    rows = [row for _, row in sorted(outcomes.values(), key=lambda one: one[0])]
    apart = max(abs(outcomes[label][1]["value"]["score"] - score) for label, score in loop["scores"].items())
    if len(rows) != points or apart > 1e-6:
        raise SystemExit(f"{len(rows)} of {points} points, scores {apart} apart: the two did not do the same.")
    work = sum(row["value"]["seconds"] for row in rows)
    times = sorted(when for when, _ in outcomes.values())
    print(f"{points} points, equal scores                 wall       CPU")
    print(f"plain loop                           {alone[0]:7.1f} s {alone[1]:7.1f} s", end="")
    print(f"   {loop['seconds']:.1f} s of it merging, drawing and scoring")
    print(f"--multirun                           {swept[0]:7.1f} s {swept[1]:7.1f} s", end="")
    print(f"   {work:.1f} s of it merging, drawing and scoring")
    over = [100 * (ours - theirs) / theirs for ours, theirs in zip(swept, alone, strict=True)]
    print(f"longer than the plain loop           {over[0]:7.1f} % {over[1]:7.1f} %   (10 % wanted)")
    between = (times[-1] - times[0] - sum(row["value"]["seconds"] for row in rows[1:])) / max(points - 1, 1)
    print(f"a point's record, journal and way to its process and back {1e3 * between:.0f} ms   (100 ms wanted)")


if __name__ == "__main__":
    main()
