"""Knows where the product's own files lie: in a checkout beside src/, in an installed wheel inside the package."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).parent
CHECKOUT = PACKAGE.parents[1] if (PACKAGE.parents[1] / "pyproject.toml").is_file() else None
"""The repository that this code runs from; None where it was installed."""
CONF = CHECKOUT / "conf" if CHECKOUT else PACKAGE / "conf"
PIPELINES = CHECKOUT / "pipelines" if CHECKOUT else PACKAGE / "pipelines"
PROJECT = "ambergrade.yaml"
"""Marks a user's project; `ambergrade init` writes it."""


def project() -> Path | None:
    """The user's project that the working folder lies in; None outside of one."""
    here = Path.cwd()
    return next((folder for folder in (here, *here.parents) if (folder / PROJECT).is_file()), None)


def default_root() -> Path:
    """The folder that gets mlruns/: AMBERGRADE_ROOT, else the user's project, the checkout, the working folder."""
    given = os.environ.get("AMBERGRADE_ROOT")
    return Path(given) if given else project() or CHECKOUT or Path.cwd()
