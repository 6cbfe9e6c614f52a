"""Finds things in MLflow: the checkpoint behind a `models:/name@alias`, and a run by one of its tags."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ambergrade.errors import BadSetting, MissingObject, UnknownName
from ambergrade.track.database import MlflowException, failures, open_client, tracking_uri
from ambergrade.track.registry import checkpoint


def registered_checkpoint(root: Path, uri: str) -> Path:
    """The file that a registered model's version links to.

    Raises BadSetting for another kind of URI, UnknownName for a model that is not registered, MissingObject where its
    file is gone.
    """
    parts = re.fullmatch(r"models:/([^@/]+)(?:@([\w-]+)|/(\d+))", uri)
    if not parts:
        raise BadSetting(f"'{uri}' names no model.\nWrite models:/<name>@<alias> or models:/<name>/<version>.")
    name, alias, number = parts.groups()
    client = open_client(tracking_uri(root))
    known = [model.name for model in client.search_registered_models()]
    if name not in known:
        raise UnknownName("Registered model", name, known)
    try:
        found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, number)
    except MlflowException as error:
        raise MissingObject(f"{uri}: {str(error).splitlines()[0]}") from error
    path = checkpoint(found)
    if path is None:
        raise MissingObject(f"{uri} stands for {found.source}, where its checkpoint is not.\nGive the file's path.")
    return path


@dataclass(frozen=True)
class KnownRun:
    """A run as `Journal.attached` takes it, and its experiment."""

    experiment: str
    id: str
    name: str
    key: str


def run_tagged(root: Path, tag: str, value: str) -> KnownRun | None:
    """Return the newest finished run of any experiment that bears a tag; None where there is none, or no MLflow."""
    try:
        client = open_client(tracking_uri(root))
        names = {one.experiment_id: one.name for one in client.search_experiments()}
        condition = f"tags.\"{tag}\" = '{value}' and attributes.status = 'FINISHED'"
        newest = ["attributes.start_time DESC"]
        found = client.search_runs(list(names), condition, order_by=newest, max_results=1) if names else []
    except failures():
        return None
    return next(
        (
            KnownRun(
                names[run.info.experiment_id], run.info.run_id, run.info.run_name or "", run.data.tags.get("ag.key", "")
            )
            for run in found
        ),
        None,
    )
