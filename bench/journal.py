"""What journaling costs: a sweep's points, beside MLflow's own fluent calls, and a checkpoint of 7 GB.

python bench/journal.py [--points 1000] [--keep DIR]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

PARAMS, METRICS = 40, 10
CHECKPOINT = 7 * 10**9  # bytes

Times = list[tuple[float, float]]


def make_sweep(
    root: Path, points: int, between: Callable[[int], None] = lambda number: None, *, intervals: bool = True
) -> tuple[Times, str]:
    """A finished sweep of so many points, 40 parameters and 10 metrics with intervals each, below one parent.

    Returns the times of every point, and the experiment's id. The database is `<root>/mlruns/mlflow.db`; a saved view
    named sweep-… lists the points, sorted by `metric 0`. `between` is called after every point, outside its time.
    `intervals=False`: 10 plain numbers a point, not 40.
    """
    from ambergrade.nouns import Measurement
    from ambergrade.track.journal import Journal

    journal = Journal.open(root, "bench")
    times = []
    with journal.run("sweep", key="sweep", kind="sweep") as sweep:
        for number in range(points):
            start = now()
            found: dict[str, Measurement | float] = dict(values(number, points))
            if intervals:
                found = {name: Measurement(x, x - 0.1, x + 0.1, 40) for name, x in values(number, points)}
            with journal.run(
                f"point {number}", key=f"{number}", kind="point", parent=sweep, params=settings(number)
            ) as run:
                run.metrics(found)
            times.append(since(start))
            between(number)
        columns = {"params": ["param 0", "param 1"], "metrics": ["metric 0", "metric 1"]}
        sweep.view("sweep", "point", order_by="metric 0", **columns)
    assert not journal.troubles, journal.troubles
    return times, journal.experiment_id


def fluent_point(number: int, points: int) -> tuple[float, float]:
    """The same numbers by `mlflow.start_run`, `log_params` and `log_metrics`, a call a metric, as one writes them."""
    import mlflow

    start = now()
    with mlflow.start_run(run_name=f"point {number}", nested=True):
        mlflow.log_params(settings(number))
        for name, value in values(number, points):
            mlflow.log_metrics({name: value, f"{name}_lo": value - 0.1, f"{name}_hi": value + 0.1, f"{name}_n": 40})
    return since(start)


def open_fluent(root: Path) -> None:
    """MLflow's own global state, on a database that is set up as ours."""
    from ambergrade.track.database import open_client, tracking_uri  # first: it sets MLflow quiet

    import mlflow  # isort: skip

    uri = tracking_uri(root)
    open_client(uri)
    mlflow.set_tracking_uri(uri)
    os.environ["MLFLOW_TRACKING_URI"] = ""  # which it sets
    mlflow.set_experiment("bench")
    mlflow.start_run(run_name="sweep")


def settings(number: int) -> dict[str, float]:
    return {f"param {k}": number + k / PARAMS for k in range(PARAMS)}


def values(number: int, points: int) -> list[tuple[str, float]]:
    return [(f"metric {k}", (number * 37 + k) % points / points) for k in range(METRICS)]


def now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float]) -> tuple[float, float]:
    """Seconds on the clock, seconds of the processor."""
    return time.perf_counter() - start[0], time.process_time() - start[1]


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


def mean(times: Times) -> tuple[float, float]:
    """Milliseconds a point: on the clock, of the processor."""
    return 1e3 * sum(clock for clock, _ in times) / len(times), 1e3 * sum(cpu for _, cpu in times) / len(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=1000)
    parser.add_argument("--keep", type=Path, help="folder to keep the journal's database in, for a look in the UI")
    asked = parser.parse_args()
    os.environ["MLFLOW_TRACKING_URI"] = ""
    theirs: Times = []

    def fluent(number: int) -> None:  # one after every tenth of ours, so that both meet the same weather
        if number % 10 == 0:
            theirs.append(fluent_point(number, asked.points))

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        root = asked.keep or folder / "ours"
        open_fluent(folder / "theirs")
        ours, _ = make_sweep(root, asked.points, fluent)
        again, _ = make_sweep(root, asked.points)
        plain, _ = make_sweep(folder / "plain", max(asked.points // 5, 1), intervals=False)
        enter_checkpoint(folder / "warm")
        seconds, written, names = enter_checkpoint(root)
    print("ms a point                    clock     processor")
    tail = len(ours) // 10 or 1
    rows = {"journal": ours, "  its last tenth": ours[-tail:], "  finished before": again}
    rows |= {"  without intervals": plain, "fluent calls": theirs}
    for name, times in rows.items():
        print(f"{name:<22}{mean(times)[0]:10.1f} {mean(times)[1]:10.1f}   over {len(times)} points")
    print(f"{'ratio':<22}{mean(theirs)[0] / mean(ours)[0]:10.1f} {mean(theirs)[1] / mean(ours)[1]:10.1f}")
    print(f"checkpoint of {CHECKPOINT:,} bytes: {seconds:.2f} s, {written:,} bytes written, {names} names of one file")


if __name__ == "__main__":
    main()
