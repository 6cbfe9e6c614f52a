"""A worker ends with the command that started it, whichever launcher put it on this machine.

A launcher's workers outlive a killed parent (loky's by minutes, submitit's by design) and would go on drawing while the
same command, given again, draws the same points.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import FrameType

from ambergrade.track import process

GRACE_SECONDS = 10.0
"""A worker that is asked to end by SIGTERM closes its runs in this time, or is killed."""
LOOK_SECONDS = 0.3

_followed: set[str] = set()


def owner() -> dict[str, str]:
    """This process, told so that another can see whether it still lives."""
    return process.owner()


def follow(owner: Mapping[str, str]) -> None:
    """End this process soon after its owner; a process on another machine cannot be followed and is left alone."""
    key = " ".join(owner.values())
    if owner == process.owner() or key in _followed:
        return
    _followed.add(key)
    threading.Thread(target=_leave_with, args=(dict(owner),), daemon=True).start()


def hand_to(launcher: object, owner: Mapping[str, str]) -> None:
    """Let joblib's workers follow from their first moment: one that never got a job would wait for five minutes."""
    settings = getattr(launcher, "joblib", None)
    if isinstance(settings, dict):
        settings |= {"initializer": follow, "initargs": (dict(owner),)}


@contextmanager
def hears_sigterm(launcher: object) -> Iterator[None]:
    """Start Ray where it is the launcher, and take SIGTERM back from it.

    Its own handler aborts, so that runs stay open; and what ours raises it turns into an exit of another code.
    """
    if type(launcher).__name__ != "RayLauncher":
        yield
        return
    settings, ours = launcher.ray_cfg.init, signal.getsignal(signal.SIGTERM)  # type: ignore[attr-defined]
    settings.setdefault("object_store_memory", 75 << 20)  # bytes: Ray's least, as its launcher sets it
    import_module("hydra_plugins.hydra_ray_launcher._launcher_util").start_ray(settings)
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        assert callable(ours)
        ours(number, frame)

    signal.signal(signal.SIGTERM, hear if callable(ours) else ours)
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as error:
        import_module("ray").shutdown()  # its workers go now, so that their runs can be closed
        if heard:
            raise process.Terminated(128 + heard[0]) from error
        raise
    finally:
        signal.signal(signal.SIGTERM, ours)


def _leave_with(owner: dict[str, str]) -> None:
    while not process.is_dead(owner):
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)  # open runs are closed, where there are some
    time.sleep(GRACE_SECONDS)
    os._exit(1)
