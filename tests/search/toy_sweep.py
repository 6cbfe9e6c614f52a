"""A sweep whose points cost nothing: python tests/search/toy_sweep.py --multirun x=1,2 root=DIR."""

import json
import os
import resource
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig

from ambergrade.errors import BadSetting


def point(cfg):
    root, place = Path(cfg.root), Path(HydraConfig.get().runtime.output_dir)
    with (root / "calls").open("a") as calls:
        calls.write(f"{cfg.x}\n")
    with (root / "processes").open("a") as processes:
        processes.write(f"{os.getpid()}\n")
    with (root / "prepared").open("a") as prepared:  # so many points were handed out by now
        prepared.write(f"{len(list(place.parent.glob('*/point.json')))}\n")
    if not cfg.journal:
        return work(cfg, root)
    from ambergrade.track.journal import Journal
    from ambergrade.track.relay import Relayed
    from hydra_plugins.ambergrade_sweeper import _reports

    journal = Relayed(_reports.send, root) if _reports.send else Journal.open(root, "toy")
    sweep = journal.attached(**json.loads((place.parent / "sweep.json").read_text()))
    with journal.run(f"x {cfg.x}", key=place.name, kind="point", parent=sweep, params={"x": cfg.x}) as run:
        score = work(cfg, root)
        run.metrics({"score": score})
    return score


def work(cfg, root):
    x, _, how = str(cfg.fault).partition(" ")
    if x == str(cfg.x) and (root / "faulty").exists():
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "exit":
            sys.exit(3)
        if how == "memory":
            exhaust()
        raise ValueError("this point fails")
    time.sleep(cfg.seconds)
    return float(cfg.x) - float(cfg.y)


def exhaust():
    """More memory than this process may have, refused by the kernel."""
    resource.setrlimit(resource.RLIMIT_AS, (2**32, resource.getrlimit(resource.RLIMIT_AS)[1]))
    try:
        bytearray(2**33)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.getrlimit(resource.RLIMIT_AS)[1],) * 2)


class Hooks:
    """In the parent."""

    @staticmethod
    def inputs(cfg):
        return {}

    @staticmethod
    def holds(cfg, value):
        return True

    @staticmethod
    def previews(cfg):
        return False

    @staticmethod
    @contextmanager
    def opens(cfg, sweep):
        if not cfg.journal:
            yield None
            return
        from ambergrade.store import write_json
        from ambergrade.track.journal import Journal
        from ambergrade.track.relay import Scribe

        root = Path(cfg.root)
        journal = Journal.open(root, "toy")
        try:
            with journal.run("toy", key=sweep.key, kind="sweep") as run:
                write_json(sweep.folder / "sweep.json", {"id": run.id, "name": run.name, "key": run.key})
                yield Scribe(journal)
        except BaseException:
            Journal.open(root, "toy")  # closes the runs of workers that were killed with us
            raise

    @staticmethod
    def hears(sweep, message):
        if sweep.around is None:
            assert message is None
        elif message is None:
            sweep.around.lose()
        else:
            sweep.around.hear(message)

    @staticmethod
    def after(how):
        """In the process that drew the points."""
        if how == "raise":
            raise BadSetting("so it is")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return os.getpid()

    @staticmethod
    def closes(cfg, sweep):
        if cfg.after:
            sweep.worker.call("after", cfg.after)
            (Path(cfg.root) / "after").write_text(str(sweep.worker.answer()))
        best = sweep.search.best
        scores = {trial.label: trial.outcome.score for trial in sweep.trials if trial.outcome.status == "done"}
        (Path(cfg.root) / "result.json").write_text(json.dumps({"best": best, "scores": scores}))


if any("submitit" in argument for argument in sys.argv):
    from submitit.core.core import Job

    Job._results_timeout_s = 1  # not 15: so long it looks for the result of a job that was killed

point.sweep = lambda: Hooks
main = hydra.main(version_base="1.3", config_path=".", config_name="toy_sweep")(point)

if __name__ == "__main__":
    main()
