"""The search of a command line that sweeps over nothing."""

from __future__ import annotations

from typing import Any


class Single:
    """A sweep over nothing: the configuration as it is, once."""

    objective = ""
    higher_is_better = True

    def __init__(self) -> None:
        self._left = True
        self._score: float | None = None

    def __len__(self) -> int:
        return 1

    def ask(self) -> dict[str, Any] | None:
        left, self._left = self._left, False
        return {} if left else None

    def tell(self, point: Any, score: float) -> None:
        self._score = score

    def recall(self, point: Any, score: float) -> None:
        self._left = False
        self.tell(point, score)

    def retry(self, point: Any) -> None:
        pass

    @property
    def best(self) -> tuple[dict[str, Any], float] | None:
        return None if self._score is None else ({}, self._score)
