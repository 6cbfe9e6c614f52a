"""The basic launcher in a process of its own: a point that is killed takes only itself along.

All points of a sweep share that process, so what they load is loaded once; it is started anew after a death.
"""

from __future__ import annotations

import os
import pickle
import select
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

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


class Worker:
    """The child; it ends when its stdin does."""

    def __init__(self, context: HydraContext, task: TaskFunction, config: DictConfig) -> None:
        heard, answers = os.pipe()
        command = [sys.executable, "-m", __name__, str(answers)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[answers])
        os.close(answers)
        self._answers = os.fdopen(heard, "rb")
        self._first = (context, task, config, Singleton.get_state())

    def run(self, jobs: Sequence[Sequence[str]], number: int) -> int | None:
        """Run the jobs one after the other, numbered from `number`; its exit code if it died, else None."""
        try:
            setup, self._first = self._first, None
            try:
                self._send((setup, [list(job) for job in jobs], number))
            except BrokenPipeError:  # it died before
                return self._child.wait()
            return None if self._has_answered() else self._child.wait()
        except BaseException:
            self.stop()
            raise

    def _has_answered(self) -> bool:
        while not select.select([self._answers], [], [], 1.0)[0]:
            if self._child.poll() is not None:  # what it forked may hold the pipe open
                return False
        return bool(os.read(self._answers.fileno(), 1))

    def close(self) -> None:
        """Let it end; what it drew is drawn."""
        self._answers.close()
        try:
            self._child.communicate(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.stop()

    def stop(self) -> None:
        """Ask it to end now, and see to it."""
        self._child.terminate()
        try:
            self._child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _send(self, message: Any) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(cloudpickle.dumps(message))
        self._child.stdin.flush()


def main() -> None:
    """The child: python -m hydra_plugins.ambergrade_sweeper._apart FD, batches from stdin, a byte to FD after each."""
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    answers, launcher = int(sys.argv[1]), BasicLauncher()
    while True:
        try:
            setup, jobs, number = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if setup is not None:
            context, task, config, state = setup
            Singleton.set_state(state)
            launcher.setup(hydra_context=context, task_function=task, config=config)
        launcher.launch(jobs, initial_job_idx=number)
        os.write(answers, b".")


if __name__ == "__main__":
    main()
