"""Says in in-toto's and SLSA's words how a release was made: the formula is what was asked, the inputs are by digest.

https://in-toto.io/Statement/v1 around https://slsa.dev/provenance/v1. There is no time, no builder's name and no
invocation in it: whoever makes the release again makes the same statement.
"""

from __future__ import annotations

from typing import Any

from ambergrade.release.facts import ReleaseFacts
from ambergrade.typed import plain

MERGE = "urn:ambergrade:merge:1"
"""Build type: `ambergrade merge recipe.yaml`, whose keys are the external parameters."""
GIVEN = "urn:ambergrade:released-as-found:1"
"""Build type: a file that was made elsewhere, in a way that nobody recorded."""


def statement(facts: ReleaseFacts) -> dict[str, Any]:
    """Return the statement: the release's files as subjects, the recipe as parameters, the parents as dependencies."""
    subjects = {facts.weights.name: facts.weights.file} | {name: one.sha256 for name, one in facts.files.items()}
    recipe, made = facts.recipe, facts.environment
    asked: dict[str, Any] = {"name": facts.name, "version": facts.version}
    if recipe is not None:
        asked |= {
            "formula": recipe.formula,
            "coefficients": recipe.coefficients,
            "dtype": recipe.dtype,
            "policies": recipe.policies,
            "models": {alias: parent.weights or parent.file for alias, parent in recipe.models.items()},
        }
    inside: dict[str, Any] = {"isa": made.isa, "python": made.python}
    if facts.training is not None:
        trained = facts.training
        inside["training"] = {
            "name": trained.name,
            "base": trained.base_weights,
            "captions": trained.captions.manifest,
            "settings": trained.settings,
        }
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": subjects[name]}} for name in sorted(subjects)],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {
            "buildDefinition": {
                "buildType": MERGE if recipe is not None else GIVEN,
                "externalParameters": plain(asked),
                "internalParameters": plain(inside),
                "resolvedDependencies": _dependencies(facts),
            },
            "runDetails": {
                "builder": {"id": "urn:ambergrade", "version": {"ambergrade": made.ambergrade}},
            },
        },
    }


def _dependencies(facts: ReleaseFacts) -> list[dict[str, Any]]:
    """The parents, then the lock of packages and the packages themselves."""
    found: list[dict[str, Any]] = []
    for alias, parent in sorted(facts.parents.items()):
        uri = f"https://huggingface.co/{parent.origin.hub}" if parent.origin.hub else parent.origin.url
        found.append(
            {
                "name": alias,
                **({"uri": uri} if uri else {}),
                **({"digest": {"sha256": parent.file}} if parent.file else {}),
                **({"annotations": {"sha256 of the weights": parent.weights}} if parent.weights else {}),
            }
        )
    if facts.environment.lock:
        found.append({"name": "requirements.lock", "digest": {"sha256": facts.environment.lock}})
    pins = sorted(facts.environment.packages.items())
    return [*found, *({"uri": f"pkg:pypi/{name}@{version}"} for name, version in pins)]
