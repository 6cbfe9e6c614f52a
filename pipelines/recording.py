"""What every parent run keeps of the command that made it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig

from ambergrade.track.journal import Run


def record(run: Run, settings: Mapping[str, Any]) -> None:
    """The resolved configuration, the overrides as typed, the code's uncommitted changes, the lock and the hardware."""
    if not run.done:
        run.provenance(settings, overrides())


def overrides() -> list[str]:
    """The command line's overrides, without Hydra's own settings."""
    if HydraConfig.initialized():
        return [str(line) for line in HydraConfig.get().overrides.task]
    # the parent of a sweep, before its first job
    given = [word for word in sys.argv[1:] if ("=" in word or word.startswith("~")) and not word.startswith("-")]
    return [word for word in given if not word.lstrip("+~").startswith("hydra")]
