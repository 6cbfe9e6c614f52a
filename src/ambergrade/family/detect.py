"""Which family a checkpoint is of, in which layout, and where each tensor lies: from names and shapes alone."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from ambergrade.errors import BadInput
from ambergrade.family.layouts import Shape, Source, listed, renamed
from ambergrade.family.load import Family, families

__all__ = ["EMA", "Layout", "detect", "ema_name", "families"]

ENOUGH = 0.9
"""Of the keys of the components found, so many must be there: a few missing are a fault, many another family."""
EMA = "model_ema."


@dataclass(frozen=True)
class Layout:
    """What a checkpoint's headers say."""

    family: Family
    kind: Literal["single file", "folder"]
    sources: Mapping[str, Source]
    """Single-file name to source, for every tensor but those of `model_ema`. Variants are evened out."""
    missing: tuple[str, ...]
    """Single-file names that the components found should have; passive keys may always be missing."""
    absent: tuple[str, ...]
    """Components without a single key."""
    unexpected: tuple[str, ...]
    """Keys that belong to no component and are not known as passive."""
    misshapen: tuple[str, ...]
    """Where a component is of the published widths: what differs all the same, such as an inpainting `conv_in`."""
    ema: Mapping[str, str]
    """Single-file name to the key of its moving average, where there is one."""
    published_size: bool
    """Whether every shape is the published one."""


def detect(shapes: Mapping[str, Shape]) -> Layout:
    """The family and layout of a checkpoint.

    `shapes` maps its keys to shapes; those of a folder's component begin with its name and a slash, such as
    `unet/conv_in.weight`. Raises BadInput where no family fits, saying what the nearest lacks.
    """
    return _detected(tuple((key, tuple(shape)) for key, shape in shapes.items()))


def require(family: Family, shapes: Mapping[str, Shape], what: str) -> Layout:
    """`detect`, where the family is known. Raises BadInput, naming keys, where `what` is of another one."""
    layout = detect(shapes)
    if layout.family.name in (family.name, family.like):
        return layout
    own = {name for name in layout.sources if layout.family.component_of(name)}
    there, lacking = sorted(own - family.published.keys()), sorted(family.published.keys() - own)
    raise BadInput(
        f"{what} is of family {layout.family.name}, not {family.name}: it has {len(there)} tensors such as "
        f"'{(there or sorted(own))[0]}', and lacks {len(lacking)} such as '{lacking[0]}'.\n"
        f"Say family={layout.family.name}, or name another file."
    )


@functools.lru_cache(maxsize=4)  # the models of a merge have the same keys and shapes
def _detected(keys: tuple[tuple[str, Shape], ...]) -> Layout:
    shapes = dict(keys)
    fits = sorted((_fit(family, shapes) for family in families()), key=lambda fit: -fit.matched)
    best = fits[0]
    if best.expected and best.matched >= ENOUGH * best.expected:
        others = [fit for fit in fits[1:] if fit.matched == best.matched]
        if not others:
            return best.layout
        names = " and ".join(fit.layout.family.name for fit in [best, *others])
        raise BadInput(f"These {len(shapes)} tensors fit {names} alike: they hold only what those have in common.")
    layout = best.layout
    complaints = [f"missing: {name}" for name in layout.missing] + [f"unknown: {key}" for key in layout.unexpected]
    nearest = "Some of them:\n" + listed(sorted(shapes))
    if best.matched:
        count = f"has {best.expected} in these networks, of which {best.matched} are there"
        nearest = f"The nearest, {layout.family.name}, {count}:\n{listed(complaints)}"
    raise BadInput(
        f"These {len(shapes)} tensors are of no known family ({', '.join(family.name for family in families())}).\n"
        f"{nearest}\nA new family is one file: docs/how-to/add-a-family.md."
    )


def ema_name(name: str) -> str:
    """The key under which the original code keeps the moving average of a UNet's tensor.

    >>> ema_name("model.diffusion_model.out.2.bias")
    'model_ema.diffusion_modelout2bias'
    """
    return EMA + name.removeprefix("model.").replace(".", "")


@dataclass(frozen=True)
class _Fit:
    layout: Layout
    matched: int
    expected: int


def _fit(family: Family, shapes: Mapping[str, Shape]) -> _Fit:
    folder = any(key.startswith(tuple(f"{part}/" for part in family.components)) for key in shapes)
    sources, unexpected = _folder(family, shapes) if folder else _single(family, shapes)
    found = {name: source.shape(shapes) for name, source in sources.items()}
    published = family.published
    expected: dict[str, Shape] = {}
    absent, misshapen = [], []
    for part in family.components:
        mine = [name for name in found if family.component_of(name) == part]
        table = {name: shape for name, shape in published.items() if family.component_of(name) == part}
        if not mine:
            absent.append(part)
            continue
        wrong = [name for name in mine if name in table and found[name] != table[name]]
        if 2 * len(wrong) < len(mine):
            misshapen += [f"{name}: {found[name]}, published {table[name]}" for name in wrong]
        else:  # other widths, then perhaps another number of text layers
            table = _with_layers(family, part, mine)
        expected |= table
    known = expected.keys() & found.keys()
    unexpected += [name for name in found if family.component_of(name) and name not in expected]
    ema = {name: ema_name(name) for name in sorted(known) if ema_name(name) in shapes}
    averages = {key for key in shapes if key.startswith(EMA)} - {f"{EMA}decay", f"{EMA}num_updates"}
    unexpected += averages - set(ema.values())
    layout = Layout(
        family=family,
        kind="folder" if folder else "single file",
        sources=sources,
        missing=tuple(sorted(expected.keys() - found.keys())),
        absent=tuple(absent),
        unexpected=tuple(sorted(unexpected)),
        misshapen=tuple(misshapen),
        ema=ema,
        published_size=not misshapen and all(found[name] == published.get(name) for name in known),
    )
    return _Fit(layout, len(known), len(expected))


def _single(family: Family, shapes: Mapping[str, Shape]) -> tuple[dict[str, Source], list[str]]:
    sources: dict[str, Source] = {}
    for key, shape in shapes.items():
        if key.startswith(EMA):
            continue
        name = family.own_name(key)
        # Some tools save the 1x1 convolutions of the VAE's attention as the matrices that diffusers has.
        flat = re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", name) and len(shape) == 2
        sources[name] = Source((key,), "1x1 conv" if flat else "as is")
    unexpected = [name for name in sources if family.component_of(name) is None and name not in family.passive]
    return sources, unexpected


def _folder(family: Family, shapes: Mapping[str, Shape]) -> tuple[dict[str, Source], list[str]]:
    """Keys without a slash are those of the folder's own file for what no network holds: single-file names."""
    sources = {key: Source((key,)) for key in shapes if "/" not in key}
    unexpected = [key for key in sources if key not in family.passive]
    used: set[str] = set()
    for part in family.components:
        keys = [key.removeprefix(f"{part}/") for key in shapes if key.startswith(f"{part}/")]
        plan = renamed(family.to_single(part, keys), lambda key, part=part: f"{part}/{key}")  # type: ignore[misc]
        sources |= plan
        used |= {key for source in plan.values() for key in source.keys}
    # Index tables that transformers saved until 4.31 and that the second encoder has no place for in a single file.
    unused = [key for key in shapes if "/" in key and key not in used and not key.endswith(".position_ids")]
    return sources, unexpected + unused


def _with_layers(family: Family, part: str, mine: Collection[str]) -> dict[str, Shape]:
    """The component's table with as many text layers as the names have. Its shapes are not to be used."""
    component = family.components[part]
    keys = component.kind.to_diffusers(name.removeprefix(component.prefix) for name in mine)
    layers = [int(match[1]) for key in keys if (match := re.match(r"text_model\.encoder\.layers\.(\d+)\.", key))]
    config = {**component.config, "num_hidden_layers": max(layers, default=-1) + 1}
    shapes = component.kind.shapes(config)
    return {name: source.shape(shapes) for name, source in family.to_single(part, shapes).items()}
