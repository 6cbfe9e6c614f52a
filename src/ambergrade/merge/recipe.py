"""A recipe says all that a merge is made of: enough to rebuild it bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ambergrade import identity
from ambergrade.errors import BadInput, UnknownName
from ambergrade.identity import canonical_json
from ambergrade.merge.formula import Formula
from ambergrade.merge.plan import DTYPES, POLICIES, check_policies


@dataclass(frozen=True)
class Recipe:
    """Formula, coefficients, input digests, dtype and policies of one merge."""

    formula: Formula
    coefficients: Mapping[str, float]
    inputs: Mapping[str, str]
    """Alias to digest: a file's sha256, a folder's `input_digest`, or the weights digest of a model in memory."""
    dtype: str | None = None
    """fp32, fp16 or bf16; None keeps the base's."""
    policies: Mapping[str, str] = field(default_factory=lambda: dict(POLICIES))

    def __post_init__(self) -> None:
        self.formula.check_coefficients(self.coefficients)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UnknownName("dtype", self.dtype, DTYPES)
        for alias in self.named:
            if alias not in self.inputs:
                raise UnknownName("model", alias, self.inputs, f"The formula {self.formula.text} needs its digest.")
        check_policies(self.policies, self.formula.models)

    @property
    def named(self) -> tuple[str, ...]:
        """The inputs that the formula names: models, then LoRAs."""
        return (*self.formula.models, *self.formula.loras)

    @cached_property
    def document(self) -> dict[str, Any]:
        """The recipe as plain values: canonical formula, only the inputs it names, every policy."""
        return {
            "formula": self.formula.text,
            "coefficients": {name: float(value) for name, value in self.coefficients.items()},
            "inputs": {alias: self.inputs[alias] for alias in self.named},
            "dtype": self.dtype,
            "policies": {**POLICIES, **self.policies},
        }

    @cached_property
    def digest(self) -> str:
        return identity.digest(self.document)

    def to_json(self) -> str:
        return canonical_json(self.document)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what `to_json` wrote. Raises BadInput where keys are missing or unknown."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            document = None
        expected = {"formula", "coefficients", "inputs", "dtype", "policies"}
        if not isinstance(document, dict) or document.keys() != expected or not _plain(document):
            raise BadInput(f"A merge recipe has the keys {sorted(expected)}; found {text[:200]}")
        return cls(**{**document, "formula": Formula.parse(document["formula"], document["inputs"])})


def _plain(document: Mapping[str, Any]) -> bool:
    """Whether a recipe's values are of the kinds that `Recipe.document` has."""
    texts = all(
        isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
        for value in (document["inputs"], document["policies"])
    )
    dtype = document["dtype"]
    known = isinstance(document["formula"], str) and (dtype is None or isinstance(dtype, str))
    return texts and known and isinstance(document["coefficients"], dict)


def metadata(
    recipe: Recipe,
    *,
    architecture: str,
    prediction_type: str = "epsilon",
    parents: Mapping[str, tuple[Any, Mapping[str, Any]]] | None = None,
) -> dict[str, str]:
    """The header of the merged single file: no time and no path, so equal recipes give equal bytes.

    `modelspec.*` is Stability's ModelSpec 1.0.0; `sd_merge_recipe` and `sd_merge_models` are what A1111's checkpoint
    merger writes, with the inputs' own recipes nested; `ambergrade.recipe` rebuilds the merge. `architecture` is
    ModelSpec's word for the family, such as `stable-diffusion-xl-v1-base`; `parents` gives for an alias its own
    `sd_merge_recipe` and `sd_merge_models`.
    """
    numbers = ", ".join(f"{name} = {value!r}" for name, value in recipe.document["coefficients"].items())
    merge = {"type": "ambergrade", "custom_name": recipe.formula.name, **recipe.document}
    models: dict[str, Any] = {}
    for alias in recipe.named:
        own, ancestors = (parents or {}).get(alias, (None, {}))
        models |= ancestors
        models[recipe.inputs[alias]] = {"name": alias, "legacy_hash": None, "sd_merge_recipe": own}
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "sgm",
        "modelspec.title": recipe.formula.name or "merge",
        "modelspec.description": recipe.formula.text + (f" with {numbers}" if numbers else ""),
        "modelspec.merged_from": ", ".join(recipe.named),
        "modelspec.prediction_type": prediction_type,
        "sd_merge_recipe": canonical_json(merge),
        "sd_merge_models": canonical_json(models),
        "ambergrade.recipe": recipe.to_json(),
        "ambergrade.recipe_digest": recipe.digest,
    }
