"""The basic launcher in a process of its own: a point that is killed, or leaves by sys.exit, takes only itself along.

The points of a batch share that process, so what they load is loaded once; it is started anew after a death.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import cloudpickle
from hydra.core.singleton import Singleton
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

GRACE_SECONDS = 30.0
"""A child that is asked to end by SIGTERM closes its runs in this time, or is killed."""


class Ended(RuntimeError):
    """A point's process ended before the point did."""

    def __init__(self, code: int) -> None:
        self.code = code
        if code < 0 or code > 128:
            number = -code if code < 0 else code - 128
            told = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
            text = f"its process was ended by {told}" + (" (out of memory?)" if told == "SIGKILL" else "")
        else:
            text = f"its process left with exit code {code}"
        super().__init__(text)


def run(
    context: HydraContext, task: TaskFunction, config: DictConfig, jobs: Sequence[Sequence[str]], first: int
) -> int:
    """Run the jobs one after the other in a child; its exit code. The child ends when this process does."""
    payload = (context, task, config, [list(job) for job in jobs], first, Singleton.get_state())
    with tempfile.TemporaryDirectory(prefix="ambergrade-") as folder:
        file = Path(folder) / "jobs"
        file.write_bytes(cloudpickle.dumps(payload))
        command = [sys.executable, "-m", __name__, str(file)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE)  # the pipe's end tells the child that we are gone
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            try:
                child.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
            raise
        finally:
            assert child.stdin is not None
            child.stdin.close()


def main() -> None:
    """The child: python -m hydra_plugins.ambergrade_sweeper._apart FILE."""
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    context, task, config, jobs, first, state = cloudpickle.loads(Path(sys.argv[1]).read_bytes())
    Singleton.set_state(state)
    launcher = BasicLauncher()
    launcher.setup(hydra_context=context, task_function=task, config=config)
    launcher.launch(jobs, initial_job_idx=first)


def _leave_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
