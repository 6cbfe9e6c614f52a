"""The heap of a process that trains on a CPU: memory freed in one step is kept for the next, not handed back."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

# Of glibc's malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3
LARGEST = 32 << 20
"""Bytes: where glibc's own moving threshold for blocks outside the heap ends."""


@contextmanager
def kept_heap() -> Iterator[None]:
    """While it lasts, glibc keeps freed memory, so that a step's tensors are not cleared and mapped page by page again.

    Blocks above 32 MB still come and go. Afterwards all that is free is handed back, and the thresholds are those at
    which glibc arrives by itself once such a block was freed. Nothing is changed where the user's environment says how
    to allocate, or where the C library is another.
    """
    libc = ctypes.CDLL(None)
    told = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get(
        "GLIBC_TUNABLES", ""
    )
    if told or not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, LARGEST)
    libc.mallopt(TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(TOP_PAD, 2 * LARGEST)
    try:
        yield
    finally:
        libc.mallopt(TRIM_THRESHOLD, 2 * LARGEST)
        libc.mallopt(TOP_PAD, 0)
        libc.malloc_trim(0)
