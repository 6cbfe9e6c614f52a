"""Ends a launcher's worker with the command that started it. A light module: a worker imports it before all else."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from functools import lru_cache

from ambergrade.track import process

GRACE_SECONDS = 10.0
"""A worker that is asked to end by SIGTERM closes its runs in this time, or is killed."""
LOOK_SECONDS = 0.3


def follow(owner: Mapping[str, str]) -> None:
    """End this process soon after its owner; a process on another machine cannot be followed and is left alone."""
    if dict(owner) != process.owner():
        _follow(json.dumps(dict(owner)))


@lru_cache
def _follow(owner: str) -> None:
    """Once a process and owner."""
    threading.Thread(target=_end_with, args=(json.loads(owner),), daemon=True).start()


def _end_with(owner: dict[str, str]) -> None:
    while not process.is_dead(owner):
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)  # open runs are closed, where there are some
    time.sleep(GRACE_SECONDS)
    os._exit(1)
