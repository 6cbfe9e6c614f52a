"""Says what a release is made with: packages, lock, and the instruction set of torch's kernels."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, distribution, version

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ambergrade.chain.portable import is_portable
from ambergrade.identity import file_digest
from ambergrade.places import CHECKOUT
from ambergrade.release.facts import Environment


def environment() -> Environment:
    """Look at this process."""
    import torch

    lock = CHECKOUT / "requirements.lock" if CHECKOUT else None
    return Environment(
        ambergrade=version("ambergrade"),
        python=platform.python_version(),
        isa=torch.backends.cpu.get_cpu_capability() + (", portable" if is_portable() else ""),
        lock=file_digest(lock) if lock and lock.is_file() else None,
        packages=packages("ambergrade"),
    )


def packages(name: str) -> dict[str, str]:
    """Return every distribution that one needs here, directly or not, with its version; extras only where asked for."""
    found: dict[str, str] = {}
    waiting, seen = [(name, frozenset[str]())], set[tuple[str, frozenset[str]]]()
    while waiting:
        asked = waiting.pop()
        if asked in seen:
            continue
        seen.add(asked)
        try:
            there = distribution(asked[0])
        except PackageNotFoundError:  # optional on this system
            continue
        found[canonicalize_name(there.metadata["Name"])] = there.version
        for text in there.requires or ():
            needed = Requirement(text)
            extras = asked[1] or {""}
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append((canonicalize_name(needed.name), frozenset(needed.extras)))
    del found[canonicalize_name(name)]
    return dict(sorted(found.items()))
