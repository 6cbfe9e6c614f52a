"""Opens MLflow's own UI on the local record: `python -m ambergrade.track.ui [--root DIR] [--port N]` (make ui)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlencode

BASE = "http://127.0.0.1:5000"
VIEW_TAG = "mlflow.sharedViewState."


def ui_command(root: Path) -> str:
    """The command that opens the UI, for the closing lines of a pipeline; `root` holds `mlruns/`."""
    return "make ui" if root.resolve() == Path.cwd() else f"python -m ambergrade.track.ui --root {root}"


def deep_link(experiment_id: str, *, view: str = "", chart: bool = False, base: str = BASE) -> str:
    """A link to an experiment's runs, in a saved view (`Run.view`), as a table or as charts and pictures side by side.

    A link without `workflowType` opens on a page for chat agents, where a sweep is nowhere to be seen.
    """
    facets = {"workflowType": "machine_learning"}
    facets |= {"viewStateShareKey": view} if view else {}
    facets |= {"compareRunsMode": "CHART"} if chart else {}
    return f"{base}/#/experiments/{experiment_id}/runs?{urlencode(facets)}"


def view_state(
    *, parent: str, kind: str, order_by: str, ascending: bool, params: Sequence[str], metrics: Sequence[str]
) -> str:
    """The JSON by which MLflow's UI keeps a shared view: the children of a run, flat and sorted, with chosen columns.

    Sorted by a metric MLflow shows children as rows of their own; sorted by time it folds them into the parent. Read
    from MLflow 3.17's ExperimentPageUIState and ExperimentPageSearchFacetsState; keys it does not know are passed over.
    """
    state = {
        "searchFilter": f"tags.mlflow.parentRunId = '{parent}' and tags.ag.kind = '{kind}'",
        "orderByKey": f"metrics.`{order_by}`",
        "orderByAsc": ascending,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": [],
        "selectedColumns": [f"params.`{name}`" for name in params] + [f"metrics.`{name}`" for name in metrics],
        "runsHiddenMode": "FIRST_10_RUNS",  # charts of pictures take ten runs at most
    }
    return json.dumps(state, sort_keys=True)


def run_link(experiment_id: str, run_id: str, base: str = BASE) -> str:
    """A link to one run's page."""
    return f"{base}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def main() -> None:
    """Print the links, then become MLflow's server."""
    parser = argparse.ArgumentParser(prog="python -m ambergrade.track.ui", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the folder that holds mlruns/")
    parser.add_argument("--port", type=int, default=5000)
    asked = parser.parse_args()
    from ambergrade.track.database import artifact_root, database_file, open_client, tracking_uri

    uri = tracking_uri(asked.root)
    file, artifacts = database_file(uri), artifact_root(uri, asked.root)
    if file is None or artifacts is None:
        sys.exit(f"MLFLOW_TRACKING_URI is {uri}: open that in a browser, or unset it to see {asked.root}/mlruns.")
    if not file.exists():
        sys.exit(f"There is no record at {file}.\nMake one by `make demo`, or name its folder by --root.")
    base = f"http://127.0.0.1:{asked.port}"
    for experiment in open_client(uri).search_experiments(filter_string="name != 'Default'"):
        print(f"{experiment.name}\n  {'all runs':<20} {deep_link(experiment.experiment_id, base=base)}")
        for key in sorted(experiment.tags):
            if key.startswith(VIEW_TAG):
                view = key.removeprefix(VIEW_TAG)
                print(f"  {view:<20} {deep_link(experiment.experiment_id, view=view, base=base)}", flush=True)
    server = ["--backend-store-uri", uri, "--default-artifact-root", artifacts, "--no-serve-artifacts"]
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # a job runner that nothing here uses
    os.execv(
        sys.executable,
        [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            *server,
            "--host",
            "127.0.0.1",
            "--port",
            str(asked.port),
            "--workers",
            "1",
        ],
    )


if __name__ == "__main__":
    main()
