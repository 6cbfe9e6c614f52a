"""What journaling costs: a sweep's points, beside MLflow's own fluent calls, and a checkpoint of 7 GB.

python bench/journal.py [--points 1000] [--fluent 100] [--keep DIR]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

PARAMS, METRICS = 40, 10
CHECKPOINT = 7 * 10**9  # bytes


def make_sweep(root: Path, points: int) -> tuple[list[float], str]:
    """A finished sweep of so many points, 40 parameters and 10 metrics with intervals each, below one parent.

    Returns the seconds of every point, and the experiment's id. The database is `<root>/mlruns/mlflow.db`; a saved view
    named sweep-… lists the points, sorted by `metric 0`.
    """
    from ambergrade.nouns import Measurement
    from ambergrade.track.journal import Journal

    journal = Journal.open(root, "bench")
    seconds = []
    with journal.run("sweep", key="sweep", kind="sweep") as sweep:
        for number in range(points):
            start = time.perf_counter()
            params = {f"param {k}": number + k / PARAMS for k in range(PARAMS)}
            values = {f"metric {k}": (number * 37 + k) % points / points for k in range(METRICS)}
            found = {name: Measurement(value, value - 0.1, value + 0.1, 40) for name, value in values.items()}
            with journal.run(f"point {number}", key=f"{number}", kind="point", parent=sweep, params=params) as run:
                run.metrics(found)
            seconds.append(time.perf_counter() - start)
        columns = {"params": ["param 0", "param 1"], "metrics": ["metric 0", "metric 1"]}
        sweep.view("sweep", "point", order_by="metric 0", **columns)
    assert not journal.troubles, journal.troubles
    return seconds, journal.experiment_id


def fluent_sweep(root: Path, points: int) -> list[float]:
    """As many numbers by `mlflow.start_run`, `log_params` and `log_metrics`, on a database that is set up as ours."""
    import mlflow

    from ambergrade.track.database import open_client, tracking_uri

    uri = tracking_uri(root)
    open_client(uri)
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment("bench")
    seconds = []
    with mlflow.start_run(run_name="sweep"):
        for number in range(points):
            start = time.perf_counter()
            with mlflow.start_run(run_name=f"point {number}", nested=True):
                mlflow.log_params({f"param {k}": number + k / PARAMS for k in range(PARAMS)})
                for k in range(METRICS):
                    value = (number * 37 + k) % points / points
                    row = {"": value, "_lo": value - 0.1, "_hi": value + 0.1, "_n": 40}
                    mlflow.log_metrics({f"metric {k}{end}": one for end, one in row.items()})
            seconds.append(time.perf_counter() - start)
    return seconds


def enter_checkpoint(root: Path) -> tuple[float, int, int]:
    """Seconds that a sparse file of 7 GB takes to become a registered model, bytes written, names of the file."""
    from ambergrade.track.journal import Journal

    journal = Journal.open(root, "bench")
    file = root / "gamma.safetensors"
    with file.open("wb") as handle:
        handle.truncate(CHECKPOINT)
    before = on_disk(root)
    with journal.run("release", key="release", kind="release") as run:
        start = time.perf_counter()
        run.model("gamma", file, "f" * 64, registered_as="bench", aliases=["candidate"])
        seconds = time.perf_counter() - start
    assert not journal.troubles, journal.troubles
    return seconds, on_disk(root) - before, file.stat().st_nlink


def on_disk(root: Path) -> int:
    """Apparent bytes of all files, one that has several names counted once: a sparse copy would count whole."""
    return sum({(s.st_dev, s.st_ino): s.st_size for s in (p.stat() for p in root.rglob("*") if p.is_file())}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--fluent", type=int, default=100, help="points of the fluent loop")
    parser.add_argument("--keep", type=Path, help="folder to keep the journal's database in, for a look in the UI")
    asked = parser.parse_args()
    os.environ["MLFLOW_TRACKING_URI"] = ""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        ours_in = asked.keep or folder / "ours"
        ours, _ = make_sweep(ours_in, asked.points)
        again, _ = make_sweep(ours_in, asked.points)
        enter_checkpoint(folder / "warm")
        seconds, written, names = enter_checkpoint(ours_in)
        theirs = fluent_sweep(folder / "theirs", asked.fluent)  # last: it sets MLFLOW_TRACKING_URI
    mean = sum(ours) / len(ours)
    last = sum(ours[-100:]) / len(ours[-100:])
    print(f"journal        {1e3 * mean:8.1f} ms a point over {len(ours)} points ({1e3 * last:.1f} over the last 100)")
    print(f"found again    {1e3 * sum(again) / len(again):8.1f} ms a point, finished before")
    print(f"fluent calls   {1e3 * sum(theirs) / len(theirs):8.1f} ms a point over {len(theirs)} points")
    print(f"ratio          {sum(theirs) / len(theirs) / mean:8.1f}")
    print(f"checkpoint     {seconds:8.2f} s for {CHECKPOINT:,} bytes, {written:,} bytes written, {names} names of it")


if __name__ == "__main__":
    main()
