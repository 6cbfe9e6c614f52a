"""What a family of models is: `family(name)` gives its names, its layouts, its blocks, and its live networks.

A family is one module of this package that defines `FAMILY`, and one yaml of conf/family; nothing is registered.
torch, diffusers and transformers are imported only where tensors or networks are made.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambergrade import family as package
from ambergrade.errors import BadInput, BadSetting, UnknownName
from ambergrade.family.files import (
    PASSIVE_FILE,
    entries,
    read_metadata,
    read_tensors,
    weight_files,
    weights_digest,
)
from ambergrade.family.layouts import Component, Shape, Source, listed
from ambergrade.family.prediction import lacking_marks, prediction_type, read_scheduler

if TYPE_CHECKING:
    from torch import Tensor

    from ambergrade.family.networks import Networks


@dataclass(frozen=True)
class Family:
    """Models whose tensors have the same names; the widths may differ."""

    name: str
    architecture: str
    """ModelSpec's word for it."""
    components: Mapping[str, Component]
    """By folder name of the diffusers layout."""
    blocks: int
    """Input blocks of the UNet, and as many output blocks: what block weights (MBW) count."""
    passive: Collection[str] = ()
    """Single-file keys that no network reads; kept, so that files stay mergeable key by key."""
    variants: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of keys that some files have instead of our own, the longer ones first."""
    live: str = ""
    """The module of this package whose `Networks` are its own; empty where there are only names."""
    like: str = ""
    """The family whose structure it has at other widths; files do not tell the two apart."""

    # --- live networks and checkpoints

    @property
    def networks(self) -> type[Networks]:
        """The class of its networks, to train and draw with. Raises BadSetting where it has none."""
        if not self.live:
            able = ", ".join(family.name for family in _all() if family.live)
            raise BadSetting(
                f"The networks of family {self.name} cannot be loaded: it can be inspected, converted and merged.\n"
                f"Training and drawing work with family={able}."
            )
        found: type[Networks] = importlib.import_module(f"{package.__name__}.{self.live}").Networks
        return found

    def read_checkpoint(self, path: Path) -> dict[str, Tensor]:
        """Weights under single-file keys, from a single file or a diffusers folder; pickles are refused.

        What only a folder's scheduler or a file's header say of the prediction type is said by marks as well.
        """
        import torch

        found: dict[str, Tensor] = {}
        if path.is_dir():
            for part in self.components:
                state: dict[str, Tensor] = {}
                for file in weight_files(path / part):
                    state |= read_tensors(file)
                found |= self.single_tensors(part, state)
            found |= read_tensors(path / PASSIVE_FILE) if (path / PASSIVE_FILE).is_file() else {}
            lacking = lacking_marks(found, None, read_scheduler(path))
        else:
            found = read_tensors(path)
            lacking = lacking_marks(found, read_metadata(path))
        return found | {mark: torch.empty(0) for mark in lacking}

    def prediction_type(self, path: Path) -> str | None:
        """`epsilon`, `v`, `flow` or another word, as a checkpoint's headers say; None where nothing says."""
        keys = entries(path, self.components)
        if path.is_dir():
            return prediction_type(keys, None, read_scheduler(path))
        return prediction_type(keys, read_metadata(path))

    def weights_digest(self, path: Path) -> str:
        """sha256 over the names and values of a checkpoint, whatever its layout, header and file name."""
        return weights_digest(self.read_checkpoint(path))

    # --- names, and shapes by name

    @property
    def trained(self) -> tuple[str, ...]:
        """The components that may be trained: all but the VAE."""
        return tuple(name for name, component in self.components.items() if component.short != "vae")

    @property
    def parts(self) -> tuple[str, ...]:
        """The short names of what may be trained, each with a learning rate of its own."""
        return tuple(self.components[name].short for name in self.trained)

    @property
    def block_names(self) -> tuple[str, ...]:
        """The UNet's blocks as SuperMerger calls them: IN00 …, M00, OUT00 …"""
        numbers = [f"{number:02}" for number in range(self.blocks)]
        return (*(f"IN{number}" for number in numbers), "M00", *(f"OUT{number}" for number in numbers))

    def own_name(self, key: str) -> str:
        """A single-file key with a known variant of its beginning evened out."""
        for theirs, ours in self.variants.items():
            if key.startswith(theirs) and not key.startswith(ours):
                return ours + key.removeprefix(theirs)
        return key

    def component_of(self, name: str) -> str | None:
        """Which component a single-file key belongs to; None for what no network holds."""
        if name in self.passive:
            return None
        for part, component in self.components.items():
            if name.startswith(component.prefix):
                return part
        return None

    def table(self, configs: Mapping[str, Mapping[str, Any]] | None = None) -> dict[str, Shape]:
        """Every single-file key that a network holds, with its shape; of the published widths or those of `configs`.

        `configs` maps components to the contents of their `config.json`.
        """
        found: dict[str, Shape] = {}
        for part, component in self.components.items():
            shapes = component.kind.shapes((configs or {}).get(part, component.config))
            found |= {name: source.shape(shapes) for name, source in self.to_single(part, shapes).items()}
        return found

    @cached_property
    def published(self) -> dict[str, Shape]:
        """`table()`, of the published widths."""
        return self.table()

    def to_single(self, part: str, keys: Iterable[str]) -> dict[str, Source]:
        """Single-file key to its source, for the diffusers keys of one component."""
        component = self.components[part]
        return {component.prefix + name: source for name, source in component.kind.to_single(keys).items()}

    def to_diffusers(self, part: str, shapes: Mapping[str, Shape]) -> dict[str, Source]:
        """diffusers key to its source, for those of the single-file keys that belong to the component.

        Keys that no rule knows are left out; `shapes` tells 1x1 convolutions that were saved as matrices.
        """
        component = self.components[part]
        mine = [name for name in shapes if self.component_of(name) == part]
        keys = component.kind.to_diffusers(name.removeprefix(component.prefix) for name in mine)
        return self.into_module(part, keys, shapes)

    def into_module(self, part: str, keys: Iterable[str], shapes: Mapping[str, Shape]) -> dict[str, Source]:
        """A module's own keys to their sources among single-file tensors; keys that nothing there fills are left out.

        Right for any version of transformers, whose modules name the same weights differently.
        """
        found: dict[str, Source] = {}
        for name, source in self.to_single(part, keys).items():
            if name in shapes:
                found |= source.reversed(name, shapes[name])
        return found

    # --- the same, of tensors

    def single_tensors(self, part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One component's tensors under single-file keys; most share memory with `state`."""
        return {name: source.take(state) for name, source in self.to_single(part, state).items()}

    def module_tensors(
        self, part: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape]
    ) -> dict[str, Tensor]:
        """One component's tensors under the diffusers keys that its module has.

        `shapes` maps those keys to the module's shapes. Raises BadInput naming what is missing, unknown or misshapen.
        """
        wanted = self.to_single(part, shapes)
        mine = {name: tuple(tensor.shape) for name, tensor in tensors.items() if self.component_of(name) == part}
        complaints = [f"missing: {name}" for name in sorted(wanted.keys() - mine.keys())]
        complaints += [f"unexpected: {name}" for name in sorted(mine.keys() - wanted.keys())]
        state: dict[str, Tensor] = {}
        for name in sorted(wanted.keys() & mine.keys()):
            for key, source in wanted[name].reversed(name, mine[name]).items():
                if source.shape(mine) != tuple(shapes[key]):
                    complaints.append(f"shape: {name} gives {source.shape(mine)}, the {part} has {tuple(shapes[key])}")
                else:
                    state[key] = source.take(tensors)
        if complaints:
            raise BadInput(
                f"These weights do not fit the {part}:\n{listed(complaints)}\n"
                "Check that the checkpoint and the family's config folder belong together."
            )
        return state


def family(name: str) -> Family:
    """The family of that name. Raises UnknownName with the nearest.

    >>> family("sdxl").parts
    ('unet', 'te1', 'te2')
    """
    known = {each.name: each for each in _all()}
    if name not in known:
        raise UnknownName("family", name, known, "A new family is one file: docs/how-to/add-a-family.md.")
    return known[name]


def families() -> tuple[Family, ...]:
    """The families that names and shapes can tell apart, by name."""
    return tuple(each for each in _all() if not each.like)


@functools.cache
def _all() -> tuple[Family, ...]:
    """Every module of this package that defines `FAMILY`, by name."""
    modules = (
        importlib.import_module(f"{package.__name__}.{info.name}") for info in pkgutil.iter_modules(package.__path__)
    )
    found = (getattr(module, "FAMILY", None) for module in modules)
    return tuple(sorted((each for each in found if each), key=lambda each: each.name))
