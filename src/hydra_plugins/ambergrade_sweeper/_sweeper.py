"""The sweeper's class, below `hydra_plugins` as Hydra wants it; all that it does is in ambergrade/door/sweeper.py."""

from hydra.core.config_store import ConfigStore

from ambergrade.door.sweeper import SweeperBody, SweeperConf

ConfigStore.instance().store(group="hydra/sweeper", name="ambergrade", node=SweeperConf, provider="ambergrade")


class AmbergradeSweeper(SweeperBody):
    """Sweeps by searches and races, resumed at will."""
