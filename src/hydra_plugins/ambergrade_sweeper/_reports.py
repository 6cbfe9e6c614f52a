"""What a job reports to the process that started it, where that one listens: the sweeper's own worker (`_apart`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

send: Callable[[Any], None] | None = None
"""Set in a worker of ours: takes anything that can be pickled, and keeps the order."""


@dataclass(frozen=True)
class Told:
    """A job's outcome, to be written once all that the job reported before is dealt with."""

    file: Path
    row: dict[str, Any]
