"""Ambergrade: diffusion base models into graded releases: train, merge, evaluate, release.

    import ambergrade
    ambergrade.merge_files("z = x + a * (y - x)", {"x": …, "y": …}, out, coefficients={"a": 0.5})

`ambergrade.api` lists what may be used from Python; it is loaded when it is first asked for.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = [
    "compare_releases",
    "compare_sheets",
    "merge_files",
    "parse_formula",
    "score_pictures",
    "sweep",
    "verify_file",
    "verify_release",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(
            f"module 'ambergrade' has no attribute '{name}'; the public names are {', '.join(__all__)}"
        )
    from ambergrade import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
