"""What the settings of a pipeline refuse by themselves, before anything is loaded or drawn for them."""

from typing import Any

import pytest

from ambergrade.chain.settings import EvaluateSettings, GammaSettings, SweepSettings, TrainPipelineSettings
from ambergrade.door.compose import compose, read
from ambergrade.errors import BadSetting

BETA7 = "builtin://beta7.safetensors"


@pytest.mark.parametrize(
    ("cls", "name", "overrides"),
    [
        (GammaSettings, "gamma", []),
        (TrainPipelineSettings, "train", []),
        (SweepSettings, "sweep", ["merge=gamma_rev1", f"models.base7={BETA7}"]),
        (EvaluateSettings, "evaluate", [f"model={BETA7}"]),
    ],
)
def test_a_family_without_networks_is_refused_at_once(cls: type[Any], name: str, overrides: list[str]) -> None:
    read(cls, compose(name, overrides))
    with pytest.raises(BadSetting, match=r"family sd15 cannot be loaded.*\n.*family=sdxl, sdxl_tiny"):
        read(cls, compose(name, [*overrides, "family=sd15"]))
