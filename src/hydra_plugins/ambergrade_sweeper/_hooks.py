"""What the sweeper and a pipeline tell each other: the sweep as it stands, and the code around its points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from omegaconf import DictConfig

from ambergrade.search.load import Search
from ambergrade.search.racing import Race
from hydra_plugins.ambergrade_sweeper._apart import Worker
from hydra_plugins.ambergrade_sweeper._outcomes import Trial
from hydra_plugins.ambergrade_sweeper._plan import Plan


@dataclass
class Sweep:
    """What a pipeline is told of the sweep around its points."""

    key: str
    folder: Path
    search: Search
    plan: Plan
    trials: list[Trial] = field(default_factory=list)
    race: Race | None = None
    around: Any = None
    """What the hook `opens` yielded."""
    composed: Any = None
    """A trial's whole configuration, by its trial."""
    worker: Worker | None = None
    """The process of its own that drew the points, if they had one: `call` and `answer` run a hook there."""


class Hooks(Protocol):
    """What a task may offer as `task.sweep()`: code in the parent process around the points.

    And as `task.prepares(cfg)` what a process of ours that draws may do before its first point: import, read models.
    """

    def inputs(self, cfg: DictConfig) -> Mapping[str, str]:
        """Digests of the files behind the settings: others make another sweep."""

    def holds(self, cfg: DictConfig, value: Any) -> bool:
        """Whether what a finished point returned still stands for something: else it is drawn again."""

    def opens(self, cfg: DictConfig, sweep: Sweep) -> AbstractContextManager[Any]:
        """Entered before the first job and left after the last."""

    def previews(self, cfg: DictConfig) -> bool:
        """Whether to show the points by `preview` instead of drawing them."""

    def preview(self, sweep: Sweep, points: Sequence[tuple[Trial, DictConfig]]) -> None:
        """Print what each point would cost."""

    def hears(self, sweep: Sweep, message: Any) -> None:
        """What a point gave to `_reports.send`; None: its process is gone."""

    def judge(self, scores: Any, alive: Sequence[int], error: float, higher_is_better: bool) -> Sequence[int]:
        """Rows of scores (K points, P prompts) that cannot be told from the best (search/racing.py: Judge)."""

    def closes(self, cfg: DictConfig, sweep: Sweep) -> None:
        """After the last job, failures included."""
