"""Reads the registered model's versions and decides which is its champion: an alias that only passed gates move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ambergrade.track.lines import local_path

if TYPE_CHECKING:
    from ambergrade.track.database import MlflowClient, entities

CHAMPION = "champion"
BEFORE = "champion.before"
"""Tag of a version: the champion that it replaced."""
ENTRY = "ag.entry"
"""Tag of a version: digest of how it was entered; the same weights may be entered in several ways."""
LONGEST = 5000  # characters of a version's tag; MLflow's limit


@dataclass(frozen=True)
class Version:
    """One version of a registered model."""

    number: int
    digest: str
    """sha256 of the weights."""
    tags: Mapping[str, str]
    path: Path | None
    """Its checkpoint; None where that cannot be found any more."""


def version(client: MlflowClient, name: str, digest: str, number: int | None = None) -> Version | None:
    """Return the version with these weights: the one of this number, else the latest."""
    found = [one for one in _versions(client, name) if one.digest == digest]
    return max(found, key=lambda one: (one.number == number, one.number), default=None)


def champion(client: MlflowClient, name: str) -> Version | None:
    """Return the version that the alias `champion` points to."""
    held = _aliases(client, name).get(CHAMPION)
    return next((one for one in _versions(client, name) if one.number == held), None)


def rival(client: MlflowClient, name: str, digest: str) -> Version | None:
    """Return the version that a candidate is measured against: the champion, or what the champion replaced.

    The latter where the champion has the candidate's weights: gates that are asked again compare what they compared
    before.
    """
    held, known = champion(client, name), {str(one.number): one for one in _versions(client, name)}
    while held is not None and held.digest == digest:
        held = known.pop(held.tags.get(BEFORE, ""), None)
    return held


def decide(
    client: MlflowClient, name: str, digest: str, gates: Mapping[str, tuple[bool, str]], number: int | None = None
) -> str:
    """Write the gates' results on the version, move `champion` by them, and return what became of the champion.

    A version whose gates all pass becomes champion, unless the champion is a later version. A champion whose gates do
    not pass any more (a person's veto, stricter gates) hands back to the version that it replaced, if that one's gates
    passed, or leaves the place empty. Without any gate nothing is moved.
    """
    judged = version(client, name, digest, number)
    if judged is None:
        return "not registered, so no champion"
    here = str(judged.number)
    said = results(gates)
    for tag, value in said.items():
        if judged.tags.get(tag) != value:
            client.set_model_version_tag(name, here, tag, value)
    for tag in judged.tags:
        if tag.startswith("gate.") and tag not in said:
            client.delete_model_version_tag(name, here, tag)
    held = champion(client, name)
    passed = bool(gates) and all(passed for passed, _ in gates.values())
    if passed and (held is None or held.number < judged.number):
        if held is not None:
            client.set_model_version_tag(name, here, BEFORE, str(held.number))
        client.set_registered_model_alias(name, CHAMPION, here)
        return f"version {here} is the champion now" + (f", before it was version {held.number}" if held else "")
    if held is None:
        return "there is no champion"
    if held.number != judged.number:
        return f"version {held.number} stays the champion"
    if passed:
        return f"version {here} is the champion"
    before = judged.tags.get(BEFORE)
    if before and any(one.number == int(before) and _passed(one) for one in _versions(client, name)):
        client.set_registered_model_alias(name, CHAMPION, before)
        return f"version {here} is the champion no more, version {before} is again"
    client.delete_registered_model_alias(name, CHAMPION)
    return f"version {here} is the champion no more; there is none"


def results(gates: Mapping[str, tuple[bool, str]]) -> dict[str, str]:
    """Return gates' results as a version's tags."""
    return {
        f"gate.{gate}": f"{'pass' if passed else 'fail'}: {told}"[:LONGEST] for gate, (passed, told) in gates.items()
    }


def by_people(tags: Mapping[str, str]) -> dict[str, str]:
    """Return a version's tags that no code of this house writes: what people said."""
    ours = {"sha256", "uri", BEFORE, ENTRY}
    return {tag: value for tag, value in tags.items() if tag not in ours and not tag.startswith(("gate.", "mlflow."))}


def checkpoint(found: entities.model_registry.ModelVersion) -> Path | None:
    """Return the file behind a version: among the model's own files, or, if a server keeps those, where it was."""
    folder = local_path(found.source)
    files = [] if folder is None else sorted(folder.glob("*.safetensors"))
    if files:  # names of the same weights
        return files[0]
    path = local_path(found.tags.get("uri", "none:"))
    return path if path is not None and path.is_file() else None


def _versions(client: MlflowClient, name: str) -> list[Version]:
    return [
        Version(int(found.version), found.tags.get("sha256", ""), dict(found.tags), checkpoint(found))
        for found in client.search_model_versions(f"name = '{name}'")
    ]


def _aliases(client: MlflowClient, name: str) -> dict[str, int]:
    found = client.search_registered_models(f"name = '{name}'")
    return {alias: int(number) for alias, number in found[0].aliases.items()} if found else {}


def _passed(judged: Version) -> bool:
    said = [value for tag, value in judged.tags.items() if tag.startswith("gate.")]
    return bool(said) and all(value.startswith("pass") for value in said)
