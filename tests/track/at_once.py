"""Starts workers at one instant, each opening the journal by itself: `python at_once.py WORKERS ROOT…`.

Workers are forked from a process that has imported MLflow and opened nothing: eight imports of MLflow take a
minute on two cores, and what is tested comes after them.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any


def work(root: str, number: int, start: Any, told: Any) -> None:
    from ambergrade.nouns import Measurement
    from ambergrade.track.journal import Journal

    start.wait(120)
    journal = Journal.open(Path(root), "gamma")
    with journal.run("sweep", key="s", kind="sweep") as sweep:
        point = journal.run(f"a {number}", key=f"p{number}", kind="point", parent=sweep, params={"a": number})
        with point as run:
            run.metrics({"score": Measurement(number, number - 0.5, number + 0.5, 8)})
        with journal.run("shared", key="t", kind="train", parent=sweep) as shared:
            shared.metrics({"loss": 0.5}, 1)
    told.put((number, run.id, sweep.id, shared.id, journal.troubles))


def main() -> None:
    workers, roots = int(sys.argv[1]), sys.argv[2:]
    context = multiprocessing.get_context("forkserver")
    mlflow = ["mlflow", "mlflow.db", "mlflow.store.tracking.sqlalchemy_store"]
    context.set_forkserver_preload(["ambergrade.track.journal", *mlflow])  # the journal first: it sets MLflow quiet
    for root in roots:
        start, told = context.Barrier(workers), context.Queue()
        every = [context.Process(target=work, args=(root, number, start, told)) for number in range(workers)]
        for process in every:
            process.start()
        for process in every:
            process.join(300)
        codes = [process.exitcode for process in every]
        said = [told.get(timeout=10) for code in codes if code == 0]
        print(json.dumps({"codes": codes, "said": said}), flush=True)


if __name__ == "__main__":
    main()
