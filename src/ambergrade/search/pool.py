"""A pool of worker processes: each evaluates one job at a time and keeps what it loaded for the next.

Every slot is a `ProcessPoolExecutor` of one worker, so that a worker that dies fails the job it held and no other; the
slot then gets a new one. A worker ends with the process that started it, however that one ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from ambergrade.search.driver import Ended, Job, Outcome, attempt, ending

T = TypeVar("T")

GRACE_SECONDS = 10.0
"""A worker that is asked to end by SIGTERM closes its runs in this time, or is killed."""


class Pool(Generic[T]):
    """An evaluator (search/driver.py) over worker processes; they start with the first job, and end with `close`."""

    def __init__(self, evaluate: Callable[[T], object], payload: Callable[[Job], T], workers: int) -> None:
        """`payload`: made here of a job and sent to a worker, where `evaluate` gets it; both are pickled."""
        self._evaluate, self._payload = evaluate, payload
        self._slots: list[_Slot | None] = [None] * workers

    def __call__(self, jobs: Iterator[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Keep all slots busy; a job whose worker dies has failed."""
        running: dict[Future[Outcome], tuple[Job, int]] = {}
        free = list(reversed(range(len(self._slots))))
        more = True
        while True:
            while more and free:
                job = next(jobs, None)
                if job is None:
                    more = False
                elif isinstance(begun := self._begin(job, free[-1]), Outcome):
                    yield job, begun
                else:
                    running[begun] = (job, free.pop())
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job, number = running.pop(future)
                outcome = self._outcome(future, number)
                free.append(number)
                yield job, outcome

    def close(self) -> None:
        """End the workers."""
        slots, self._slots = [slot for slot in self._slots if slot], [None] * len(self._slots)
        for slot in slots:
            slot.ask_to_end()
        for slot in slots:
            slot.end()

    def __enter__(self) -> Pool[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, job: Job, number: int) -> Future[Outcome] | Outcome:
        made = attempt(self._payload, job)
        if not made.done:  # what cannot be composed
            return made
        slot = self._slots[number] = self._slots[number] or _Slot()
        try:
            return slot.submit(self._evaluate, made.value)
        except BrokenProcessPool:  # it died between two jobs: no job's fault
            slot.end()
            self._slots[number] = slot = _Slot()
            return slot.submit(self._evaluate, made.value)

    def _outcome(self, future: Future[Outcome], number: int) -> Outcome:
        try:
            return future.result()
        except BrokenProcessPool:
            slot, self._slots[number] = self._slots[number], None
            assert slot is not None
            return Outcome.of_error(Ended(ending(slot.end())))
        except Exception as error:  # what cannot be pickled, either way
            return Outcome.of_error(error)


class _Slot:
    """One worker process, started with its first job."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(1, mp_context=spawn, initializer=_follow_the_parent)
        self._process: multiprocessing.process.BaseProcess | None = None

    def submit(self, evaluate: Callable[[Any], object], work: object) -> Future[Outcome]:
        others = set(multiprocessing.active_children())
        future = self._executor.submit(_evaluated, evaluate, work)
        if self._process is None:  # it was started just now
            (self._process,) = set(multiprocessing.active_children()) - others
        return future

    def ask_to_end(self) -> None:
        if self._process is not None:
            self._process.terminate()

    def end(self) -> int:
        """See that it is gone; returns its exit code."""
        process = self._process
        if process is not None:
            process.join(GRACE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()
        self._executor.shutdown(wait=True, cancel_futures=True)
        return (process and process.exitcode) or 0


# --- in a worker ----------------------------------------------------------------------------------------------


def _evaluated(evaluate: Callable[[T], object], work: T) -> Outcome:
    try:
        return attempt(evaluate, work)
    except SystemExit as end:  # asked to end: its runs are closed by now
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)


def _follow_the_parent() -> None:
    tqdm.set_lock(threading.RLock())  # its own is shared by processes, and is reported as leaked when this one is ended
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)  # open runs are closed, where there are some
    time.sleep(GRACE_SECONDS)
    os._exit(1)
