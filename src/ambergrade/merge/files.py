"""Reads recipe files as people write them, and rebuilds a merged file from its own header.

formula: "gamma rev1 = beta7 + a * (anxl3 - anxl2) + b * (base7 - beta7)"
models: {beta7: beta7.safetensors, …}      # relative to this file; or {weights: sha256, file: sha256, name: hint}
coefficients: {a: 0.8, b: 0.5}
dtype: fp16                                # default: the base's
policies: {vae: base}                      # default: strict, see `plan.POLICIES`
out: gamma-rev1.safetensors
overwrite: true                            # default: an `out` that is there already is refused
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from ambergrade.errors import BadInput, BadSetting, MissingObject, UnknownName
from ambergrade.family.digests import tensors_sha256
from ambergrade.identity import canonical_json
from ambergrade.merge.comparing import Comparing, Differing
from ambergrade.merge.engine import run
from ambergrade.merge.find import find_inputs
from ambergrade.merge.formula import Formula
from ambergrade.merge.header import Header, read_header
from ambergrade.merge.inputs import Digests, default_cache
from ambergrade.merge.job import Job, Repeated, open_job
from ambergrade.merge.parser import ALIAS
from ambergrade.merge.plan import input_names
from ambergrade.merge.recipe import HASH, RECIPE, RELEASED, Recipe, are_digests, header_recipe, is_number
from ambergrade.store import find_file

__all__ = ["RECIPE", "RecipeFile", "Verdict", "from_values", "read_recipe", "recipe_document", "recipe_of", "verify"]

KEYS = ("formula", "models", "coefficients", "dtype", "policies", "out", "overwrite", "result", "ancestors")
MOST_BYTES = 1 << 20
"""The longest recipe file. A release's holds what its inputs were merged from, if they were."""


@dataclass(frozen=True)
class RecipeFile:
    """Holds a recipe as written down: what to merge, from which files, to where."""

    formula: Formula
    paths: Mapping[str, Path]
    """Alias to file or diffusers folder, LoRAs included; of those that are named by a path."""
    digests: Mapping[str, Mapping[str, str]]
    """Alias to `weights`, `file` or both; of those that are named by digest, as in a release."""
    names: Mapping[str, str]
    """Alias to a file name, which is looked at first."""
    coefficients: Mapping[str, float]
    dtype: str | None
    policies: Mapping[str, str]
    out: Path | None
    overwrite: bool
    result: Mapping[str, Any]
    """A release's `name`, `bytes`, the digests `file` and `weights`, and what its `header` says of it; else empty."""
    ancestors: Mapping[str, Any]
    """See `Recipe.ancestors`."""
    source: Path | None = None
    """The file it was read from."""

    @property
    def recipe(self) -> Recipe | None:
        """Return what the merged file's header says; None unless every input is named by its weights."""
        weights = {alias: digests["weights"] for alias, digests in self.digests.items() if "weights" in digests}
        if weights.keys() != {*input_names(self.formula, self.policies)}:
            return None
        return Recipe(
            self.formula,
            self.coefficients,
            weights,
            self.dtype,
            self.policies,
            {alias: digests["file"] for alias, digests in self.digests.items() if "file" in digests},
            ancestors=self.ancestors,
            released=self.result.get("header", {}),
        )

    def job(self, models: Path | None = None) -> Job:
        """Plan the merge from headers alone. `models` is the folder for inputs that are named by digest.

        Where all of them are, the file's header will say what the recipe says, even of inputs that were saved anew.
        Raises as `job.open_job` and `find.find_inputs`.
        """
        about: dict[str, Any] = {"coefficients": self.coefficients, "dtype": self.dtype, "policies": self.policies}
        about |= {"released": self.result.get("header", {})}
        if not self.digests:
            return open_job(self.formula, self.paths, **about)
        if models is None:
            raise BadSetting(
                f"The recipe names {', '.join(self.digests)} by digest.\nGive the folder that holds them: --models DIR"
            )
        found = find_inputs(self.digests, models, Digests(default_cache()), names=set(self.names.values()))
        repeats = Repeated(self.recipe, self.result.get("bytes", 0)) if self.recipe else None
        return open_job(self.formula, {**self.paths, **found.paths}, **about, repeats=repeats)


def read_recipe(file: Path, coefficients: Mapping[str, float] | None = None) -> RecipeFile:
    """Read the recipe in a yaml file; `coefficients` take the place of those written there.

    Raises MissingObject for no file, BadInput for what is no yaml mapping, UnknownName for a key that is not known.
    """
    if not file.is_file():
        raise MissingObject(f"No recipe at {file}.")
    with file.open("rb") as opened:
        text = opened.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise BadInput(f"{file.name} has more than {MOST_BYTES:,} bytes: it is no recipe.")
    try:
        values = yaml.load(text, _Loader)
    except _YAML_FAILS as error:
        told = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise BadInput(f"{file.name} cannot be read as yaml: {told}") from None
    if not isinstance(values, dict) or "formula" not in values:
        raise BadInput(f"{file.name} holds no recipe.\nA recipe has the keys: {', '.join(KEYS)}.")
    return from_values(values, file.parent, coefficients, source=file)


class _Loader(yaml.SafeLoader):
    """Reads plain values without references, by which a short file stands for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="a reference (*name) has no place in a recipe")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := [name for name, count in names.items() if count > 1]:
            raise yaml.MarkedYAMLError(problem=f"'{twice[0][:80]}' is given twice")
        return super().construct_mapping(node, deep)


# What yaml's own constructors raise for a wrong `!!bool`, `!!int`, date, or number of digits, or for deep nesting.
_YAML_FAILS = (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def from_values(
    values: Mapping[str, Any],
    folder: Path,
    coefficients: Mapping[str, float] | None = None,
    *,
    source: Path | None = None,
) -> RecipeFile:
    """Read a recipe from plain values; paths are relative to `folder`. Raises as `read_recipe`."""
    for key in values:
        if key not in KEYS:
            raise UnknownName("recipe key", str(key)[:80], KEYS)
    for key in ("formula", "dtype", "out"):
        value = values.get(key)
        if not (isinstance(value, str) or (value is None and key != "formula")) or "\0" in (value or ""):
            raise BadSetting(f"{key} is a text, found {str(value)[:80]!r}.")
    if not isinstance(overwrite := values.get("overwrite") or False, bool):
        raise BadSetting(f"overwrite is true or false, found {str(overwrite)[:80]!r}.")
    sources, policies = _mapping(values, "models"), _mapping(values, "policies")
    digests, names = _by_digest(sources)
    for key, mapping in (("models", sources), ("policies", policies)):
        if not all(isinstance(text, str) for pair in mapping.items() for text in pair):
            raise BadInput(f"{key} maps names to {'files' if key == 'models' else 'words'}, as in {_EXAMPLES[key]}.")
    formula = Formula.parse(values["formula"], [*sources, *digests])
    result, older = _release_keys(values)
    numbers = {**_mapping(values, "coefficients"), **(coefficients or {})}
    for name, value in numbers.items():
        if not is_number(value):
            raise BadSetting(f"coefficients.{str(name)[:80]} is a number, found {str(value)[:80]!r}.")
    _name_vae(policies, sources, digests)
    needed = input_names(formula, policies)
    paths = {
        alias: _place(sources.get(alias, formula.lora_paths.get(alias, alias)), folder)
        for alias in needed
        if alias not in digests
    }
    out = values.get("out")
    return RecipeFile(
        formula,
        paths,
        {alias: digests[alias] for alias in needed if alias in digests},
        names,
        {str(name): float(value) for name, value in numbers.items()},
        values.get("dtype"),
        policies,
        None if out is None else folder / out,
        overwrite,
        {} if coefficients else result,  # other coefficients make another file
        older,
        source,
    )


def _name_vae(policies: dict[str, str], sources: dict[str, str], digests: Mapping[str, Any]) -> None:
    """Give a VAE's file an alias, as a LoRA's in a formula has one: its name without the ending."""
    vae = policies.get("vae", "")
    if vae in sources or vae in digests or not (vae.endswith(".safetensors") or "/" in vae):
        return
    alias = PurePosixPath(vae).stem
    if not ALIAS.fullmatch(alias) or alias in sources or alias in digests:
        raise BadSetting(f"'{alias[:80]}' is no fit name for the VAE. Give its file another alias under models.")
    sources[alias] = vae
    policies["vae"] = alias


def _by_digest(sources: dict[Any, Any]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Take the inputs that are named by digest out of `sources`; their digests, and their file names."""
    digests: dict[str, dict[str, str]] = {}
    names: dict[str, str] = {}
    for alias, value in list(sources.items()):
        if isinstance(value, Mapping):
            named = {key: item for key, item in value.items() if key != "name"}
            name = value.get("name", "")
            if not (isinstance(alias, str) and isinstance(name, str) and are_digests(named)):
                raise BadInput(
                    f"models.{str(alias)[:80]} is a file, or the digests `weights` and `file` (64 hexadecimal digits) "
                    f"with perhaps a `name`; found {str(value)[:200]!r}."
                )
            digests[alias], names[alias] = named, name
            del sources[alias]
    return digests, names


def _release_keys(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what a release's recipe says of the merged file and of its inputs' own inputs."""
    result, older = _mapping(values, "result"), _mapping(values, "ancestors")
    digests = {key: value for key, value in result.items() if key in ("file", "weights")}
    size, name = result.get("bytes", 0), result.get("name", "merged.safetensors")
    header = result.get("header", {})
    sound = result.keys() <= {"name", "bytes", "file", "weights", "header"} and (not digests or are_digests(digests))
    sound = (
        sound and isinstance(header, Mapping) and {*map(type, header.values())} <= {str} and {*header} <= {*RELEASED}
    )
    if not (sound and type(size) is int and 0 <= size < 1 << 53 and isinstance(name, str) and Path(name).name == name):
        raise BadInput(
            f"result has the keys name (of a file), bytes, file, weights and header; found {str(result)[:200]!r}."
        )
    try:
        canonical_json([older, header]).encode()
    except (ValueError, TypeError) as error:
        raise BadInput(f"ancestors or result.header cannot stand in a header: {str(error)[:80]}.") from None
    return {**result, "name": name} if result else {}, older


_EXAMPLES = {
    "models": "models: {beta7: beta7.safetensors}",
    "policies": "policies: {vae: base}",
    "coefficients": "coefficients: {a: 0.8}",
}


def _mapping(values: Mapping[str, Any], key: str) -> dict[Any, Any]:
    found = values.get(key)
    if found is not None and not isinstance(found, Mapping):
        raise BadInput(f"{key} is a mapping, as in {_EXAMPLES[key]}; found {str(found)[:80]!r}.")
    return dict(found or {})


def _place(source: str, folder: Path) -> Path:
    try:
        return find_file(source) if "://" in source else find_file(str(folder / Path(source).expanduser()))
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, a zero byte, ~ of nobody
        raise BadInput(f"'{source[:80]}' is no path: {str(error)[:80]}.") from None


@dataclass(frozen=True)
class Verdict:
    """Says whether a file is what its header says."""

    same: bool
    recipe: Recipe
    inputs: Mapping[str, Path]
    bytes_compared: int
    first_difference: str = ""
    """`byte 123,456, in 'model.diffusion_model.…'`; empty where there is none."""
    resaved: tuple[str, ...] = ()
    """Aliases of inputs that were found by their weights, in other files than the header names."""
    differing: tuple[Differing, ...] = ()
    """Tensors of other values, the farthest first."""


def verify(model: Path, models: Path, *, threads: int | None = None, cache: Path | None = None) -> Verdict:
    """Run the recipe in a merged file's header again and compare every byte; nothing is written.

    `models` is a folder in which the inputs are found by their digests, whatever their names. Where some were saved
    anew, what the header says of the inputs' own origin cannot be compared, and all else is. Raises BadInput where the
    file holds no recipe, MissingObject with the digests of inputs that are not there.
    """
    header, recipe = read_header(model), recipe_of(model)
    digests = Digests(cache if cache is not None else default_cache())
    wanted = {alias: recipe.model(alias) for alias in recipe.named}
    found = find_inputs(wanted, models, digests, skip=[model])
    job = open_job(
        recipe.formula,
        found.paths,
        coefficients=recipe.coefficients,
        dtype=recipe.dtype,
        policies=recipe.policies,
        by_weights=recipe.by_weights,
        repeats=Repeated(recipe, header.size) if found.resaved else None,
        released=recipe.released,
    )
    with model.open("rb") as file:
        sink = Comparing(file.fileno(), job, header)
        run(job, sink, threads=threads, digests=digests)
    extra = header.size != sink.end
    difference = sink.first if sink.first is not None else (min(header.size, sink.end) if extra else None)
    told = "" if difference is None else _told(difference, header)
    if difference is None and HASH in recipe.released and recipe.released[HASH] != f"0x{tensors_sha256(model)}":
        difference, told = 0, f"{HASH} in the header, which is not the hash of the tensors"
    return Verdict(difference is None, recipe, found.paths, sink.compared, told, found.resaved, sink.differing)


def recipe_of(model: Path) -> Recipe:
    """Read the recipe in a merged file's header. Raises BadInput where it holds none."""
    header = read_header(model)
    if RECIPE not in header.metadata:
        raise BadInput(
            f"{model.name} holds no recipe ({RECIPE}): it was not merged by Ambergrade, or its header is lost."
        )
    return header_recipe(header.metadata)


def recipe_document(model: Path, *, formula: str = "", names: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return a merged file's recipe as plain values for a release: `from_values` reads them, inputs by digest.

    formula: as written, in place of its canonical text. names: alias to a file name, which is looked at first.
    """
    recipe, named = recipe_of(model), names or {}
    document = {key: value for key, value in recipe.document.items() if key != "inputs"}
    models = {alias: {"name": named[alias]} if alias in named else {} for alias in recipe.named}
    document |= {"formula": formula or recipe.formula.text}
    document |= {"models": {alias: {**models[alias], **recipe.model(alias)} for alias in recipe.named}}
    return {**document, "ancestors": dict(recipe.ancestors)} if recipe.ancestors else document


def _told(place: int, header: Header) -> str:
    for name, entry in header.entries.items():
        if entry.start <= place < entry.start + entry.size:
            return f"byte {place:,}, in '{name}'"
    return f"byte {place:,}, in the header" if place < header.size else f"byte {place:,}, at the end"
