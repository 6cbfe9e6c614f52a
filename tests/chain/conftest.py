"""A context without MLflow, and a drawn world of a few pictures."""

from dataclasses import replace
from pathlib import Path

import pytest

from ambergrade.chain.context import Context
from ambergrade.chain.dataset import draw_world
from ambergrade.chain.settings import Compute, DataSettings, Drawing, GammaSettings
from ambergrade.door.compose import compose, read
from ambergrade.track.journal import Journal, Run

COMPUTE = Compute("cpu", 1, 1)


def context_of(root: Path) -> Context:
    """A context whose journal is closed: nothing is told to MLflow."""
    journal = Journal(None, "", "", root)
    return Context(root, journal, Run(journal, "", "", "", done=False, resumed=False), COMPUTE)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return context_of(tmp_path / "root")


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> GammaSettings:
    """The settings of gamma_smoke on a world of 40 posts that is drawn once."""
    root = tmp_path_factory.mktemp("smoke")
    settings = read(GammaSettings, compose("gamma", ["experiment=gamma_smoke", f"root={root}", "data.draw.count=40"]))
    draw_world(settings.data, COMPUTE)
    return settings


@pytest.fixture
def data(smoke: GammaSettings) -> DataSettings:
    return smoke.data


__all__ = ["COMPUTE", "Drawing", "context_of", "replace"]
