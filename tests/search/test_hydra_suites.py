"""Hydra's own suites for launchers and batched sweepers, run against our sweeper."""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest
from hydra import version
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite, LauncherTestSuite

from hydra_plugins.ambergrade_sweeper.sweeper import AmbergradeSweeper

Plugins.instance()  # before a test saves Hydra's state and restores it: Ray's plugin registers its settings only once


@pytest.fixture(autouse=True)
def hydras_own_defaults() -> Iterator[None]:
    """A fresh process has this version base, under which jobs change to their folders; other tests set a newer one."""
    before = version.getbase()
    version.setbase("1.1")
    yield
    version.VersionBase.instance().version_base = before


def test_hydra_finds_the_plugin():
    assert AmbergradeSweeper in Plugins.instance().discover(Sweeper)


SLOW = ("joblib", "submitit_local", "ray")


def launchers(*overrides: str) -> list[Any]:
    """A case for each launcher, under our sweeper; Ray is asked where it is installed."""
    absent = find_spec("ray") is None or find_spec("hydra_plugins.hydra_ray_launcher") is None
    cases = [pytest.param("basic", ["hydra/sweeper=ambergrade", *overrides])]
    for name in SLOW:
        more = ["+hydra.launcher.ray.init.include_dashboard=false"] if name == "ray" else []
        marks = [pytest.mark.slow]
        if name == "ray":
            marks.append(
                pytest.mark.skipif(absent, reason="hydra-ray-launcher is not in the lock: pip install '.[ray]'")
            )
        cases.append(pytest.param(name, ["hydra/sweeper=ambergrade", *more, *overrides], marks=marks))
    return cases


@pytest.mark.parametrize(("launcher_name", "overrides"), launchers())
class TestLaunchers(LauncherTestSuite):
    pass


@pytest.mark.parametrize(("launcher_name", "overrides"), launchers("hydra.sweeper.max_batch_size=2"))
class TestBatches(BatchedSweeperTestSuite):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"),
    [
        pytest.param(
            {}, ["-m", f"hydra/launcher={case.values[0]}", *case.values[1]], id=case.values[0], marks=case.marks
        )
        for case in launchers()
    ],
)
class TestIntegration(IntegrationTestSuite):
    pass
