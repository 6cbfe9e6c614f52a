"""The dtypes of safetensors files: what every room knows of them, in one table."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Dtype:
    """One dtype, little-endian in files."""

    size: int
    """Bytes of an element."""
    torch: str
    """torch's name."""
    numpy: str = ""
    """numpy's code; empty where it has no such type."""
    digits: int = -1
    """Stored digits of the significand; -1 of whole numbers."""
    least: int = 0
    """The exponent of the smallest normal number."""
    short: str = ""
    """What recipes call it, where a merge may be written in it."""
    has_infinity: bool = True

    @property
    def infinity(self) -> int:
        """The bits of infinity, or of NaN where there is none: of the smallest number that is none."""
        return (1 << (8 * self.size - 1)) - ((1 << self.digits) if self.has_infinity else 1)


DTYPES: Mapping[str, Dtype] = {
    "F64": Dtype(8, "float64", "f8", 52, -1022),
    "F32": Dtype(4, "float32", "f4", 23, -126, "fp32"),
    "F16": Dtype(2, "float16", "f2", 10, -14, "fp16"),
    "BF16": Dtype(2, "bfloat16", "", 7, -126, "bf16"),
    "F8_E4M3": Dtype(1, "float8_e4m3fn", "", 3, -6, has_infinity=False),
    "F8_E5M2": Dtype(1, "float8_e5m2", "", 2, -14),
    **{f"I{8 * size}": Dtype(size, f"int{8 * size}", f"i{size}") for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": Dtype(size, f"uint{8 * size}", f"u{size}") for size in (1, 2, 4, 8)},
    "BOOL": Dtype(1, "bool", "?"),
}
"""By safetensors' words."""
ITEM = {word: dtype.size for word, dtype in DTYPES.items()}
"""Bytes of one element."""
FLOATS = frozenset(word for word, dtype in DTYPES.items() if dtype.digits >= 0)


@functools.cache
def torch_dtypes() -> dict[str, torch.dtype]:
    """safetensors' words to torch's dtypes. Headers are read without torch, which takes seconds to import."""
    import torch

    return {word: getattr(torch, dtype.torch) for word, dtype in DTYPES.items()}


@functools.cache
def words() -> dict[torch.dtype, str]:
    """torch's dtypes to safetensors' words."""
    return {dtype: word for word, dtype in torch_dtypes().items()}
