"""The basic launcher in a process of its own: a point that is killed takes only itself along.

All points of a sweep share that process, so what they load is loaded once; it is started anew after a death. It does
nothing but draw: configurations are composed here, in the parent, and what a job reports (`_reports`) is dealt with
here, while the next point is drawn.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import cloudpickle
from hydra.core.config_loader import ConfigLoader
from hydra.core.singleton import Singleton
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from ambergrade.errors import AmbergradeError
from hydra_plugins.ambergrade_sweeper import _lifeline, _reports
from hydra_plugins.ambergrade_sweeper._outcomes import ending

GRACE_SECONDS = 30.0
"""A child that is asked to end by SIGTERM closes its runs in this time, or is killed."""
AHEAD = 2
"""Jobs that the child holds: the one it draws and the next."""

Job = tuple[list[str], DictConfig]
"""Overrides, and what they compose to."""


class Ended(AmbergradeError):
    """A point's process ended before the point did."""

    def __init__(self, code: int) -> None:
        super().__init__(ending(code))


@dataclass(frozen=True)
class _Batch:
    """Jobs come, at most so many, numbered from `number`; then `_BatchEnd`."""

    count: int
    number: int


@dataclass(frozen=True)
class _BatchEnd:
    pass


@dataclass(frozen=True)
class _Call:
    """A hook to be called."""

    name: str
    given: tuple[Any, ...]


@dataclass(frozen=True)
class _Answer:
    value: Any
    error: Exception | None = None


@dataclass(frozen=True)
class _JobEnded:
    pass


class Worker:
    """The child; it ends when its stdin does, and makes ready from its first moment."""

    def __init__(
        self, context: HydraContext, task: TaskFunction, config: DictConfig, hear: Callable[[Any], None]
    ) -> None:
        """`hear`: gets what the jobs report, in order, while `run` and `answer` wait."""
        heard, answers = os.pipe()
        command = [sys.executable, "-m", __name__, str(answers)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[answers])
        os.close(answers)
        self._hear, self._began = hear, False
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        assert self._child.stdin is not None
        for work, pipe in ((_read, os.fdopen(heard, "rb")), (_write, self._child.stdin)):
            box = self._inbox if work is _read else self._outbox
            threading.Thread(target=work, args=(pipe, box), daemon=True).start()
        self._send((context, task, config, Singleton.get_state()))

    def run(self, jobs: Iterable[Job], count: int, number: int) -> int | None:
        """Run jobs, at most `count`, one after the other, numbered from `number`; its exit code if it died, else None.

        A job is taken from `jobs`, and so composed, while the one before it is drawn.
        """
        try:
            self._began = True
            self._send(_Batch(count, number))
            waiting, out = iter(jobs), 0
            while True:
                while out < AHEAD and (job := next(waiting, None)) is not None:
                    self._send(job)
                    out += 1
                if not out:
                    self._send(_BatchEnd())
                    return None
                message = self._next()
                if message is None:
                    return self._child.wait()
                if isinstance(message, _JobEnded):
                    out -= 1
                else:
                    self._hear(message)
        except BaseException:
            self.stop()
            raise

    def call(self, hook: str, *given: Any) -> None:
        """Let it call one of the task's hooks, after its jobs; the result is `answer`'s."""
        self._began = True
        self._send(_Call(hook, given))

    def answer(self) -> Any:
        """What the hook returned. Raises what it raised; Ended if the child died under it."""
        try:
            while not isinstance(message := self._next(), _Answer):
                if message is None:
                    raise Ended(self._child.wait())
                self._hear(message)
        except Ended:
            raise
        except BaseException:
            self.stop()
            raise
        if message.error is not None:
            raise message.error
        return message.value

    def close(self) -> None:
        """Let it end; what it drew is drawn. One that has nothing to do yet is not waited for."""
        if not self._began:
            self._child.kill()
        self._outbox.put(None)
        try:
            self._child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.stop()

    def stop(self) -> None:
        """Ask it to end now, see to it, and hear what it still says."""
        self._child.terminate()
        watch = threading.Timer(GRACE_SECONDS, self._child.kill)
        watch.start()
        try:
            while (message := self._next()) is not None:
                if not isinstance(message, _Answer | _JobEnded):
                    self._hear(message)
            self._child.wait()
        finally:
            watch.cancel()

    def _next(self) -> Any:
        """The next message; None when the child is gone and has said all."""
        while True:
            try:
                return self._inbox.get(timeout=1.0)
            except queue.Empty:
                if self._child.poll() is not None:  # what it forked may hold the pipe open
                    return None

    def _send(self, message: Any) -> None:
        self._outbox.put(cloudpickle.dumps(message))


def _read(pipe: BinaryIO, box: queue.SimpleQueue[Any]) -> None:
    """Messages from a pipe; None at its end. One that a kill cut short is no message."""
    while len(head := pipe.read(8)) == 8:
        (length,) = struct.unpack("<Q", head)
        if len(body := pipe.read(length)) < length:
            break
        box.put(pickle.loads(body))
    box.put(None)


def _write(pipe: BinaryIO, box: queue.SimpleQueue[bytes | None]) -> None:
    """Messages to a pipe, until None; a reader that died is noticed where its answers are missing."""
    try:
        while (body := box.get()) is not None:
            _put(pipe, body)
        pipe.close()
    except BrokenPipeError:
        pass


def _put(pipe: BinaryIO, body: bytes) -> None:
    pipe.write(struct.pack("<Q", len(body)) + body)
    pipe.flush()


# --- the child ------------------------------------------------------------------------------------------------


class _Jobs(Sequence[list[str]]):
    """A batch as the basic launcher walks it: each job is told when the next is asked for."""

    def __init__(self, batch: _Batch, inbox: queue.SimpleQueue[Any], send: Callable[[Any], None]) -> None:
        self._batch, self._inbox, self._send = batch, inbox, send
        self.config: DictConfig | None = None
        """Of the job that was handed out last."""

    def __len__(self) -> int:
        return self._batch.count

    def __getitem__(self, index: Any) -> Any:
        raise TypeError("Jobs come one after the other.")

    def __iter__(self) -> Iterator[list[str]]:
        while not isinstance(job := self._inbox.get(), _BatchEnd):
            if job is None:  # the parent is gone
                sys.exit(0)
            overrides, self.config = job
            yield overrides
            self._send(_JobEnded())


class _Handed:
    """Stands for Hydra's config loader: gives what the parent composed by the real one."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.jobs: _Jobs | None = None

    def load_sweep_config(self, master: DictConfig, overrides: list[str]) -> DictConfig:
        assert self.jobs is not None
        assert self.jobs.config is not None
        return self.jobs.config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def main() -> None:
    """The child: python -m hydra_plugins.ambergrade_sweeper._apart FD, messages from stdin, reports to FD."""
    answers = os.fdopen(int(sys.argv[1]), "wb")
    os.set_inheritable(answers.fileno(), False)
    questions = os.fdopen(os.dup(sys.stdin.fileno()), "rb")  # sys.stdin, held by a thread, aborts Python's shutdown
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(questions, inbox), daemon=True).start()
    code = 0
    try:
        _serve(inbox, lambda message: _put(answers, cloudpickle.dumps(message)))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # all is said and written; to take torch down piece by piece takes seconds


def _serve(inbox: queue.SimpleQueue[Any], send: Callable[[Any], None]) -> None:
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    if (setup := inbox.get()) is None:
        return
    context, task, config, state = setup
    Singleton.set_state(state)
    _reports.send = send
    if task.owner is not None:
        _lifeline.follow(task.owner)
    if hasattr(task.task, "prepares"):
        with suppress(Exception):  # the first point meets it again, and there it is told
            task.task.prepares(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
    launcher, loader = BasicLauncher(), _Handed(context.config_loader)
    stand_in = cast(ConfigLoader, loader)
    launcher.setup(hydra_context=HydraContext(stand_in, context.callbacks), task_function=task, config=config)
    while (message := inbox.get()) is not None:
        if isinstance(message, _Batch):
            loader.jobs = _Jobs(message, inbox, send)
            launcher.launch(loader.jobs, initial_job_idx=message.number)
        else:
            send(_called(task.task, message))


def _called(task: Any, call: _Call) -> _Answer:
    try:
        answer = _Answer(getattr(task.sweep(), call.name)(*call.given))
        cloudpickle.dumps(answer)
    except Exception as error:
        return _Answer(None, _sendable(error))
    return answer


def _sendable(error: Exception) -> Exception:
    """The error, or one that says the same where it cannot be pickled."""
    try:
        pickle.loads(cloudpickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


if __name__ == "__main__":
    from hydra_plugins.ambergrade_sweeper import _apart  # under its own name, by which messages know their classes

    _apart.main()
