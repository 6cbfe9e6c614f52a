"""Makes a lost MLflow database anew from the records."""

from __future__ import annotations

from ambergrade.chain.settings import ReindexSettings
from ambergrade.errors import MissingObject
from ambergrade.track.rebuild import rebuild


def run(settings: ReindexSettings) -> None:
    """Tell MLflow what the records hold and it lacks, and print how much that was."""
    records = settings.root / "mlruns" / "records"
    if not records.is_dir():
        raise MissingObject(f"There are no records at {records}.\nName the folder that holds mlruns/ by root=DIR.")
    print("reading …", flush=True)
    done = rebuild(settings.root)
    print(f"{done.runs} runs and {done.models} models told again, {done.there} runs were there", end="")
    print(f", {done.from_records} from stages' records alone" if done.from_records else "")
    for line in done.missing:
        print(f"  not rebuilt: {line}")
