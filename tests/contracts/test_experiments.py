"""Every experiment and family composes, and its settings are accepted by what they configure."""

import pytest
import yaml

from ambergrade import config
from ambergrade.captions.buckets import aspect_buckets
from ambergrade.captions.recipe import CaptionRecipe
from ambergrade.captions.selection import Selection
from ambergrade.merge.formula import Formula
from ambergrade.nouns import SamplerSettings
from ambergrade.search.load import search
from ambergrade.train.settings import TrainSettings

LEFT_TO_THE_USER = {
    "gamma_rev1": [
        *("data.database=d", "data.pictures=p", "data.reference=r"),
        *("prompts.sweep=s", "prompts.heldout=h"),
    ]
}


def names(kind: str) -> list[str]:
    return sorted(path.stem for path in (config.CONF / kind).glob("*.yaml"))


# experiments of the other pipelines are tested beside those
CHAINS = [name for name in names("experiment") if name.startswith("gamma")]


@pytest.mark.parametrize("name", CHAINS)
def test_experiment_composes_into_settings_that_every_room_accepts(name: str) -> None:
    overrides = [f"experiment={name}", *LEFT_TO_THE_USER.get(name, [])]
    settings = config.plain(config.compose("gamma", overrides))
    TrainSettings.read(settings["trainer"]).accumulation(1)
    config.settings(SamplerSettings, settings["sampler"])
    config.settings(Selection, {**settings["data"]["selection"], "split": "train"})
    recipe = CaptionRecipe.from_dict(settings["captions"])
    assert recipe.name == settings["captions"]["name"]
    models = [*settings["models"], settings["trained"]]
    formula = Formula.parse(settings["merge"]["formula"], models)
    formula.check_coefficients(settings["merge"]["coefficients"])
    assert formula.models[0] == settings["base"]
    points = search(**settings["search"])
    assert len(points) >= 4
    assert set(points.ask() or {}) == set(formula.coefficients)


@pytest.mark.parametrize("name", names("family"))
def test_family_has_buckets(name: str) -> None:
    family = yaml.safe_load((config.CONF / "family" / f"{name}.yaml").read_text())
    buckets = aspect_buckets(*(family[key] for key in ("resolution", "bucket_step", "min_side", "max_side")))
    assert (family["resolution"], family["resolution"]) in buckets


def test_card_s_point_lies_inside_the_sweep() -> None:
    settings = config.plain(config.compose("gamma", ["experiment=gamma_tiny"]))
    for name, value in settings["merge"]["coefficients"].items():
        values = settings["search"]["values"][name]
        assert len(values) >= 5
        assert min(values) < value < max(values)
