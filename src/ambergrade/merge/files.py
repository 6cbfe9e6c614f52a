"""Merges as people write them down: a recipe file is read and run, and a merged file is rebuilt from its own header.

formula: "gamma rev1 = beta7 + a * (anxl3 - anxl2) + b * (base7 - beta7)"
models: {beta7: beta7.safetensors, …}      # relative to this file
coefficients: {a: 0.8, b: 0.5}
dtype: fp16                                # default: the base's
policies: {vae: base}                      # default: strict, see `plan.POLICIES`
out: gamma-rev1.safetensors
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ambergrade.errors import BadInput, BadSetting, MissingObject, UnknownName
from ambergrade.family.files import PASSIVE_FILE
from ambergrade.merge.engine import run
from ambergrade.merge.formula import Formula
from ambergrade.merge.header import Header, read_header
from ambergrade.merge.inputs import Digests, default_cache, input_digest, open_input
from ambergrade.merge.job import Job, open_job
from ambergrade.merge.recipe import Recipe
from ambergrade.store import find_file

KEYS = ("formula", "models", "coefficients", "dtype", "policies", "out")
MOST_BYTES = 1 << 16
"""Of a recipe file."""
MOST_NUMBER = 1e300
RECIPE = "ambergrade.recipe"
"""Key of a merged file's metadata under which its recipe stands."""


@dataclass(frozen=True)
class Written:
    """A recipe as written down: what to merge, from which files, to where."""

    formula: Formula
    paths: Mapping[str, Path]
    """Alias to file or diffusers folder, LoRAs included."""
    coefficients: Mapping[str, float]
    dtype: str | None
    policies: Mapping[str, str]
    out: Path | None

    def job(self) -> Job:
        """Planned from headers alone. Raises as `job.open_job`."""
        return open_job(
            self.formula, self.paths, coefficients=self.coefficients, dtype=self.dtype, policies=self.policies
        )


def read_recipe(file: Path, coefficients: Mapping[str, float] | None = None) -> Written:
    """The recipe in a yaml file; `coefficients` take the place of those written there.

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
    return from_values(values, file.parent, coefficients)


class _Loader(yaml.SafeLoader):
    """Plain values without references, by which a short file stands for gigabytes."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="a reference (*name) has no place in a recipe")
        return super().compose_node(parent, index)


# What yaml's own constructors raise for a wrong `!!bool`, `!!int`, date, or number of digits, or for deep nesting.
_YAML_FAILS = (yaml.YAMLError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def from_values(values: Mapping[str, Any], folder: Path, coefficients: Mapping[str, float] | None = None) -> Written:
    """A recipe from plain values; paths are relative to `folder`. Raises as `read_recipe`."""
    for key in values:
        if key not in KEYS:
            raise UnknownName("recipe key", str(key)[:80], KEYS)
    for key in ("formula", "dtype", "out"):
        value = values.get(key)
        if not (isinstance(value, str) or (value is None and key != "formula")) or "\0" in (value or ""):
            raise BadSetting(f"{key} is a text, found {str(value)[:80]!r}.")
    sources, policies = _mapping(values, "models"), _mapping(values, "policies")
    for key, mapping in (("models", sources), ("policies", policies)):
        if not all(isinstance(text, str) for pair in mapping.items() for text in pair):
            raise BadInput(f"{key} maps names to {'files' if key == 'models' else 'words'}, as in {_EXAMPLES[key]}.")
    formula = Formula.parse(values["formula"], sources)
    numbers = {**_mapping(values, "coefficients"), **(coefficients or {})}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > MOST_NUMBER:
            raise BadSetting(f"coefficients.{str(name)[:80]} is a number, found {str(value)[:80]!r}.")
    needed = (*formula.models, *formula.loras)
    paths = {alias: _place(sources.get(alias, formula.lora_paths.get(alias, alias)), folder) for alias in needed}
    out = values.get("out")
    return Written(
        formula,
        paths,
        {str(name): float(value) for name, value in numbers.items()},
        values.get("dtype"),
        policies,
        None if out is None else folder / out,
    )


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
    """Whether a file is what its header says."""

    same: bool
    recipe: Recipe
    inputs: Mapping[str, Path]
    bytes_compared: int
    first_difference: str = ""
    """`byte 123,456, in 'model.diffusion_model.…'`; empty where there is none."""


def verify(model: Path, models: Path, *, threads: int | None = None, cache: Path | None = None) -> Verdict:
    """Run the recipe in a merged file's header again and compare every byte; nothing is written.

    `models` is a folder in which the inputs are found by their sha256, whatever their names. Raises BadInput where the
    file holds no recipe, MissingObject with the sha256 of inputs that are not there.
    """
    header = read_header(model)
    if RECIPE not in header.metadata:
        raise BadInput(
            f"{model.name} holds no recipe ({RECIPE}): it was not merged by Ambergrade, or its header is lost."
        )
    recipe = Recipe.from_json(header.metadata[RECIPE])
    digests = Digests(cache if cache is not None else default_cache())
    paths = _found(recipe, models, model, digests)
    job = open_job(
        recipe.formula, paths, coefficients=recipe.coefficients, dtype=recipe.dtype, policies=recipe.policies
    )
    with model.open("rb") as file:
        sink = _Comparing(file.fileno())
        run(job, sink, threads=threads, digests=digests)
    extra = header.size != sink.end
    difference = sink.first if sink.first is not None else (min(header.size, sink.end) if extra else None)
    told = "" if difference is None else _told(difference, header)
    return Verdict(difference is None, recipe, paths, sink.compared, told)


class _Comparing:
    """Takes a merge's bytes and holds them against a file's."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.first: int | None = None
        self.compared = self.end = 0

    def write(self, offset: int, data: memoryview) -> None:
        there = os.pread(self.descriptor, len(data), offset)
        if there != data:
            same = min(len(there), len(data))
            apart = next((i for i in range(same) if there[i] != data[i]), same)
            place = offset + apart
            self.first = place if self.first is None else min(self.first, place)
        self.compared += len(data)
        self.end = max(self.end, offset + len(data))


def _told(place: int, header: Header) -> str:
    for name, entry in header.entries.items():
        if entry.start <= place < entry.start + entry.size:
            return f"byte {place:,}, in '{name}'"
    return f"byte {place:,}, in the header" if place < header.size else f"byte {place:,}, at the end"


def _found(recipe: Recipe, folder: Path, model: Path, digests: Digests) -> dict[str, Path]:
    """Where each input lies, by digest. Every candidate is read once, and remembered."""
    if not folder.is_dir():
        raise MissingObject(f"{folder} is no folder.\nName the folder that holds the inputs.")
    wanted = {recipe.inputs[alias]: alias for alias in recipe.named}
    where: dict[str, Path] = {}
    for candidate in _candidates(folder, model):
        if len(where) == len(wanted):
            break
        sha256 = _digest(candidate, digests)
        if sha256 in wanted:
            where.setdefault(sha256, candidate)
    digests.save()
    missing = [f"{alias}: sha256 {sha256}" for sha256, alias in wanted.items() if sha256 not in where]
    if missing:
        raise MissingObject(f"{folder} does not hold every input of {model.name}. Missing:\n  " + "\n  ".join(missing))
    return {alias: where[recipe.inputs[alias]] for alias in recipe.named}


def _candidates(folder: Path, model: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("model_index.json")):
        yield path.parent
    for path in sorted(folder.rglob("*.safetensors")):
        if path.name != PASSIVE_FILE and not path.samefile(model):
            yield path


def _digest(path: Path, digests: Digests) -> str | None:
    if path.is_file():
        return digests.of_file(path)
    try:
        opened = open_input("input", path)
    except (BadInput, MissingObject):
        return None  # a folder that is no model is no candidate
    return input_digest(
        [str(file.relative_to(path)) for file in opened.files], [digests.of_file(file) for file in opened.files]
    )
