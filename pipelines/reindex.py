"""Make a lost MLflow database anew from the records; what MLflow has already is left alone.

Examples:
    python pipelines/reindex.py                        after mlruns/mlflow.db was lost (move a damaged one away)
    python pipelines/reindex.py root=DIR
    MLFLOW_TRACKING_URI=http://host:5000 python pipelines/reindex.py      a local record moves to a server
"""

from ambergrade.chain.settings import Invocation, ReindexSettings
from ambergrade.door.main import pipeline


@pipeline("reindex")
def main(settings: ReindexSettings, invocation: Invocation) -> None:
    from ambergrade.chain import reindex

    reindex.run(settings)


if __name__ == "__main__":
    main()
