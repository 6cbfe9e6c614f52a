"""Checkpoints in MLflow by reference: entered by digest, linked and never copied, registered once."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambergrade.errors import BadSetting
from ambergrade.identity import digest as identity
from ambergrade.track import database
from ambergrade.track.lines import local_path
from ambergrade.track.registry import ENTRY

if TYPE_CHECKING:
    from ambergrade.track.database import MlflowClient, entities

log = logging.getLogger(__name__)


def find(client: MlflowClient, experiment_id: str, digest: str) -> entities.LoggedModel | None:
    """Return the model with these weights, from whatever run; None if there is none."""
    found = client.search_logged_models([experiment_id], f"tags.sha256 = '{digest}'", max_results=1)
    return found[0] if found else None


def enter(
    client: MlflowClient,
    experiment_id: str,
    name: str,
    digest: str,
    *,
    kind: str,
    run_id: str | None = None,
    tags: Mapping[str, Any] | None = None,
    params: Mapping[str, Any] | None = None,
) -> entities.LoggedModel:
    """Find the model with these weights, or make it as `mlflow.create_external_model` does, but by this client.

    `run_id` is the run that made it; None for what was given from outside.
    """
    model = find(client, experiment_id, digest)
    if model is None:
        every = {"mlflow.model.isExternal": True, "sha256": digest, **(tags or {})}
        model = client.create_logged_model(
            experiment_id,
            re.sub(r"[^\w\- ]", "_", name),
            run_id,
            {key: str(value) for key, value in every.items()},
            {key: str(value) for key, value in (params or {}).items()},
            kind,
        )
    if str(model.status) != "READY":  # new, or a kill came between
        from mlflow.models import Model

        about = {"artifact_path": model.artifact_location, "model_uuid": model.model_id, "model_id": model.model_id}
        with tempfile.TemporaryDirectory() as folder:
            description = Model(**about, run_id=model.source_run_id, metadata={"mlflow.model.isExternal": True})
            description.save(str(Path(folder) / "MLmodel"))
            client.log_model_artifacts(model.model_id, folder)
        model = client.finalize_logged_model(model.model_id, "READY")
    return model


def link(path: Path, name: str, artifact_location: str) -> None:
    """Show the checkpoint among the model's files by a hard link; on another filesystem its `uri` tag must do."""
    folder = local_path(artifact_location)
    if folder is None:
        return
    target = folder / f"{name}{path.suffix or '.safetensors'}"
    try:
        os.link(path, target)
    except FileExistsError:
        pass
    except OSError as error:
        log.info("%s is not linked to %s: %s", path, target, error)


def connect(client: MlflowClient, run_id: str, made: str, made_from: Sequence[str]) -> None:
    """Draw the edges models -> run -> model, each once: MLflow itself would draw them again."""
    run = client.get_run(run_id)
    if made not in {output.model_id for output in run.outputs.model_outputs}:
        client.log_outputs(run_id, [database.entities.LoggedModelOutput(made, step=0)])
    known = {used.model_id for used in run.inputs.model_inputs}
    new = [used for used in dict.fromkeys(made_from) if used not in known]
    if new:
        client.log_inputs(run_id, models=[database.entities.LoggedModelInput(used) for used in new])


def register(
    client: MlflowClient, model: entities.LoggedModel, run_id: str, path: Path, about: Mapping[str, Any]
) -> None:
    """Make the model a version of a registered model, once for each way in which it is entered, and set its aliases.

    about: what `Run.model` was told: the weights' digest, `registered_as`, and name, aliases, note, tags, parameters
    and parents, of which another value makes another version of the same weights.
    """
    name, note = about["registered_as"], about["note"]
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    ways = ("name", "digest", "aliases", "note", "tags", "params", "parents")
    tags = {
        "sha256": about["digest"],
        "uri": path.resolve().as_uri(),
        ENTRY: identity({way: about[way] for way in ways}),
    }
    version = next(
        (one for one in client.search_model_versions(f"name = '{name}'") if _is_entry(one, tags, note)), None
    )
    if version is None:
        # A models:/ source would be looked up by MLflow's global client, in whatever database that points to.
        version = client.create_model_version(name, model.artifact_location, run_id, tags, model_id=model.model_id)
    listed = json.loads(model.tags.get("mlflow.modelVersions", "[]"))  # by this tag the UI shows a model's versions
    here = {"name": name, "version": version.version}
    if here not in listed:
        client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": json.dumps([*listed, here])})
    if note and version.description != note:
        client.update_model_version(name, version.version, note)
    for alias in about["aliases"]:
        client.set_registered_model_alias(name, alias, version.version)


def _is_entry(version: entities.model_registry.ModelVersion, tags: Mapping[str, str], note: str) -> bool:
    """Tell whether a version was entered this way; one of an earlier version of this house is known by its note."""
    if version.tags.get("sha256") != tags["sha256"]:
        return False
    return bool(version.tags[ENTRY] == tags[ENTRY] if ENTRY in version.tags else version.description == note)


def check_aliases(aliases: Sequence[str]) -> None:
    """Raise BadSetting for an alias that MLflow would refuse."""
    for alias in aliases:
        if not re.fullmatch(r"[\w-]+", alias, re.ASCII) or re.fullmatch(r"latest|[vV]\d+", alias):
            raise BadSetting(f"MLflow takes no alias {alias!r}.\nUse letters, digits, - and _; not latest, not v<n>.")
