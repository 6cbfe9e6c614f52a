"""Opens MLflow's own UI on the local record: `python -m ambergrade.track.ui [--root DIR] [--port N]` (make ui)."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from urllib.parse import quote

BASE = "http://127.0.0.1:5000"


def ui_command(root: Path) -> str:
    """The command that opens the UI, for the closing lines of a pipeline; `root` holds `mlruns/`."""
    return "make ui" if root.resolve() == Path.cwd() else f"python -m ambergrade.track.ui --root {root}"


def deep_link(
    experiment_id: str,
    *,
    parent: str = "",
    kind: str = "",
    order_by: str = "",
    ascending: bool = False,
    chart: bool = False,
    base: str = BASE,
) -> str:
    """A link to the experiment's runs as a flat, sorted table, or as charts and pictures side by side.

    parent: MLflow's id of the run whose children are shown; kind: `point`, `train`, …; order_by: a metric's name.
    Without an order MLflow folds children into their parents; a plain link opens on its page for chat agents.
    """
    conditions = [f"tags.mlflow.parentRunId = '{parent}'"] if parent else []
    conditions += [f"tags.ag.kind = '{kind}'"] if kind else []
    facets = {
        "workflowType": "machine_learning",
        "searchFilter": " and ".join(conditions),
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "modelVersionFilter": "All Runs",
        "datasetsFilter": "W10=",  # an empty list, base64
    }
    if order_by:
        facets |= {"orderByKey": f"metrics.`{order_by}`", "orderByAsc": json.dumps(ascending)}
    if chart:
        facets["compareRunsMode"] = "CHART"
    query = "&".join(f"{key}={quote(value, safe='')}" for key, value in facets.items() if value)
    return f"{base}/#/experiments/{experiment_id}/runs?{query}"


def run_link(experiment_id: str, run_id: str, base: str = BASE) -> str:
    """A link to one run's page."""
    return f"{base}/#/experiments/{experiment_id}/runs/{run_id}"


def main() -> None:
    """Print the links, then become MLflow's server."""
    parser = argparse.ArgumentParser(prog="python -m ambergrade.track.ui", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the folder that holds mlruns/")
    parser.add_argument("--port", type=int, default=5000)
    asked = parser.parse_args()
    from ambergrade.track.database import artifact_root, database_file, open_client, tracking_uri

    uri = tracking_uri(asked.root)
    file, artifacts = database_file(uri), artifact_root(uri)
    if file is None or artifacts is None:
        sys.exit(f"MLFLOW_TRACKING_URI is {uri}: open that in a browser, or unset it to see {asked.root}/mlruns.")
    if not file.exists():
        sys.exit(f"There is no record at {file}.\nMake one by `make demo`, or name its folder by --root.")
    base = f"http://127.0.0.1:{asked.port}"
    for experiment in open_client(uri).search_experiments(filter_string="name != 'Default'"):
        print(f"{experiment.name:<24}{deep_link(experiment.experiment_id, base=base)}", flush=True)
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
