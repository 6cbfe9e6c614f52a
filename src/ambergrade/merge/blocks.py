"""Which component and which block a single-file tensor name belongs to, for scopes and merge block weights.

The dialects of block weights disagree on two things (facts of both tools, not their code): SuperMerger takes the
time and label embeddings with IN00 and the VAE with BASE; sd-mecha takes the embeddings with BASE and gives the VAE a
value of its own, the 21st. In both the text encoders are BASE and the last layer `out` goes with the last OUT block.
"""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from ambergrade.errors import BadSetting, UnknownName
from ambergrade.family.load import families

DIALECTS = ("supermerger", "mecha")


@functools.cache
def _prefixes() -> tuple[tuple[str, str], ...]:
    """The beginnings of names and their components' short names, of all families: none contradicts another."""
    components = [component for family in families() for component in family.components.values()]
    return tuple({component.prefix: component.short for component in components}.items())


def component(name: str) -> str:
    """`unet`, `te1`, `te2`, `vae`, or '' for what belongs to none."""
    return next((short for prefix, short in _prefixes() if name.startswith(prefix)), "")


@functools.cache
def _blocks() -> dict[int, list[str]]:
    """How many values there may be, to the blocks they stand for, in order."""
    named = [["BASE", *family.block_names] for family in families()]
    return {len(names): names for names in [*named, *([*names, "VAE"] for names in named)]}


def block_weights(text: str, dialect: str) -> list[tuple[str, str]]:
    """Block and value as written (one spacing) of a comma-separated list. Raises BadSetting or UnknownName."""
    if dialect not in DIALECTS:
        raise UnknownName("MBW dialect", dialect, DIALECTS)
    values = [value.strip() for value in text.split(",")]
    if len(values) not in _blocks():
        known = [f"{len(f.block_names) + 1} ({f.name}: BASE, IN00 to {f.block_names[-1]})" for f in families()]
        raise BadSetting(
            f"{len(values)} block weights; there are {' or '.join(known)}, and one more for the VAE with dialect mecha."
        )
    if "VAE" in _blocks()[len(values)] and dialect != "mecha":
        raise BadSetting("The last value is the VAE's, which only the dialect mecha has; supermerger takes it as BASE.")
    for value in values:
        if not re.fullmatch(r"[+-]?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})", value):
            raise BadSetting(f"'{value[:40]}' is no block weight. Write decimal numbers, separated by commas.")
    return list(zip(_blocks()[len(values)], values, strict=True))


def block_of(name: str, dialect: str, count: int) -> str:
    """The block that `count` values give to a single-file tensor name."""
    names = _blocks()[count]
    if component(name) == "vae":
        return "VAE" if "VAE" in names else "BASE"
    if component(name) != "unet":
        return "BASE"
    part, _, rest = name.removeprefix("model.diffusion_model.").partition(".")
    if part in ("time_embed", "label_emb"):
        return "IN00" if dialect == "supermerger" else "BASE"
    if part == "middle_block":
        return "M00"
    if part == "out":
        return [block for block in names if block.startswith("OUT")][-1]
    number = rest.partition(".")[0]
    return f"{'IN' if part == 'input_blocks' else 'OUT'}{int(number):02}"


def mbw_weight(name: str, values: str, dialect: str) -> Fraction:
    """The second model's share in a tensor. Raises BadSetting for a block that the values do not name."""
    given = dict(block_weights(values, dialect))
    block = block_of(name, dialect, len(given))
    if block not in given:
        raise BadSetting(f"'{name}' lies in {block}, for which {len(given)} block weights have no value.")
    return Fraction(given[block])
