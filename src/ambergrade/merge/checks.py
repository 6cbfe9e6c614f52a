"""What only values tell of a merge's operands, and the refusals that follow; from bytes, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from ambergrade.errors import BadInput
from ambergrade.family.dtypes import DTYPES, FLOATS
from ambergrade.family.layouts import looks_transposed
from ambergrade.merge.plan import Task

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
NUMPY = {word: dtype.numpy for word, dtype in DTYPES.items() if dtype.numpy}
"""safetensors' words for dtypes, to numpy's; little-endian, as the files are."""


def numbers(dtype: str, data: Array) -> Array:
    """The values of some bytes (uint8) as float64."""
    values: Array
    if dtype in NUMPY:
        values = data.view(np.dtype("<" + NUMPY[dtype])).astype(np.float64)
        return values
    if dtype == "BF16":  # the upper half of an fp32
        with np.errstate(invalid="ignore"):  # a signalling NaN is one more NaN
            values = (data.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return values
    if dtype == "F8_E5M2":  # the upper half of an fp16
        values = (data.astype(np.uint16) << 8).view(np.float16).astype(np.float64)
        return values
    assert dtype == "F8_E4M3", dtype  # the one without infinities: exponents of 4 bits, 7 for 1
    exponent, fraction = (data >> 3 & 15).astype(np.int32), (data & 7) / 8
    sizes = np.ldexp(fraction + (exponent > 0), np.maximum(exponent, 1) - 7)
    sizes[(data & 0x7F) == 0x7F] = np.nan
    values = np.where(data >> 7, -sizes, sizes)
    return values


def finite(dtype: str, data: Array) -> bool:
    """Whether some bytes (uint8) hold neither NaN nor infinity."""
    if dtype not in FLOATS or not len(data):
        return True
    infinite, bits = DTYPES[dtype].infinity, data.view(f"u{DTYPES[dtype].size}")
    sign = 1 << (8 * bits.itemsize - 1)
    # Without the sign a larger number has larger bits; of the negative ones the largest bits are the largest size.
    largest, smallest_negative = int(bits.view(f"i{bits.itemsize}").max()), int(bits.max())
    return largest < infinite and (smallest_negative < sign or smallest_negative - sign < infinite)


def check_operands(task: Task, values: Mapping[str, Array], base: str, *, cosmetic: str) -> None:
    """Refuse what only values tell: ids that are none, temperatures or markers that differ, a transposed matrix.

    `values` holds each operand as float64, in the single file's shape.
    """
    first = values[task.mixture.models[0]] if task.mixture.models else values[base]
    if task.name.endswith("position_ids") and first.size:
        ids = first.reshape(-1)
        if cosmetic == "refuse" and not np.array_equal(ids, np.arange(len(ids))):
            raise BadInput(
                f"'{task.name}' of {base} is not 0, 1, 2 …: another tool merged it like a weight.\n"
                "Mend or replace that file, or keep its ids with policies.cosmetic: base."
            )
    for alias in task.compared if cosmetic == "refuse" else ():
        other = values[alias]
        if first.shape != other.shape or not np.allclose(first, other, rtol=2**-7, atol=0):
            raise BadInput(
                f"'{task.name}' differs: {_few(first)} in {base}, {_few(other)} in {alias}.\n"
                "Check that the models belong together, or take the base's with policies.cosmetic: base."
            )
    if task.kind == "merge" and task.name.endswith("text_projection"):
        for alias in task.mixture.models:
            if alias != base and base in values and looks_transposed(values[alias], values[base]):
                raise BadInput(
                    f"'{task.name}' of {alias} is transposed against {base}'s: a tool forgot that diffusers and the "
                    "single file hold it differently.\nWrite one of the two files again with a tool that transposes it."
                )


def needs_values(task: Task) -> bool:
    """Whether `check_operands` looks at this tensor."""
    return bool(task.compared) or task.name.endswith(("position_ids", "text_projection"))


def refuse_nonfinite(task: Task, sound: Mapping[str, bool], what: str) -> None:
    """Say whose fault it is that the result is not finite; `sound` tells for each operand whether it is."""
    for alias in task.models:
        if not sound.get(alias, True):
            raise BadInput(f"'{task.name}' of {alias} holds NaN or infinity. Mend or replace that checkpoint.")
    raise BadInput(
        f"{what}\nThe merge leaves the range of {task.dtype} in '{task.name}'.\n"
        "Use smaller coefficients, or an output dtype of greater range (bf16, fp32)."
    )


def _few(x: Array) -> str:
    values = x.reshape(-1)[:3].tolist()
    return ", ".join(f"{value:g}" for value in values) + (" …" if math.prod(x.shape) > 3 else "") if values else "empty"
