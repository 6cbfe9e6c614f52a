"""A sweep whose points cost nothing: python tests/search/toy_sweep.py --multirun x=1,2 root=DIR."""

import json
import os
import resource
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from ambergrade.errors import AmbergradeError
from ambergrade.search.driver import Driver
from ambergrade.search.pool import Pool
from ambergrade.store import write_json


class SweepFailed(AmbergradeError):
    pass


def evaluate(work):
    """One point: the configuration as a mapping, and the folder of its job."""
    cfg, place = work
    root, place = Path(cfg["root"]), Path(place)
    with (root / "calls").open("a") as calls:
        calls.write(f"{cfg['x']}\n")
    with (root / "processes").open("a") as processes:
        processes.write(f"{os.getpid()}\n")
    with (root / "prepared").open("a") as prepared:  # so many points were handed out by now
        prepared.write(f"{len(list(place.parent.glob('*/point.json')))}\n")
    if not cfg["journal"]:
        return score(cfg, root)
    from ambergrade.track.journal import Journal

    journal = Journal.open(root, "toy")
    sweep = journal.attached(**json.loads((place.parent / "sweep.json").read_text()))
    with journal.run(f"x {cfg['x']}", key=place.name, kind="point", parent=sweep, params={"x": cfg["x"]}) as run:
        found = score(cfg, root)
        run.metrics({"score": found})
    return found


def score(cfg, root):
    x, _, how = cfg["fault"].partition(" ")
    if x == str(cfg["x"]) and (root / "faulty").exists():
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            sys.exit(3)
        if how == "memory":
            exhaust()
        raise ValueError("this point fails\nand says why at length")
    time.sleep(cfg["seconds"])
    return float(cfg["x"]) - float(cfg["y"])


def exhaust():
    """More memory than this process may have, refused by the kernel."""
    resource.setrlimit(resource.RLIMIT_AS, (2**32, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        bytearray(2**33)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)


@contextmanager
def journaled(root, key, folder):
    from ambergrade.track.journal import Journal

    journal = Journal.open(root, "toy")
    try:
        with journal.run("toy", key=key, kind="sweep") as run:
            write_json(folder.root / "sweep.json", {"id": run.id, "name": run.name, "key": run.key})
            yield
    except BaseException:
        Journal.open(root, "toy")  # closes the runs of workers that were killed with us
        raise


class Toy:
    def __call__(self, cfg):
        return evaluate((OmegaConf.to_container(cfg), HydraConfig.get().runtime.output_dir))

    def sweep(self, request):
        cfg, root = request.config, Path(request.config.root)

        def made_of(job):
            made = request.composed(request.overrides(job))
            return {"y": made.y, "of": made.of}

        key = request.key(made_of)
        folder = request.folder(key)

        def payload(job):
            return OmegaConf.to_container(request.composed(request.overrides(job))), folder.place(job)

        pool = Pool(evaluate, payload, cfg.workers)

        def recall(job):
            outcome = folder.outcome(job)
            return outcome if outcome and outcome.done else None

        with folder.alone(), journaled(root, key, folder) if cfg.journal else nullcontext(), pool:
            swept = Driver(
                request.search(),
                request.launched(folder) or pool,
                request.axes.label,
                recall=recall,
                past=folder.past(),
                begin=folder.begin,
                hear=lambda trial: trial.before or folder.keep(trial.job, trial.outcome),
            ).sweep()
        folder.keep_failures(swept)
        scores = {trial.job.label: trial.outcome.score for trial in swept.done}
        (root / "result.json").write_text(json.dumps({"best": swept.best, "scores": scores}))
        if swept.failed:
            print(swept.failure_table, flush=True)
            raise SweepFailed("some points failed")


if any("submitit" in argument for argument in sys.argv):
    from submitit.core.core import Job

    Job._results_timeout_s = 1  # not 15: so long it looks for the result of a job that was killed

main = hydra.main(version_base="1.3", config_path=".", config_name="toy_sweep")(Toy())

if __name__ == "__main__":
    main()
