"""Make a lost MLflow database anew from the records; what MLflow has already is left alone.

Examples:
    python pipelines/reindex.py                        after mlruns/mlflow.db was lost (move a damaged one away)
    python pipelines/reindex.py root=DIR
    MLFLOW_TRACKING_URI=http://host:5000 python pipelines/reindex.py      a local record moves to a server
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ambergrade import config
from ambergrade.errors import MissingObject


@config.main("reindex")
def main(cfg: Any) -> None:
    settings = config.plain(cfg)
    root = Path(settings["root"])
    records = root / "mlruns" / "records"
    if not records.is_dir():
        raise MissingObject(f"There are no records at {records}.\nName the folder that holds mlruns/ by root=DIR.")
    print("reading …", flush=True)
    from ambergrade.track.rebuild import rebuild

    done = rebuild(root)
    print(f"{done.runs} runs and {done.models} models told again, {done.there} runs were there", end="")
    print(f", {done.from_records} from stages' records alone" if done.from_records else "")
    for line in done.missing:
        print(f"  not rebuilt: {line}")


if __name__ == "__main__":
    main()
