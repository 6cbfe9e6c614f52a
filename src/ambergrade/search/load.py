"""Finds a search by its name: one file in `searches/`, one search."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ambergrade.errors import UnknownName
from ambergrade.search.points import Point, Value


class Search(Protocol):
    """What every search answers to.

    `ask` may be called several times before the next `tell`: a batch is as many asks as there are slots. A search that
    was killed is made anew and hears by `recall` what the record holds; then it goes on, to the same total.
    """

    objective: str
    """Name of the metric whose score it wants to hear."""
    higher_is_better: bool

    def __len__(self) -> int:
        """How many points it proposes in all, recalled ones included."""

    def ask(self) -> Point | None:
        """The next point, one that was neither asked for nor recalled; None when there is none."""

    def tell(self, point: Mapping[str, Value], score: float) -> None:
        """Hear the score of a proposed point; NaN for one that could not be scored."""

    def recall(self, point: Mapping[str, Value], score: float) -> None:
        """Hear the score of a point of an earlier process, before the first `ask`. It counts, and is not asked again.

        A point that this search cannot propose (other values, other names) is passed over.
        """

    def retry(self, point: Mapping[str, Value]) -> None:
        """Hear of a point that an earlier process asked for and did not finish, after what it did finish.

        It is asked for as soon as possible, within the total.
        """

    @property
    def best(self) -> tuple[Point, float] | None:
        """The best scored point so far and its score."""


def search(name: str, **settings: Any) -> Search:
    """The search `searches/<name>.py` with its settings. Raises UnknownName for a name that is not there."""
    folder = Path(__file__).parent / "searches"
    known = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    if name not in known:
        raise UnknownName("search", name, known)
    made: Search = importlib.import_module(f"ambergrade.search.searches.{name}").Search(**settings)
    return made
