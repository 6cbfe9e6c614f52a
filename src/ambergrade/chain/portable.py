"""Makes a process compute the same bits on every x86-64 processor with AVX2.

Libraries choose their kernels by the processor, and other kernels add in another order. Each reads an environment
variable once, when it is loaded, so the choice must be made before torch and numpy are imported; worker processes
inherit it. Merges need none of this: their bits are the same everywhere.
"""

from __future__ import annotations

import os
import sys

from ambergrade.errors import BadSetting

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
ENVIRONMENT = {
    **dict.fromkeys(THREADS, "1"),
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own kernels
    "MKL_CBWR": "COMPATIBLE",  # the one mode that Intel promises for other makers' processors too
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OPENBLAS_CORETYPE": "Haswell",  # numpy's and scipy's matrices
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",  # as numpy 2.4 calls what goes beyond AVX2
}


def make_portable() -> None:
    """Choose the kernels of this process and of those it starts. Raises BadSetting where it is too late for that."""
    if is_portable():
        return
    loaded = [name for name in ("torch", "numpy") if name in sys.modules]
    if loaded:
        raise BadSetting(
            f"compute.portable comes too late: {' and '.join(loaded)} is loaded, with kernels for this processor.\n"
            "Call ambergrade.chain.portable.make_portable() before anything else is imported."
        )
    os.environ.update(ENVIRONMENT)
    os.environ.pop("DNNL_MAX_CPU_ISA", None)  # an earlier name of oneDNN's, which it still reads


def is_portable() -> bool:
    """Say whether the kernels of this process are the portable ones."""
    return all(os.environ.get(name) == value for name, value in ENVIRONMENT.items())
