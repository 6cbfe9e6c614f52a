"""What a family of models is, and how its two layouts hold the same weights.

The *single file* (A1111, ComfyUI, kohya) has the names of the original code; the *folder* (diffusers, transformers) has
one file or more for each component. A tensor's own name is its single file's. A plan of `Source`s says where each
tensor lies in a checkpoint of either layout; it is made from names and shapes alone, so headers suffice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ambergrade.errors import BadInput

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray
    from torch import Tensor

Shape = tuple[int, ...]
Form = Literal["as is", "1x1 conv", "matrix", "transposed", "stacked", "third"]


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from in a checkpoint, and what is done to it."""

    keys: tuple[str, ...]
    """The checkpoint's keys: one, or query, key and value for `stacked`."""
    form: Form = "as is"
    """`1x1 conv` adds two axes of length 1, `matrix` drops them; `stacked` joins three along the first axis, `third`
    takes one of three equal parts of it."""
    part: int = 0
    """Of `third`: 0 query, 1 key, 2 value."""

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """The tensor's shape, given those of the checkpoint. Raises BadInput where the form cannot be taken."""
        first, *others = (tuple(shapes[key]) for key in self.keys)
        match self.form:
            case "as is":
                return first
            case "1x1 conv" if len(first) == 2:
                return (*first, 1, 1)
            case "matrix" if len(first) == 4 and first[2:] == (1, 1):
                return first[:2]
            case "transposed" if len(first) == 2:
                return first[::-1]
            case "stacked" if first and all(other == first for other in others):
                return (3 * first[0], *first[1:])
            case "third" if first and first[0] % 3 == 0:
                return (first[0] // 3, *first[1:])
        found = ", ".join(f"{key} {tuple(shapes[key])}" for key in self.keys)
        raise BadInput(f"A tensor cannot be read as '{self.form}' from {found}: the shape does not allow it.")

    def take(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor itself; a view of the checkpoint's but for `stacked`."""
        parts = [tensors[key] for key in self.keys]
        match self.form:
            case "1x1 conv":
                return parts[0][:, :, None, None]
            case "matrix":
                return parts[0][:, :, 0, 0]
            case "transposed":
                return parts[0].T
            case "stacked":
                import torch  # slow to import, and names and shapes do without it

                return torch.cat(parts)
            case "third":
                return parts[0].chunk(3)[self.part]
        return parts[0]


@dataclass(frozen=True)
class Kind:
    """A kind of network: its names in both layouts and its shapes, by rule. See `original.py` and `tables.py`."""

    to_single: Callable[[Iterable[str]], dict[str, Source]]
    """diffusers keys to single-file key (without the component's prefix) and its source."""
    to_diffusers: Callable[[Iterable[str]], list[str]]
    """Single-file keys (without the prefix) to diffusers keys; what has no rule gives none."""
    shapes: Callable[[Mapping[str, Any]], dict[str, Shape]]
    """A `config.json` of diffusers or transformers to every key of its module and the shape."""


@dataclass(frozen=True)
class Component:
    """One network of a family."""

    kind: Kind
    prefix: str
    """Begins its keys in a single file."""
    config: Mapping[str, Any]
    """The published numbers, named as in diffusers' or transformers' `config.json`."""


@dataclass(frozen=True)
class Family:
    """Models whose tensors have the same names; the widths may differ."""

    name: str
    architecture: str
    """ModelSpec's word for it."""
    components: Mapping[str, Component]
    """By folder name of the diffusers layout."""
    passive: Collection[str] = ()
    """Single-file keys that no network reads; kept, so that files stay mergeable key by key."""
    variants: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of keys that some files have instead of our own, the longer ones first."""

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
        found: dict[str, Source] = {}
        for name, source in self.to_single(part, keys).items():
            if name in shapes:
                found |= _reversed(name, source, shapes[name])
        return found

    def into_module(self, part: str, keys: Iterable[str], shapes: Mapping[str, Shape]) -> dict[str, Source]:
        """A module's own keys to their sources among single-file tensors; keys that nothing there fills are left out.

        Right for any version of transformers, whose modules name the same weights differently.
        """
        found: dict[str, Source] = {}
        for name, source in self.to_single(part, keys).items():
            if name in shapes:
                found |= _reversed(name, source, shapes[name])
        return found


def _reversed(name: str, source: Source, shape: Shape) -> dict[str, Source]:
    """The sources of a single-file tensor's sources."""
    if source.form == "stacked":
        return {key: Source((name,), "third", part) for part, key in enumerate(source.keys)}
    back: dict[Form, Form] = {"1x1 conv": "matrix", "transposed": "transposed", "as is": "as is"}
    form = back[source.form]
    if form == "matrix" and len(shape) == 2:
        form = "as is"
    return {source.keys[0]: Source((name,), form)}


def to_single_file(family: Family, part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One component's tensors under single-file keys; most share memory with `state`."""
    return {name: source.take(state) for name, source in family.to_single(part, state).items()}


def from_single_file(
    family: Family, part: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape]
) -> dict[str, Tensor]:
    """One component's tensors under the diffusers keys that its module has.

    `shapes` maps those keys to the module's shapes. Raises BadInput naming what is missing, unexpected or misshapen.
    """
    wanted = family.to_single(part, shapes)
    mine = {name: tuple(tensor.shape) for name, tensor in tensors.items() if family.component_of(name) == part}
    complaints = [f"missing: {name}" for name in sorted(wanted.keys() - mine.keys())]
    complaints += [f"unexpected: {name}" for name in sorted(mine.keys() - wanted.keys())]
    state: dict[str, Tensor] = {}
    for name in sorted(wanted.keys() & mine.keys()):
        for key, source in _reversed(name, wanted[name], mine[name]).items():
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


def renamed(plan: Mapping[str, Source], rename: Callable[[str], str]) -> dict[str, Source]:
    """The same plan where the checkpoint's keys are called otherwise."""
    return {name: replace(source, keys=tuple(map(rename, source.keys))) for name, source in plan.items()}


def listed(complaints: Collection[str], most: int = 6) -> str:
    """The first lines of a list and how many more there are."""
    more = f"\n… and {len(complaints) - most} more" if len(complaints) > most else ""
    return "\n".join(list(complaints)[:most]) + more


def looks_transposed(tensor: ArrayLike, reference: ArrayLike) -> bool:
    """Whether a square matrix is nearer to the transpose of a relative's than to the relative's own.

    CLIP-G's `text_projection` is square, so a tool that forgets to transpose it between the layouts makes no error,
    only worse pictures. Relatives are those trained from one ancestor: their correlation is close to 1 one way and to
    0 the other; between strangers both are close to 0 and the answer is no.
    """
    ours, theirs = np.asarray(tensor, np.float64), np.asarray(reference, np.float64)
    if ours.ndim != 2 or ours.shape[0] != ours.shape[1] or ours.shape != theirs.shape:
        return False
    straight, crossed = _correlation(ours, theirs), _correlation(ours, theirs.T)
    return crossed > 0.5 and crossed > straight + 0.25


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    x, y = x - x.mean(), y - y.mean()
    length = math.sqrt(float((x * x).sum()) * float((y * y).sum()))
    return float((x * y).sum()) / length if length else 0.0
