"""The registered model's versions and who is its champion: an alias that only passed gates move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

if TYPE_CHECKING:
    from ambergrade.track.database import MlflowClient, entities

CHAMPION = "champion"
BEFORE = "champion.before"
"""Tag of a version: the champion that it replaced."""
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


def version(client: MlflowClient, name: str, digest: str) -> Version | None:
    """The version with these weights."""
    return next((one for one in _versions(client, name) if one.digest == digest), None)


def champion(client: MlflowClient, name: str) -> Version | None:
    """The version that the alias `champion` points to."""
    held = _aliases(client, name).get(CHAMPION)
    return next((one for one in _versions(client, name) if one.number == held), None)


def rival(client: MlflowClient, name: str, digest: str) -> Version | None:
    """Whom a candidate is measured against: the champion, or, once the candidate is that, the one it replaced.

    So gates that are asked again compare what they compared before.
    """
    held = champion(client, name)
    if held is None or held.digest != digest:
        return held
    return next((one for one in _versions(client, name) if str(one.number) == held.tags.get(BEFORE)), None)


def decide(client: MlflowClient, name: str, digest: str, gates: Mapping[str, tuple[bool, str]]) -> str:
    """Write what the gates said on the version, and move `champion` by it; returns what became of the champion.

    A version whose gates all pass becomes champion, unless the champion is a later version. A champion whose gates do
    not pass any more (a person's veto, stricter gates) hands back to the version that it replaced, if that one's gates
    passed, or leaves the place empty. Without any gate nothing is moved.
    """
    judged = version(client, name, digest)
    if judged is None:
        return "not registered, so no champion"
    number = str(judged.number)
    said = results(gates)
    for tag, value in said.items():
        if judged.tags.get(tag) != value:
            client.set_model_version_tag(name, number, tag, value)
    for tag in judged.tags:
        if tag.startswith("gate.") and tag not in said:
            client.delete_model_version_tag(name, number, tag)
    held = champion(client, name)
    passed = bool(gates) and all(passed for passed, _ in gates.values())
    if passed and (held is None or held.number < judged.number):
        if held is not None:
            client.set_model_version_tag(name, number, BEFORE, str(held.number))
        client.set_registered_model_alias(name, CHAMPION, number)
        return f"version {number} is the champion now" + (f", before it was version {held.number}" if held else "")
    if held is None:
        return "there is no champion"
    if held.number != judged.number:
        return f"version {held.number} stays the champion"
    if passed:
        return f"version {number} is the champion"
    before = judged.tags.get(BEFORE)
    if before and any(one.number == int(before) and _passed(one) for one in _versions(client, name)):
        client.set_registered_model_alias(name, CHAMPION, before)
        return f"version {number} is the champion no more, version {before} is again"
    client.delete_registered_model_alias(name, CHAMPION)
    return f"version {number} is the champion no more; there is none"


def results(gates: Mapping[str, tuple[bool, str]]) -> dict[str, str]:
    """What gates said as a version's tags."""
    return {
        f"gate.{gate}": f"{'pass' if passed else 'fail'}: {told}"[:LONGEST] for gate, (passed, told) in gates.items()
    }


def by_people(tags: Mapping[str, str]) -> dict[str, str]:
    """A version's tags that no code of this house writes: what people said."""
    ours = {"sha256", "uri", BEFORE}
    return {tag: value for tag, value in tags.items() if tag not in ours and not tag.startswith(("gate.", "mlflow."))}


def checkpoint(found: entities.model_registry.ModelVersion) -> Path | None:
    """The file behind a version: among the model's own files, or where it was entered, if a server keeps those."""
    source = urlparse(found.source)
    if source.scheme in ("", "file"):
        files = sorted(Path(unquote(source.path)).glob("*.safetensors"))
        if len(files) == 1:
            return files[0]
    entered = urlparse(found.tags.get("uri", ""))
    path = Path(unquote(entered.path))
    return path if entered.scheme == "file" and path.is_file() else None


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
