"""Booru data before training: manifests, lint, captions and why they read as they do.

Examples:
    python pipelines/data.py action=captions database=FILE captions=kohaku-2024-01 out=FILE.jsonl
    python pipelines/data.py action=explain id=5000123 database=FILE captions=kohaku-2024-01
    python pipelines/data.py action=lint database=FILE pictures=FOLDER out=FOLDER
    python pipelines/data.py action=lint database=null pictures=FOLDER out=FOLDER       pictures without a database
    python pipelines/data.py action=build database=FILE pictures=FOLDER data.selection.score_min=10 out=FOLDER
    python pipelines/data.py action=percentiles database=FILE percentiles.metric=fav_count
    python pipelines/data.py action=lint data=world family=sdxl_tiny                    the embedded world
"""

from __future__ import annotations

from typing import Any

from ambergrade import config
from ambergrade.errors import UnknownName

ACTIONS = ("build", "lint", "explain", "captions", "percentiles")


@config.main("data")
def main(cfg: Any) -> None:
    settings = config.plain(cfg)
    if settings["action"] not in ACTIONS:
        raise UnknownName("action", settings["action"], ACTIONS)
    import curating

    curating.run(settings)


if __name__ == "__main__":
    main()
