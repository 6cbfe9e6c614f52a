"""Who runs: the process that owns a run, and whether it still lives."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

BOOT_FILE = Path("/proc/sys/kernel/random/boot_id")


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
    """Tags that tell this process from every other, also after its id is used again."""
    return {"ag.host": socket.gethostname(), "ag.process": f"{os.getpid()} {_started(os.getpid())} {_boot()}"}


def is_dead(tags: dict[str, str]) -> bool:
    """True if the owner in `tags` ran on this host and is gone; False where that cannot be known."""
    if tags.get("ag.host") != socket.gethostname() or "ag.process" not in tags:
        return False
    pid, started, boot = tags["ag.process"].split(" ")
    if started and boot:
        return boot != _boot() or _started(int(pid)) != started
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _boot() -> str:
    return BOOT_FILE.read_text().strip() if BOOT_FILE.exists() else ""


def _started(pid: int) -> str:
    """When a process started, in clock ticks since boot (proc(5), field 22); "" where that is not told."""
    try:
        # The second field is the program's name in brackets and may hold spaces.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
