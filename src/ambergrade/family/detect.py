"""Which family a checkpoint is of, in which layout, and where each tensor lies: from names and shapes alone."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ambergrade.errors import BadInput
from ambergrade.family.layouts import Shape, Source, listed, renamed
from ambergrade.family.load import Family, families

__all__ = ["EMA", "Layout", "detect", "ema_name", "families", "naming_hint", "require"]

ENOUGH = 0.9
"""The share of the found components' keys that must be there: a few missing are a fault, many another family."""
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


def detect(shapes: Mapping[str, Shape], like: Family | None = None) -> Layout:
    """The family and layout of a checkpoint, or of a UNet or a VAE that was saved alone.

    `shapes` maps its keys to shapes; those of a folder's component begin with its name and a slash, such as
    `unet/conv_in.weight`. `like` decides where families have the tensors in common, as SD 1.x and SDXL have the VAE's.
    Raises BadInput where no family fits, saying what the nearest lacks.
    """
    return _detected(tuple((key, tuple(shape)) for key, shape in shapes.items()), like.name if like else "")


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


@functools.lru_cache(maxsize=8)  # the models of a merge have the same keys and shapes
def _detected(keys: tuple[tuple[str, Shape], ...], like: str) -> Layout:
    shapes = dict(keys)
    fits = sorted((_fit(family, shapes) for family in families()), key=lambda fit: -fit.matched)
    if not fits[0].enough:
        alone = sorted((fit for family in families() for fit in _alone(family, shapes)), key=lambda fit: -fit.matched)
        fits = alone if alone and alone[0].enough else fits
    best = fits[0]
    if best.enough:
        same = {fit.layout.family.name: fit for fit in reversed(fits) if fit.matched == best.matched}
        if len(same) == 1 or like in same:
            return same.get(like, best).layout
        names = " and ".join(sorted(same))
        raise BadInput(f"These {len(shapes)} tensors fit {names} alike: they hold only what those have in common.")
    layout = best.layout
    complaints = [f"missing: {name}" for name in layout.missing] + [f"unknown: {key}" for key in layout.unexpected]
    nearest = "Some of them:\n" + listed(sorted(shapes))
    if best.matched:
        count = f"has {best.expected} in these networks, of which {best.matched} are there"
        nearest = f"The nearest, {layout.family.name}, {count}:\n{listed(complaints)}"
    raise BadInput(
        f"These {len(shapes)} tensors are of no known family ({', '.join(family.name for family in families())}).\n"
        f"{nearest}\n{naming_hint(shapes) or 'A new family is one file: docs/how-to/add-a-family.md.'}"
    )


def naming_hint(keys: Collection[str]) -> str:
    """What to say where only the names of tensors are in the way; empty where they are not."""
    first = {key.partition(".")[0] for key in keys}
    known = tuple(component.prefix for family in families() for component in family.components.values())
    if len(first) == 1 and any(key.partition(".")[2].startswith(known) for key in keys):
        word = first.pop()
        return (
            f"The names are the cause: every key begins with '{word}.', as a wrapper of torch's saves it.\n"
            "Save the file again with that beginning taken off the keys."
        )
    theirs = [key for key in keys if "text_model.encoder.layers." in key and not key.startswith(known)]
    if theirs and not any("/" in key for key in theirs):
        return (
            f"The names are the cause: '{theirs[0]}' is what transformers calls it; single files have the original "
            "names.\nUse the diffusers folder, or a file that was converted for A1111 or ComfyUI."
        )
    return ""


@functools.cache
def _names_of(family: str, part: str) -> frozenset[str]:
    """The single-file names of one component."""
    table = next(each for each in families() if each.name == family)
    return frozenset(name for name in table.published if table.component_of(name) == part)


def _alone(family: Family, shapes: Mapping[str, Shape]) -> Iterator[_Fit]:
    """A UNet or a VAE without the others, under the original names or diffusers', without the whole prefix."""
    for part, component in family.components.items():
        if component.short not in ("unet", "vae"):
            continue
        words = component.prefix.split(".")
        begins = [f"{part}/", *(".".join(words[:cut]) + "." for cut in range(1, len(words)))]
        for begin in begins:
            names = {key: key if key in family.passive else begin + key for key in shapes}
            known = component.kind.shapes(component.config) if begin.endswith("/") else _names_of(family.name, part)
            beginning = len(begin) if begin.endswith("/") else 0
            if sum(name[beginning:] in known for name in names.values()) < ENOUGH * len(known):
                continue
            fit = _fit(family, {names[key]: shape for key, shape in shapes.items()})
            if fit.enough:
                back = {name: key for key, name in names.items()}
                layout = replace(
                    fit.layout,
                    kind="single file",
                    sources=renamed(fit.layout.sources, back.__getitem__),
                    unexpected=tuple(back.get(name, name) for name in fit.layout.unexpected),
                )
                yield replace(fit, layout=layout)


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

    @property
    def enough(self) -> bool:
        return self.expected > 0 and self.matched >= ENOUGH * self.expected


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
