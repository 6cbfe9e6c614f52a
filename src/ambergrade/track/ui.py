"""Opens MLflow's own UI on the local record: `ambergrade ui [--root DIR] [--port N]`, in a checkout `make ui`."""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlencode

from ambergrade.places import CHECKOUT

PORT = 5000
PORTS = 20
"""How many ports are tried, from the chosen one on."""
VIEW_TAG = "mlflow.sharedViewState."


def ui_command(root: Path) -> str:
    """Return what opens the UI, for the closing lines of a pipeline: a server's address, else the command.

    `root` holds `mlruns/`.
    """
    if _server():
        return base_url()
    return "make ui" if root.resolve() == Path.cwd() == CHECKOUT else f"ambergrade ui --root {root}"


def base_url() -> str:
    """Return the address that links begin with: the tracking server's if one is used, else that of the local UI."""
    return _server() or f"http://127.0.0.1:{PORT}"


def deep_link(experiment_id: str, *, view: str = "", chart: bool = False, base: str = "") -> str:
    """Return a link to an experiment's runs, in a saved view (`Run.view`), as a table, or as charts and pictures.

    A link without `workflowType` opens on a page for chat agents, where a sweep is nowhere to be seen.
    """
    facets = {"workflowType": "machine_learning"}
    facets |= {"viewStateShareKey": view} if view else {}
    facets |= {"compareRunsMode": "CHART"} if chart else {}
    return f"{base or base_url()}/#/experiments/{experiment_id}/runs?{urlencode(facets)}"


def run_link(experiment_id: str, run_id: str, base: str = "") -> str:
    """Return a link to one run's page."""
    return f"{base or base_url()}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"


def view_state(
    *, parent: str, kind: str, order_by: str, ascending: bool, params: Sequence[str], metrics: Sequence[str]
) -> str:
    """Return the JSON by which MLflow's UI keeps a shared view: a run's children, flat, sorted, with chosen columns.

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


def free_port(port: int) -> int:
    """Return the port, or the next one that is free. Ends the program where 20 in a row are taken."""
    for number in range(port, port + PORTS):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: one that ended is no bar
            try:
                probe.bind(("127.0.0.1", number))
            except OSError:
                continue
            return number
    sys.exit(f"The ports {port} to {port + PORTS - 1} are taken.\nChoose another by --port N.")


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the links, then become MLflow's server."""
    parser = argparse.ArgumentParser(prog="ambergrade ui", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="the folder that holds mlruns/")
    parser.add_argument("--port", type=int, default=PORT)
    asked = parser.parse_args(arguments)
    from ambergrade.track.database import artifact_root, database_file, open_client, tracking_uri

    if _server():
        sys.exit(f"The record is kept by a server: open {_server()} in a browser, or unset MLFLOW_TRACKING_URI.")
    uri = tracking_uri(asked.root)
    file = database_file(uri)
    if file is not None and not file.exists():
        sys.exit(f"There is no record at {file}.\nMake one by `make demo`, or name its folder by --root.")
    port = free_port(asked.port)
    if port != asked.port:
        print(f"Port {asked.port} is taken, so the UI is at {port}; links that a pipeline printed name {PORT}.")
    base = f"http://127.0.0.1:{port}"
    for experiment in open_client(uri).search_experiments(filter_string="name != 'Default'"):
        print(f"{experiment.name}\n  {'all runs':<20} {deep_link(experiment.experiment_id, base=base)}")
        for key in sorted(experiment.tags):
            if key.startswith(VIEW_TAG):
                view = key.removeprefix(VIEW_TAG)
                print(f"  {view:<20} {deep_link(experiment.experiment_id, view=view, base=base)}")
    sys.stdout.flush()
    artifacts = artifact_root(uri, asked.root) or ""
    store = ["--backend-store-uri", uri, "--default-artifact-root", artifacts, "--no-serve-artifacts"]
    place = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # a job runner that nothing here uses
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "server", *store, *place])


def _server() -> str:
    """Return the address of the tracking server in use, without user and password; "" for a database."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    return re.sub(r"//[^/]*@", "//", uri).rstrip("/") if uri.startswith(("http:", "https:")) else ""


if __name__ == "__main__":
    main()
