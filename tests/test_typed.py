"""The reader of settings: dataclasses from plain mappings, every type checked and every complaint told at once."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pytest

from ambergrade.errors import BadSetting
from ambergrade.typed import settings


@dataclasses.dataclass(frozen=True)
class Rate:
    unet: float
    text: float = 0.0


@dataclasses.dataclass(frozen=True)
class Trainer:
    steps: int
    rate: Rate
    kind: Literal["fast", "slow"] = "fast"
    betas: tuple[float, float] = (0.9, 0.999)
    names: tuple[str, ...] = ()
    share: float | None = None
    table: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    seed: int | None = None
    folder: Path = Path()

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise BadSetting("steps cannot be negative.")


def test_settings_build_nested_dataclasses() -> None:
    values: dict[str, Any] = {
        "steps": 3,
        "rate": {"unet": 1},
        "betas": [0.5, 1],
        "names": ["a"],
        "share": 1,
        "table": {"x": [1, 2]},
        "folder": "here",
    }
    built = settings(Trainer, values)
    assert built == Trainer(3, Rate(1.0), "fast", (0.5, 1.0), ("a",), 1.0, {"x": (1, 2)}, None, Path("here"))
    assert isinstance(built.rate.unet, float)


def test_settings_gather_all_complaints() -> None:
    values: dict[str, Any] = {
        "step": 3,
        "rate": {"unett": 1, "unet": "x"},
        "kind": "fsat",
        "betas": [1],
        "names": "abc",
        "share": "much",
        "seed": True,
    }
    with pytest.raises(BadSetting) as told:
        settings(Trainer, values, where="trainer")
    text = str(told.value)
    for part in (
        "Did you mean 'trainer.steps'",
        "trainer.steps: no value given",
        "Did you mean 'trainer.rate.unet'",
        "trainer.rate.unet: a number is needed, found 'x'",
        "Did you mean 'fast'",
        "trainer.betas: 2 values are needed",
        "trainer.names: a list is needed, found 'abc'",
        "trainer.share: a number or null is needed, found 'much'",
        "trainer.seed: a whole number or null is needed, found True",
    ):
        assert part in text, part
    with pytest.raises(BadSetting, match="trainer: steps cannot be negative"):
        settings(Trainer, {"steps": -1, "rate": {"unet": 1.0}}, where="trainer")


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"steps": None, "rate": {"unet": 1.0}}, "trainer.steps: a whole number is needed, found None."),
        ({"steps": 1.5, "rate": {"unet": 1.0}}, "trainer.steps: a whole number is needed, found 1.5."),
        ({"steps": 1, "rate": {"unet": None}}, "trainer.rate.unet: a number is needed, found None."),
        ({"steps": 1, "rate": {"unet": math.nan}}, "trainer.rate.unet: a finite number is needed, found nan."),
        ({"steps": 1, "rate": {"unet": -math.inf}}, "trainer.rate.unet: a finite number is needed, found -inf."),
        ({"steps": True, "rate": {"unet": 1.0}}, "trainer.steps: a whole number is needed, found True."),
        ({"steps": 1, "rate": "false"}, "trainer.rate: a mapping is needed, found 'false'."),
    ],
)
def test_nulls_and_numbers_that_are_none_are_told_with_their_key(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(BadSetting, match=re.escape(complaint)):
        settings(Trainer, values, where="trainer")


def test_infinity_hides_nowhere_in_an_open_value() -> None:
    @dataclasses.dataclass(frozen=True)
    class Open:
        parameters: Mapping[str, Any]

    with pytest.raises(BadSetting, match=re.escape("parameters.betas[1]: a finite number is needed, found inf.")):
        settings(Open, {"parameters": {"betas": [0.9, math.inf]}})
