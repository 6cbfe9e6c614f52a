"""Hydra's own suites for launchers and batched sweepers, run against our sweeper."""

from collections.abc import Iterator

import pytest
from hydra import version
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, IntegrationTestSuite, LauncherTestSuite

from hydra_plugins.ambergrade_sweeper.sweeper import AmbergradeSweeper


@pytest.fixture(autouse=True)
def hydras_own_defaults() -> Iterator[None]:
    """A fresh process has this version base, under which jobs change to their folders; other tests set a newer one."""
    before = version.getbase()
    version.setbase("1.1")
    yield
    version.VersionBase.instance().version_base = before


def test_hydra_finds_the_plugin():
    assert AmbergradeSweeper in Plugins.instance().discover(Sweeper)


@pytest.mark.parametrize(
    ("launcher_name", "overrides"),
    [
        ("basic", ["hydra/sweeper=ambergrade"]),
        pytest.param("joblib", ["hydra/sweeper=ambergrade"], marks=pytest.mark.slow),
        pytest.param("submitit_local", ["hydra/sweeper=ambergrade"], marks=pytest.mark.slow),
    ],
)
class TestLaunchers(LauncherTestSuite):
    pass


@pytest.mark.parametrize(
    ("launcher_name", "overrides"), [("basic", ["hydra/sweeper=ambergrade", "hydra.sweeper.max_batch_size=2"])]
)
class TestBatches(BatchedSweeperTestSuite):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"), [({}, ["-m", "hydra/sweeper=ambergrade", "hydra/launcher=basic"])]
)
class TestIntegration(IntegrationTestSuite):
    pass
