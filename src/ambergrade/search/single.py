"""The search over nothing: the configuration as it is, once."""

from __future__ import annotations

from ambergrade.search.searches.grid import Grid


class Single(Grid):
    """Proposes one point without names."""

    def __init__(self, *, objective: str, higher_is_better: bool = True) -> None:
        self.objective, self.higher_is_better = objective, higher_is_better
        self._keep(({},))
