"""The basic launcher in a process of its own: a point that is killed takes only itself along.

The points of a batch share that process, so what they load is loaded once; it is started anew after a death.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import cloudpickle
from hydra.core.singleton import Singleton
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from hydra_plugins.ambergrade_sweeper._outcomes import ending

GRACE_SECONDS = 30.0
"""A child that is asked to end by SIGTERM closes its runs in this time, or is killed."""


class Ended(RuntimeError):
    """A point's process ended before the point did."""

    def __init__(self, code: int) -> None:
        super().__init__(ending(code))


def run(
    context: HydraContext, task: TaskFunction, config: DictConfig, jobs: Sequence[Sequence[str]], first: int
) -> int:
    """Run the jobs one after the other in a child; its exit code."""
    payload = (context, task, config, [list(job) for job in jobs], first, Singleton.get_state())
    child = subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE)
    try:
        child.communicate(cloudpickle.dumps(payload))  # passes over a child that died before it read
        return child.wait()
    except BaseException:
        child.terminate()
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        raise


def main() -> None:
    """The child: python -m hydra_plugins.ambergrade_sweeper._apart, its jobs from stdin."""
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    context, task, config, jobs, first, state = cloudpickle.loads(sys.stdin.buffer.read())
    Singleton.set_state(state)
    launcher = BasicLauncher()
    launcher.setup(hydra_context=context, task_function=task, config=config)
    launcher.launch(jobs, initial_job_idx=first)


if __name__ == "__main__":
    main()
