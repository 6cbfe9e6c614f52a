"""Tells which process owns a run and whether it still lives, and turns SIGTERM into an exception."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

import psutil

SAME_BIRTH_SECONDS = 2.0
"""The system tells a process's start to about this much."""


class Terminated(SystemExit):
    """SIGTERM, raised where the program stood, so that open runs end as FAILED before it exits with 143."""


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into Terminated inside the block, unless the program has a handler of its own.

    By default SIGTERM ends Python on the spot and leaves its runs RUNNING for ever. A second SIGTERM still does.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Terminated(128 + number)

    ours = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if ours:
        signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def owner() -> dict[str, str]:
    """Return tags that tell this process from every other, also after its id is used again: host, id, start."""
    return {"ag.host": socket.gethostname(), "ag.process": f"{os.getpid()} {psutil.Process().create_time():.2f}"}


def is_dead(tags: Mapping[str, str]) -> bool:
    """Tell whether the owner in `tags` ran on this host and is gone; False where that cannot be known."""
    if tags.get("ag.host") != socket.gethostname() or "ag.process" not in tags:
        return False
    number, *birth = tags["ag.process"].split()
    try:
        found = psutil.Process(int(number))
        started, status = found.create_time(), found.status()
    except psutil.NoSuchProcess:
        return True
    except psutil.AccessDenied:
        return False
    if len(birth) != 1:  # written by an earlier version, which counted clock ticks
        return bool(status == psutil.STATUS_ZOMBIE)
    return bool(status == psutil.STATUS_ZOMBIE or abs(started - float(birth[0])) > SAME_BIRTH_SECONDS)
