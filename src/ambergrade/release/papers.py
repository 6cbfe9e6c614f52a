"""Derives a release's papers from its facts, so that whoever holds release.json can derive them again and compare.

README.md                the model card
recipe.yaml              the merge: `ambergrade merge recipe.yaml --models DIR`; none where nobody knows how it was made
evaluation.json          scores with intervals, scorers, winner set
training.json            the training of a parent: settings, base, captions; only where one was trained here
provenance.intoto.json   in-toto statement with a SLSA v1 predicate
bom.cdx.json             CycloneDX bill of materials
civitai.html             a description for sites that take HTML
requirements.txt         the packages that it was made with
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from ambergrade.release.bom import bill_of_materials
from ambergrade.release.card import card
from ambergrade.release.civitai import description
from ambergrade.release.facts import ReleaseFacts, as_json
from ambergrade.release.provenance import statement
from ambergrade.typed import plain


def papers(facts: ReleaseFacts) -> dict[str, str]:
    """Return every derived text of a release by its name in the folder. The same facts give the same bytes."""
    return {
        "README.md": card(facts),
        **({"recipe.yaml": recipe_yaml(recipe_values(facts))} if facts.recipe else {}),
        "evaluation.json": as_json(facts.evaluation),
        **({"training.json": as_json(facts.training)} if facts.training else {}),
        "provenance.intoto.json": as_json(statement(facts)),
        "bom.cdx.json": as_json(bill_of_materials(facts)),
        "civitai.html": description(facts),
        "requirements.txt": _requirements(facts),
    }


def recipe_values(facts: ReleaseFacts) -> dict[str, Any]:
    """Return the keys of recipe.yaml."""
    recipe, weights = facts.recipe, facts.weights
    assert recipe is not None
    values: dict[str, Any] = {
        "formula": recipe.formula,
        "coefficients": dict(recipe.coefficients),
        "dtype": recipe.dtype,
        "policies": dict(recipe.policies),
        "models": {alias: parent.digests for alias, parent in recipe.models.items()},
        "result": {
            "name": weights.name,
            "bytes": weights.bytes,
            "file": weights.file,
            "weights": weights.weights,
            "header": dict(weights.header),
        },
    }
    return values | ({"ancestors": plain(recipe.ancestors)} if recipe.ancestors else {})


def recipe_yaml(recipe: Mapping[str, Any]) -> str:
    """Write the recipe as YAML: the formula verbatim on top, then the other keys sorted."""
    formula = str(recipe["formula"]).strip()
    if all(line.isprintable() for line in formula.split("\n")):
        head = "formula: |\n  " + formula.replace("\n", "\n  ") + "\n"
    else:  # odd line breaks, which a block of text does not keep
        head = str(yaml.safe_dump({"formula": formula}, allow_unicode=True, width=120))
    rest = {key: value for key, value in recipe.items() if key != "formula"}
    return head + str(yaml.safe_dump(rest, sort_keys=True, allow_unicode=True, width=120))


def _requirements(facts: ReleaseFacts) -> str:
    made = facts.environment
    lines = [f"# {facts.name} {facts.version} was made with Python {made.python} and {made.isa} kernels."]
    if made.lock:
        lines.append(f"# Ambergrade's requirements.lock had the sha256 {made.lock}.")
    pins = {"ambergrade": made.ambergrade, **made.packages}
    return "\n".join([*lines, *(f"{name}=={version}" for name, version in sorted(pins.items()))]) + "\n"


def differs(name: str, found: bytes, facts: ReleaseFacts) -> str:
    """Name the first line in which a paper is not what the facts give; empty where it is.

    Raises KeyError for a name that is no paper of theirs.
    """
    wanted = papers(facts)[name].encode()
    if found == wanted:
        return ""
    pairs = zip(wanted.split(b"\n"), [*found.split(b"\n"), *[b""] * wanted.count(b"\n")], strict=False)
    for number, (ours, theirs) in enumerate(pairs, 1):
        if ours != theirs:
            shown, meant = (json.dumps(text.decode(errors="replace")[:160]) for text in (theirs, ours))
            return f"{name}, line {number}: {shown} is not what release.json gives: {meant}"
    return f"{name} goes on after its last line"
