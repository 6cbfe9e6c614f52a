"""How the two layouts of a checkpoint hold the same weights.

The *single file* (A1111, ComfyUI, kohya) has the names of the original code; the *folder* (diffusers, transformers) has
one file or more for each component. A tensor's own name is its single file's. A plan of `Source`s says where each
tensor lies in a checkpoint of either layout; it is made from names and shapes alone, so headers suffice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
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
    """Chooses the part of `third`: 0 query, 1 key, 2 value."""

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

    def reversed(self, name: str, shape: Shape) -> dict[str, Source]:
        """The way back: the sources of this tensor's sources, once it is called `name` and has that shape."""
        if self.form == "stacked":
            return {key: Source((name,), "third", part) for part, key in enumerate(self.keys)}
        back: dict[Form, Form] = {"1x1 conv": "matrix", "transposed": "transposed", "as is": "as is"}
        form = back[self.form]
        if form == "matrix" and len(shape) == 2:
            form = "as is"
        return {self.keys[0]: Source((name,), form)}


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
    short: str
    """Its name in formulas and settings: `unet`, `vae`, `te1`, `te2`."""


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
