"""Where Hydra finds the sweeper: it executes each module here twice, but for those whose name begins with `_`."""

from hydra_plugins.ambergrade_sweeper._sweeper import AmbergradeSweeper

__all__ = ["AmbergradeSweeper"]
