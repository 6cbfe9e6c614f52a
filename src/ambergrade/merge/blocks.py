"""Which component and which block a single-file tensor name belongs to, for scopes and merge block weights.

The dialects of block weights disagree on two things (facts of both tools, not their code): SuperMerger takes the
time and label embeddings with IN00 and the VAE with BASE; sd-mecha takes the embeddings with BASE and gives the VAE a
value of its own, the 21st. In both the text encoders are BASE and the last layer `out` goes with the last OUT block.
"""

from __future__ import annotations

import re
from fractions import Fraction

from ambergrade.errors import BadSetting, UnknownName

DIALECTS = ("supermerger", "mecha")
_COMPONENTS = (
    ("unet", "model.diffusion_model."),
    ("vae", "first_stage_model."),
    ("te1", "conditioner.embedders.0."),
    ("te2", "conditioner.embedders.1."),
    ("te1", "cond_stage_model."),
)
_DEPTH = {20: 9, 21: 9, 26: 12}
"""Values given to the number of input (and output) blocks: SDXL has 9, SD 1.5 has 12."""


def component(name: str) -> str:
    """`unet`, `te1`, `te2`, `vae`, or '' for what belongs to none."""
    return next((word for word, prefix in _COMPONENTS if name.startswith(prefix)), "")


def block_names(count: int) -> list[str]:
    """The blocks that 20, 21 or 26 values stand for, in order."""
    depth = _DEPTH[count]
    inner = [f"IN{block:02}" for block in range(depth)]
    outer = [f"OUT{block:02}" for block in range(depth)]
    return ["BASE", *inner, "M00", *outer, *(["VAE"] if count == 21 else [])]


def block_weights(text: str, dialect: str) -> list[tuple[str, str]]:
    """Block and value as written (one spacing) of a comma-separated list. Raises BadSetting or UnknownName."""
    if dialect not in DIALECTS:
        raise UnknownName("MBW dialect", dialect, DIALECTS)
    values = [value.strip() for value in text.split(",")]
    if len(values) not in _DEPTH:
        raise BadSetting(
            f"{len(values)} block weights; there are 20 (SDXL: BASE, IN00-08, M00, OUT00-08), 21 (the same and VAE) "
            "or 26 (SD 1.5: BASE, IN00-11, M00, OUT00-11)."
        )
    if len(values) == 21 and dialect != "mecha":
        raise BadSetting("The 21st value is the VAE's, which only the dialect mecha has; supermerger takes it as BASE.")
    for value in values:
        if not re.fullmatch(r"[+-]?(\d{1,20}(\.\d{0,20})?|\.\d{1,20})", value):
            raise BadSetting(f"'{value[:40]}' is no block weight. Write decimal numbers, separated by commas.")
    return list(zip(block_names(len(values)), values, strict=True))


def block_of(name: str, dialect: str, count: int) -> str:
    """The block, as in `block_names`, of a single-file tensor name."""
    depth = _DEPTH[count]
    if component(name) == "vae":
        return "VAE" if count == 21 else "BASE"
    if component(name) != "unet":
        return "BASE"
    part, _, rest = name.removeprefix("model.diffusion_model.").partition(".")
    if part in ("time_embed", "label_emb"):
        return "IN00" if dialect == "supermerger" else "BASE"
    if part == "middle_block":
        return "M00"
    if part == "out":
        return f"OUT{depth - 1:02}"
    number = rest.partition(".")[0]
    return f"{'IN' if part == 'input_blocks' else 'OUT'}{int(number):02}"


def mbw_weight(name: str, values: str, dialect: str) -> Fraction:
    """The second model's share in a tensor. Raises BadSetting for a block that the values do not name."""
    given = dict(block_weights(values, dialect))
    block = block_of(name, dialect, len(given))
    if block not in given:
        raise BadSetting(f"'{name}' lies in {block}, for which {len(given)} block weights have no value.")
    return Fraction(given[block])
