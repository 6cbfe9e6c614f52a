"""Lists what a release is made of as a CycloneDX 1.6 bill of materials: the model with its card, parents, packages.

Neither a serial number nor a time is in it, which the standard leaves open: the same release has the same bill. It is
written by hand since no kept library knows a model's card yet; the tests hold it against the standard's own schema.
"""

from __future__ import annotations

from typing import Any

from ambergrade.release.card import with_numbers
from ambergrade.release.facts import Parent, ReleaseFacts, Score
from ambergrade.release.licenses import License

MODEL = "model"
"""How the bill refers to the released model."""


def bill_of_materials(facts: ReleaseFacts) -> dict[str, Any]:
    """Return the bill as JSON values."""
    parents = {alias: _parent(alias, parent, facts) for alias, parent in sorted(facts.parents.items())}
    packages = [_package(name, version) for name, version in sorted(facts.environment.packages.items())]
    tool = _package("ambergrade", facts.environment.ambergrade) | {"type": "application"}
    refs = [part["bom-ref"] for part in (*parents.values(), tool)]
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": _model(facts)},
        "components": [*parents.values(), tool, *packages],
        "dependencies": [
            {"ref": MODEL, "dependsOn": sorted(refs)},
            {"ref": tool["bom-ref"], "dependsOn": sorted(part["bom-ref"] for part in packages)},
        ],
    }


def _model(facts: ReleaseFacts) -> dict[str, Any]:
    weights, evaluation = facts.weights, facts.evaluation
    told = {"formula": with_numbers(facts.recipe)} if facts.recipe else {"origin": "unknown"}
    told |= {"sha256 of the weights": weights.weights, **weights.listed, "pipeline": facts.pipeline}
    metrics = [
        _metric(name, score, f"{evaluation.prompts.name}, {evaluation.prompts.count} prompts")
        for name, row in sorted(evaluation.scores.items())
        if (score := row[evaluation.released]).value is not None
    ]
    parameters: dict[str, Any] = {"task": "text-to-image", "architectureFamily": "latent diffusion"}
    parameters["modelArchitecture"] = facts.architecture
    if facts.training is not None:
        captions = facts.training.captions
        named = {"type": "dataset", "name": f"captions {captions.recipe}, {captions.pictures} pictures"}
        parameters["datasets"] = [{**named, "contents": {"properties": [_property("manifest", captions.manifest)]}}]
    return {
        "type": "machine-learning-model",
        "bom-ref": MODEL,
        "name": facts.name,
        "version": facts.version,
        **({"description": facts.summary} if facts.summary else {}),
        **({"authors": [{"name": facts.author}]} if facts.author else {}),
        "hashes": [{"alg": "SHA-256", "content": weights.file}],
        "licenses": [_license(facts.license, facts.licenses[facts.license])],
        **({"pedigree": {"ancestors": _ancestors(facts)}} if facts.parents else {}),
        "modelCard": {"modelParameters": parameters, "quantitativeAnalysis": {"performanceMetrics": metrics}},
        "properties": [_property(name, text) for name, text in told.items()],
    }


def _parent(alias: str, parent: Parent, facts: ReleaseFacts) -> dict[str, Any]:
    origin = parent.origin
    uri = f"https://huggingface.co/{origin.hub}" if origin.hub else origin.url
    return {
        "type": "machine-learning-model",
        "bom-ref": f"parent:{alias}",
        "name": alias,
        **({"authors": [{"name": origin.author}]} if origin.author else {}),
        **({"hashes": [{"alg": "SHA-256", "content": parent.file}]} if parent.file else {}),
        "licenses": [_license(origin.license, facts.licenses[origin.license])],
        **({"externalReferences": [{"type": "distribution", "url": uri}]} if uri else {}),
        **({"properties": [_property("sha256 of the weights", parent.weights)]} if parent.weights else {}),
    }


def _ancestors(facts: ReleaseFacts) -> list[dict[str, Any]]:
    """The parents again, as what the model descends from."""
    rows = (_parent(alias, parent, facts) for alias, parent in sorted(facts.parents.items()))
    return [{key: value for key, value in row.items() if key != "bom-ref"} for row in rows]


def _package(name: str, version: str) -> dict[str, Any]:
    purl = f"pkg:pypi/{name}@{version}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": version, "purl": purl}


def _license(name: str, found: License) -> dict[str, Any]:
    if found.spdx:
        return {"license": {"id": found.spdx}}
    return {"license": {"name": found.title, **({"url": found.url} if found.url else {})}}


def _metric(name: str, score: Score, prompts: str) -> dict[str, Any]:
    found: dict[str, Any] = {"type": name, "value": repr(score.value), "slice": prompts}
    if score.low is not None and score.high is not None:
        found["confidenceInterval"] = {"lowerBound": repr(score.low), "upperBound": repr(score.high)}
    return found


def _property(name: str, value: str) -> dict[str, str]:
    return {"name": f"ambergrade:{name}", "value": value}
