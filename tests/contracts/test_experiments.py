"""Every experiment and family composes into settings, and what they configure accepts them."""

import re

import pytest
import yaml

from ambergrade.captions.buckets import aspect_buckets
from ambergrade.chain.settings import GammaSettings, TrainPipelineSettings
from ambergrade.door.compose import compose, read
from ambergrade.family.load import family
from ambergrade.merge.formula import Formula
from ambergrade.places import CONF
from ambergrade.search.load import search

LEFT_TO_THE_USER = {
    "gamma_rev1": [
        *("data.database=d", "data.pictures=p", "data.reference=r"),
        *("prompts.sweep=s", "prompts.heldout=h"),
    ]
}


def names(kind: str) -> list[str]:
    return sorted(path.stem for path in (CONF / kind).glob("*.yaml"))


CHAINS = [name for name in names("experiment") if name.startswith("gamma")]
TRAININGS = [name for name in names("experiment") if name not in CHAINS]


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_composes_into_settings_whose_search_fits_its_formula(name: str) -> None:
    cfg = compose("gamma", [f"experiment={name}", *LEFT_TO_THE_USER.get(name, [])])
    settings = read(GammaSettings, cfg)
    settings.trainer.accumulation(1)
    formula = Formula.parse(settings.merge.formula, [*settings.models, settings.trained])
    assert formula.models[0] == settings.base
    points = search(**settings.search.parameters)
    assert len(points) >= 4
    assert set(points.ask() or {}) == set(formula.coefficients)


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_composes_into_settings(name: str) -> None:
    text = (CONF / "experiment" / f"{name}.yaml").read_text()
    assert re.search(r"python pipelines/train\.py experiment=" + name, text)
    settings = read(TrainPipelineSettings, compose("train", [f"experiment={name}"]))
    assert settings.base in settings.models


@pytest.mark.parametrize("name", names("family"))
def test_a_family_has_buckets_and_a_module(name: str) -> None:
    chosen = yaml.safe_load((CONF / "family" / f"{name}.yaml").read_text())
    buckets = aspect_buckets(*(chosen[key] for key in ("resolution", "bucket_step", "min_side", "max_side")))
    assert (chosen["resolution"], chosen["resolution"]) in buckets
    assert family(chosen["name"]).name == name


def test_the_card_s_point_lies_inside_the_sweep() -> None:
    settings = read(GammaSettings, compose("gamma", ["experiment=gamma_tiny"]))
    for name, value in settings.merge.coefficients.items():
        values = [float(one) for one in settings.search.values[name]]  # type: ignore[arg-type]
        assert len(values) >= 5
        assert min(values) < value < max(values)
