"""Sweep over a merge: each point merged live, scored on the same prompts and seeds; the winner set at the end.

The same command again continues: finished points are kept, failed ones tried anew.

Examples:
    python pipelines/sweep.py --multirun coefficients.a=0.6,0.8,1.0 coefficients.b=0.25,0.5 models.base7=FILE
    python pipelines/sweep.py --multirun search=tpe search.trials=40 'coefficients.a=interval(0,1.6)' models.base7=FILE
    python pipelines/sweep.py --multirun coefficients.a=0.6,0.8,1.0 race=[12,24,40] models.base7=FILE
    python pipelines/sweep.py --multirun coefficients.a=0.6,0.8 dry=true models.base7=FILE     what it would cost
    python pipelines/sweep.py --multirun coefficients.a=0.6,0.8 'why="a 0.8"' models.base7=FILE
    python pipelines/sweep.py --multirun coefficients.a=0.6,0.8 hydra/launcher=joblib hydra.launcher.n_jobs=2
"""

from __future__ import annotations

import gc
import logging
import sys
from typing import Any

from ambergrade import config


def point(cfg: Any) -> dict[str, Any]:
    """One point, in whatever process the launcher chose."""
    return room().point(config.plain(cfg))


def room() -> Any:
    """The pipeline's code; a launcher's worker does not know this folder."""
    logging.getLogger().setLevel(logging.WARNING)  # Hydra lets every library's INFO through
    folder = str(config.REPOSITORY / "pipelines")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import sweeping

    return sweeping


def prepares(cfg: Any) -> None:
    """In a process that will draw points, before the first."""
    config.limit_threads(cfg)  # before numpy is imported
    room().prepares(config.plain(cfg))


point.sweep = room  # type: ignore[attr-defined]  # what our sweeper runs around the points, in the parent
point.prepares = prepares  # type: ignore[attr-defined]
main = config.main("sweep")(point)

if __name__ == "__main__":
    main()
    gc.freeze()  # on its way out Python would look for garbage among all of MLflow, for a second
