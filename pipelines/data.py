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

from ambergrade.chain.settings import DataPipelineSettings, Invocation
from ambergrade.door.main import pipeline


@pipeline("data")
def main(settings: DataPipelineSettings, invocation: Invocation) -> None:
    from ambergrade.chain import curation

    curation.run(settings, invocation)


if __name__ == "__main__":
    main()
