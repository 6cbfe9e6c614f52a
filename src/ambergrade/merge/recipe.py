"""Says all that a merge is made of: enough to rebuild it bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ambergrade import identity
from ambergrade.errors import BadInput, UnknownName
from ambergrade.identity import canonical_json
from ambergrade.merge.formula import Formula
from ambergrade.merge.plan import DTYPES, POLICIES, check_policies, input_names

RECIPE = "ambergrade.recipe"
"""Key of a merged file's metadata under which its recipe stands."""
FIRST_POLICIES = frozenset({"vae", "cosmetic", "missing", "nonfinite", "ema"})
"""Always told. Later ones are told where they are no default, so that they change no earlier digest and header."""
MOST_NUMBER = 1e300
"""The largest coefficient, either sign."""
HASH = "modelspec.hash_sha256"
RELEASED = (
    "modelspec.sai_model_spec",
    "modelspec.title",
    "modelspec.author",
    "modelspec.license",
    "modelspec.resolution",
    "modelspec.encoder_layer",
    "modelspec.thumbnail",
    HASH,
)
"""Keys of a header that say what a release is, and that no recipe gives."""


@dataclass(frozen=True)
class Recipe:
    """Holds formula, coefficients, inputs by digest, dtype and policies of one merge."""

    formula: Formula
    coefficients: Mapping[str, float]
    inputs: Mapping[str, str]
    """Alias to the sha256 of its weights (`ModelDigests.weights`)."""
    dtype: str | None = None
    """fp32, fp16 or bf16; None keeps the base's."""
    policies: Mapping[str, str] = field(default_factory=lambda: dict(POLICIES))
    files: Mapping[str, str] = field(default_factory=dict)
    """Alias to the sha256 of its file (`ModelDigests.file`), where it came from one."""
    ancestors: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Entries of `sd_merge_models` for inputs that are merges, and for what those were made of; by sha256 of file."""
    by_weights: bool = True
    """False for the header of an earlier version, whose `inputs` are digests of files."""
    released: Mapping[str, str] = field(default_factory=dict, compare=False)
    """What the header says of a release (keys of RELEASED), beside or in place of what a merge says of itself."""

    def __post_init__(self) -> None:
        self.formula.check_coefficients(self.coefficients)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UnknownName("dtype", self.dtype, DTYPES)
        check_policies(self.policies, (*self.formula.models, *self.inputs))
        for alias in self.named:
            if alias not in self.inputs:
                raise UnknownName("model", alias, self.inputs, f"The formula {self.formula.text} needs its digest.")

    @property
    def named(self) -> tuple[str, ...]:
        """The inputs that it needs: the formula's models, its LoRAs, and a model of which only the VAE is copied."""
        return input_names(self.formula, self.policies)

    @cached_property
    def document(self) -> dict[str, Any]:
        """Return what the identity is over: canonical formula, the inputs it names by their weights, every policy."""
        return {
            "formula": self.formula.text,
            "coefficients": {name: float(value) for name, value in self.coefficients.items()},
            "inputs": {alias: self.inputs[alias] for alias in self.named},
            "dtype": self.dtype,
            "policies": {
                name: value
                for name, value in {**POLICIES, **self.policies}.items()
                if name in FIRST_POLICIES or value != POLICIES[name]
            },
        }

    @cached_property
    def digest(self) -> str:
        """Return the recipe's identity, which is the same for re-saved inputs of equal weights."""
        return identity.digest(self.document)

    def model(self, alias: str) -> dict[str, str]:
        """Return both digests of an input, each under its name; an earlier version's header knows only the file's."""
        if not self.by_weights:
            return {"file": self.inputs[alias]}
        return {"weights": self.inputs[alias], **({"file": self.files[alias]} if alias in self.files else {})}

    @cached_property
    def full(self) -> dict[str, Any]:
        """Return `document` with both digests of every input."""
        if not self.by_weights:
            return self.document
        return {**self.document, "inputs": {alias: self.model(alias) for alias in self.named}}

    def to_json(self) -> str:
        """Return the text that a header holds under RECIPE."""
        return canonical_json(self.full)

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what `to_json` wrote, or an earlier version of it, whose inputs are digests of files alone.

        Raises BadInput where keys are missing or unknown.
        """
        try:
            document = json.loads(text)
            canonical_json(document).encode()  # refuses infinities, NaN and halves of characters
        except (ValueError, RecursionError):
            document = None
        expected = {"formula", "coefficients", "inputs", "dtype", "policies"}
        if not isinstance(document, dict) or document.keys() != expected or not _is_plain(document):
            raise BadInput(f"A merge recipe has the keys {sorted(expected)}; found {text[:200]!r}")
        inputs = document["inputs"]
        digests = {alias: value for alias, value in inputs.items() if isinstance(value, dict)}
        if digests:
            inputs = {alias: value["weights"] for alias, value in digests.items()}
        files = {alias: value["file"] for alias, value in digests.items() if "file" in value}
        formula = Formula.parse(document["formula"], inputs)
        policies = {**POLICIES, **document["policies"]}
        given = {**document, "policies": policies, "formula": formula, "inputs": inputs, "files": files}
        return cls(**given, by_weights=bool(digests) or not inputs)


def _is_plain(document: Mapping[str, Any]) -> bool:
    """Say whether a recipe's values are of the kinds that `Recipe.full` has."""
    inputs, policies, numbers = document["inputs"], document["policies"], document["coefficients"]
    if not all(isinstance(value, dict) for value in (inputs, policies, numbers)):
        return False
    by_file = all(isinstance(value, str) for value in inputs.values())
    dtype = document["dtype"]
    return (
        (by_file or all(are_digests(value) and "weights" in value for value in inputs.values()))
        and all(isinstance(value, str) for value in policies.values())
        and all(is_number(value) for value in numbers.values())
        and isinstance(document["formula"], str)
        and (dtype is None or isinstance(dtype, str))
    )


def are_digests(value: Any) -> bool:
    """Say whether a value is a mapping of `weights`, `file`, or both, to sha256."""
    return (
        isinstance(value, Mapping)
        and 0 < len(value) <= 2
        and value.keys() <= {"weights", "file"}
        and all(isinstance(text, str) and len(text) == 64 for text in value.values())
    )


def is_number(value: Any) -> bool:
    """Say whether a value can be a coefficient: finite, and within MOST_NUMBER."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= MOST_NUMBER


def ancestors(recipe: Recipe, parents: Mapping[str, tuple[Any, Mapping[str, Any]]]) -> dict[str, Any]:
    """Make `Recipe.ancestors` of the `sd_merge_recipe` and `sd_merge_models` of inputs that are merges, by alias."""
    models: dict[str, Any] = {}
    for alias in recipe.named:
        own, older = parents.get(alias, (None, {}))
        models |= {**older, **_entry(recipe, alias, own)}
    return _without_plain(recipe, models)


def header_recipe(metadata: Mapping[str, str]) -> Recipe:
    """Read the recipe in a merged file's header. Raises as `Recipe.from_json`."""
    recipe = Recipe.from_json(metadata[RECIPE])
    try:
        models = json.loads(metadata.get("sd_merge_models", "{}"))
        canonical_json(models).encode()
    except (ValueError, RecursionError):
        models = {}
    released = {key: metadata[key] for key in RELEASED if key in metadata}
    return replace(
        recipe, ancestors=_without_plain(recipe, models if isinstance(models, dict) else {}), released=released
    )


def _without_plain(recipe: Recipe, models: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of a file's `sd_merge_models` that do not follow from its recipe."""
    plain = _plain_models(recipe)
    return {sha256: entry for sha256, entry in models.items() if entry != plain.get(sha256)}


def _plain_models(recipe: Recipe) -> dict[str, Any]:
    models: dict[str, Any] = {}
    for alias in recipe.named:
        models |= _entry(recipe, alias, None)
    return models


def _entry(recipe: Recipe, alias: str, own: Any) -> dict[str, Any]:
    """Return what A1111 keeps of an input, by the sha256 of its file; of a model in memory, by that of its weights."""
    sha256 = recipe.files.get(alias, recipe.inputs[alias])
    return {sha256: {"name": alias, "legacy_hash": None, "sd_merge_recipe": own}}


def metadata(recipe: Recipe, *, architecture: str, prediction_type: str | None = None) -> dict[str, str]:
    """Make the header of the merged single file: no time and no path, so equal recipes give equal bytes.

    `modelspec.*` is Stability's ModelSpec 1.0.0; `sd_merge_recipe` and `sd_merge_models` are what A1111's checkpoint
    merger writes, with the inputs' own recipes nested; `ambergrade.recipe` rebuilds the merge. `architecture` is
    ModelSpec's word for the family, such as `stable-diffusion-xl-v1-base`.
    """
    numbers = ", ".join(f"{name} = {value!r}" for name, value in recipe.document["coefficients"].items())
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "sgm",
        "modelspec.title": recipe.formula.name or "merge",
        "modelspec.description": recipe.formula.text + (f" with {numbers}" if numbers else ""),
        "modelspec.merged_from": ", ".join(recipe.named),
        **({"modelspec.prediction_type": prediction_type} if prediction_type else {}),
        "sd_merge_recipe": canonical_json({"type": "ambergrade", "custom_name": recipe.formula.name, **recipe.full}),
        "sd_merge_models": canonical_json({**_plain_models(recipe), **recipe.ancestors}),
        RECIPE: recipe.to_json(),
        "ambergrade.recipe_digest": recipe.digest,
        **recipe.released,
    }
