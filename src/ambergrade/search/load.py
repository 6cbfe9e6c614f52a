"""Finds a search by its name: one file in `searches/`, one search."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Protocol

from ambergrade.errors import UnknownName


class Search(Protocol):
    """What every search answers to."""

    objective: str
    """Name of the metric whose score it wants to hear."""
    higher_is_better: bool

    def __len__(self) -> int:
        """How many points it proposes in all."""

    def ask(self) -> dict[str, float] | None:
        """The next point, or None when there is none."""

    def tell(self, point: dict[str, float], score: float) -> None:
        """Hear the score of a proposed point; NaN for one that could not be scored."""

    @property
    def best(self) -> tuple[dict[str, float], float] | None:
        """The best scored point so far and its score."""


def search(name: str, **settings: Any) -> Search:
    """The search `searches/<name>.py` with its settings. Raises UnknownName for a name that is not there."""
    folder = Path(__file__).parent / "searches"
    known = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    if name not in known:
        raise UnknownName("search", name, known)
    made: Search = importlib.import_module(f"ambergrade.search.searches.{name}").Search(**settings)
    return made
