"""Plans a merge of files from their headers: what will be read, what will be written, and at what cost."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ambergrade.errors import BadInput, UnknownName
from ambergrade.family.digests import ModelDigests, model_weights
from ambergrade.family.dtypes import torch_dtypes
from ambergrade.merge.formula import Formula
from ambergrade.merge.header import header_bytes, read_exactly
from ambergrade.merge.inputs import Digests, Input, Stored, open_input, parent_recipe
from ambergrade.merge.lora import alphas, check_shapes, targets, with_config
from ambergrade.merge.parts import Parts, canonical_parts
from ambergrade.merge.plan import Plan, Task, check_policies, input_names, make_plan, operands
from ambergrade.merge.recipe import Recipe, ancestors, metadata

if TYPE_CHECKING:
    from torch import Tensor

BATCH = 2 << 20
"""Bytes of each input in a batch, unless one tensor that must be whole is larger."""
UNKNOWN = "unknown"
"""ModelSpec's architecture for tensors of no known family."""


@dataclass(frozen=True)
class Repeated:
    """Names a merge that was made before."""

    recipe: Recipe
    bytes: int
    """Bytes of the whole file; 0 where that is not known."""


@dataclass(frozen=True)
class Job:
    """Describes a merge that can be run."""

    formula: Formula
    coefficients: Mapping[str, float]
    dtype: str | None
    policies: Mapping[str, str]
    inputs: Mapping[str, Input]
    """Models and LoRAs, by alias."""
    owner: Mapping[str, str]
    """Alias to the first alias of the same file, which is read for both."""
    plan: Plan
    lora_targets: Mapping[str, Mapping[str, tuple[str, ...]]]
    lora_alphas: Mapping[str, Mapping[str, float]]
    """What stands in no tensor of a LoRA: see `lora.alphas`."""
    by_weights: bool = True
    """False: the header names inputs by their files alone, as earlier versions wrote it."""
    repeats: Repeated | None = None
    """A merge that is made again, from inputs that were saved anew: the header says what its header said."""
    released: Mapping[str, str] = field(default_factory=dict)
    """What the header says of a release: see `Recipe.released`."""

    @cached_property
    def parts(self) -> Parts:
        base = self.inputs[self.plan.base]
        return canonical_parts(base.layout, base.shapes)

    def operands(self, task: Task) -> tuple[str, ...]:
        return operands(task, self.plan.base)

    def stored(self, alias: str, name: str) -> Stored:
        return self.inputs[alias].tensors[name]

    @cached_property
    def described(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {task.name: (task.dtype, task.shape) for task in self.plan.tasks.values()}

    @cached_property
    def _reserved(self) -> tuple[bytes, dict[str, int]]:
        stand_ins = {alias: ModelDigests(*[f"{number:064x}"] * 2) for number, alias in enumerate(self.owner)}
        recipe = self.repeats.recipe if self.repeats else self._recipe(stand_ins)
        text, offsets = header_bytes(self.described, self.metadata(recipe))
        missing = self.repeats.bytes - len(text) - self._bytes_of_tensors if self.repeats else 0
        text += b" " * max(missing, 0)  # two inputs of one sha256 share an entry, which is known too late
        return text, {name: offset + max(missing, 0) for name, offset in offsets.items()}

    @cached_property
    def _bytes_of_tensors(self) -> int:
        return sum(task.size for task in self.plan.tasks.values())

    @property
    def header_length(self) -> int:
        return len(self._reserved[0])

    @property
    def offsets(self) -> dict[str, int]:
        return self._reserved[1]

    @property
    def bytes_out(self) -> int:
        return self.header_length + self._bytes_of_tensors

    @property
    def bytes_in(self) -> int:
        """Add up the bytes of all distinct input files."""
        return sum(sum(self.inputs[owner].sizes) for owner in dict.fromkeys(self.owner.values()))

    def recipe(self, files: Mapping[str, str], known: Digests) -> Recipe:
        """Return the recipe of what was merged, given each alias's file sha256; `known` remembers the weights'.

        Raises BadInput where a merge is made again and an input is not the one that it was made of.
        """
        paths = {owner: self.inputs[owner].path for owner in dict.fromkeys(self.owner.values())}
        with ThreadPoolExecutor(len(paths)) as pool:
            reading = {owner: pool.submit(model_weights, path, files[owner], known) for owner, path in paths.items()}
        found = {alias: ModelDigests(files[alias], reading[owner].result()) for alias, owner in self.owner.items()}
        for alias in self.formula.loras:
            both, path = found[alias], self.inputs[alias].path
            found[alias] = ModelDigests(*(with_config(path, one, known) for one in (both.file, both.weights)))
        if self.repeats is None:
            return self._recipe(found)
        for alias, digests in found.items():
            if self.repeats.recipe.inputs[alias] not in (digests.weights, digests.file):
                raise BadInput(f"{self.inputs[alias].path} changed while it was read. Fetch or write it again.")
        return self.repeats.recipe

    def _recipe(self, found: Mapping[str, ModelDigests]) -> Recipe:
        files = {alias: digests.file for alias, digests in found.items()}
        weights = {alias: digests.weights for alias, digests in found.items()} if self.by_weights else files
        recipe = Recipe(
            self.formula,
            self.coefficients,
            weights,
            self.dtype,
            self.policies,
            files if self.by_weights else {},
            by_weights=self.by_weights,
            released=self.released,
        )
        return replace(recipe, ancestors=ancestors(recipe, {a: parent_recipe(self.inputs[a].metadata) for a in files}))

    def metadata(self, recipe: Recipe) -> dict[str, str]:
        """Return what the header of the merged file says beside its tensors."""
        base = self.inputs[self.plan.base]
        return metadata(
            recipe,
            architecture=base.layout.family.architecture if base.layout else UNKNOWN,
            prediction_type=base.prediction or (None if self.by_weights else "epsilon"),  # as earlier versions wrote it
        )

    def lora_tensors(self, alias: str, name: str) -> Mapping[str, Tensor]:
        """Read the tensors of a LoRA that one weight needs."""
        import torch

        opened = self.inputs[alias]
        found = {}
        for key in self.lora_targets[alias][name]:
            if key in self.lora_alphas[alias]:
                found[key] = torch.tensor(self.lora_alphas[alias][key])
                continue
            stored = opened.tensors[key]
            data = torch.empty(stored.size, dtype=torch.uint8)
            descriptor = os.open(opened.files[0], os.O_RDONLY)
            try:
                read_exactly(descriptor, [data.numpy().data], stored.ranges[0].start)
            finally:
                os.close(descriptor)
            found[key] = data.view(torch_dtypes()[stored.dtype]).reshape(stored.shape)
        return found

    def told(self) -> str:
        """Return what a dry run prints: formula by component and block, costs, audit."""
        lines = [self.formula.text]
        if self.coefficients:
            lines.append("with " + ", ".join(f"{name} = {value:g}" for name, value in self.coefficients.items()))
        family = self.inputs[self.plan.base].layout
        lines.append(f"family   {family.family.name if family else 'unknown: merged as plain tensors'}")
        for text, places in self.plan.groups().items():
            shown = ", ".join(f"{place} ({count})" for place, count in sorted(places.items()))
            lines.append(f"  {text}\n      {shown}")
        gigabytes = (self.bytes_in + self.bytes_out) / 1e9
        lines.append(f"read     {self.bytes_in:,} bytes of {len(set(self.owner.values()))} inputs")
        lines.append(f"write    {self.bytes_out:,} bytes")
        lines.append(f"memory   about {self.memory >> 20} MiB beside the program's own")
        lines.append(f"time     about {gigabytes / 1.0:.0f} s at 1 GB/s of disk")
        return "\n".join([*lines, *(f"audit    {line}" for line in self.plan.audit)])

    @property
    def memory(self) -> int:
        """Estimate the bytes of buffers: slots of a batch, and the largest tensor that must be whole."""
        batch = BATCH * (len(set(self.owner.values())) + 1)
        whole = [task.size * 4 * (len(task.models) + 2) for task in self.plan.tasks.values() if not task.mixture.linear]
        return batch * 6 + max(whole, default=0)


def open_job(
    formula: Formula,
    paths: Mapping[str, Path],
    *,
    coefficients: Mapping[str, float] | None = None,
    dtype: str | None = None,
    policies: Mapping[str, str] | None = None,
    by_weights: bool = True,
    repeats: Repeated | None = None,
    released: Mapping[str, str] | None = None,
) -> Job:
    """Plan a merge from headers alone. `paths` maps aliases, of models and LoRAs, to files or diffusers folders.

    by_weights, repeats, released: see `Job`.

    Raises AmbergradeError for whatever would go wrong later, as far as headers tell.
    """
    numbers = dict(coefficients or {})
    chosen = check_policies(policies or {}, (*formula.models, *paths))
    needed = input_names(formula, chosen)
    for alias in needed:
        if alias not in paths:
            raise UnknownName("model", alias, paths, f"The formula {formula.text} needs it.")
    formula.check_coefficients(numbers)
    inputs: dict[str, Input] = {}
    owner: dict[str, str] = {}
    first_of: dict[tuple[str, bool], str] = {}
    for alias in needed:
        is_lora = alias in formula.loras
        key = (os.path.realpath(paths[alias]), is_lora)
        owner[alias] = first_of.setdefault(key, alias)
        if owner[alias] == alias:
            first = inputs[formula.models[0]].layout if inputs else None
            inputs[alias] = open_input(alias, paths[alias], plain=is_lora, like=first.family if first else None)
        else:
            inputs[alias] = inputs[owner[alias]]
    shapes = inputs[formula.models[0]].shapes
    lora_targets, lora_alphas = {}, {}
    left_out: list[str] | None = [] if chosen["lora"] == "fitting" else None
    for alias in formula.loras:
        own = inputs[alias]
        lora_alphas[alias] = alphas(own.path, own.shapes, own.metadata)
        entries = {**own.shapes, **dict.fromkeys(lora_alphas[alias], ())}
        lora_targets[alias] = targets(entries, shapes, left_out)
        check_shapes(lora_targets[alias], entries, shapes)
    described = {
        alias: {name: (stored.dtype, stored.shape) for name, stored in inputs[alias].tensors.items()}
        for alias in needed
        if alias not in formula.loras
    }
    base = inputs[formula.models[0]]
    plan = make_plan(
        formula,
        numbers,
        described,
        dtype=dtype,
        policies=chosen,
        loras={alias: tuple(found) for alias, found in lora_targets.items()},
        predictions={alias: inputs[alias].prediction for alias in described},
        family=base.layout.family if base.layout else None,
    )
    plan.audit += [f"of a LoRA, left out: {complaint}" for complaint in left_out or ()]
    if base.layout is None:
        plan.audit.append("no known family: tensors of equal names are merged as plain tensors")
    how = by_weights, repeats, dict(released or {})
    return Job(formula, numbers, dtype, chosen, inputs, owner, plan, lora_targets, lora_alphas, *how)
