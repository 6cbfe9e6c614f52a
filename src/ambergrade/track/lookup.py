"""Finds the checkpoint behind a `models:/name@alias` or `models:/name/version` in the local record."""

from __future__ import annotations

import re
from pathlib import Path

from ambergrade.errors import BadSetting, MissingObject, UnknownName
from ambergrade.track.database import MlflowException, open_client, tracking_uri
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
