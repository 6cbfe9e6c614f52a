"""kohaku-2024-01 against cases computed by hand from the historical rules."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from ambergrade.captions.recipe import CaptionRecipe, caption
from ambergrade.errors import BadInput, BadSetting
from ambergrade.nouns import Caption, Post
from ambergrade.typed import settings

FILE = Path(__file__).parents[2] / "conf" / "captions" / "kohaku-2024-01.yaml"
VALUES: dict[str, Any] = yaml.safe_load(FILE.read_text())
RECIPE = settings(CaptionRecipe, VALUES)


def post(**changes: Any) -> Post:
    tags = {"general": (), "artist": (), "character": (), "copyright": (), "meta": ()}
    tags |= {key: changes.pop(key) for key in tuple(changes) if key in tags}
    date = "2021-05-19T01:30:25.096-04:00"
    return replace(Post(5_500_000, tags, "general", date, 9, 3, 640, 480, "1.png"), **changes)


def kohaku_string(caption: Caption) -> str:
    return ", ".join(caption.keep) + ", |||" + ", ".join(caption.flexible)


def test_a_whole_caption() -> None:
    one = post(
        general=("long_hair", "1girl", "^_^", "solo", "o_o", "male_focus", "simple_background", "  "),
        character=("kohaku_(world)",),
        copyright=("original",),
        artist=("banned_artist", "amber_painter"),
        meta=("highres", "translated", "bad_id", "commentary_request", "absurdres", "photo_(medium)"),
        rating="explicit",
        score=300,
    )
    assert kohaku_string(caption(one, RECIPE)) == (
        "1girl, male focus, kohaku (world), original, amber painter, "
        "|||long hair, ^_^, solo, o_o, simple background, highres, absurdres, newest, explicit, nsfw, masterpiece"
    )


def test_without_kept_tags_the_string_begins_with_the_separator() -> None:
    assert kohaku_string(caption(post(general=("solo",)), RECIPE)) == ", |||solo, newest, safe, good quality"


def test_dropped_substrings_hit_more_than_they_mean() -> None:
    one = post(
        meta=("badge", "Bad_link", "videos", "4k"), general=("badge", "request_board"), artist=("unbanned", "zun")
    )
    assert caption(one, RECIPE).keep == ("zun",)
    assert caption(one, RECIPE).flexible[:4] == ("badge", "request board", "Bad link", "4k")


@pytest.mark.parametrize(
    ("name", "spelled"), [("a_b", "a_b"), ("._.", "._."), ("a_bc", "a bc"), (":_d_", ": d "), ("|_|", "|_|")]
)
def test_short_names_keep_their_underscores(name: str, spelled: str) -> None:
    assert caption(post(general=(name,)), RECIPE).flexible[0] == spelled


# score, rating -> class, from score_percentile_after_5m; equal to a percentile is the lower class
QUALITY = [
    (39, "general", "masterpiece"),
    (38, "general", "best quality"),
    (24, "general", "best quality"),
    (23, "general", "great quality"),
    (17, "general", "good quality"),
    (8, "general", "normal quality"),
    (4, "general", "low quality"),
    (2, "general", "low quality"),
    (1, "general", "worst quality"),
    (-5, "general", "worst quality"),
    (118, "sensitive", "best quality"),
    (119, "sensitive", "masterpiece"),
    (98, "questionable", "good quality"),
    (99, "questionable", "great quality"),
    (11, "explicit", "worst quality"),
    (12, "explicit", "low quality"),
    (28, "explicit", "low quality"),
    (29, "explicit", "normal quality"),
]


@pytest.mark.parametrize(("score", "rating", "quality"), QUALITY)
def test_quality_is_the_strictly_exceeded_percentile_of_the_rating(score: int, rating: str, quality: str) -> None:
    assert caption(post(score=score, rating=rating, fav_count=10_000), RECIPE).flexible[-1] == quality


def test_young_posts_have_no_quality_tag() -> None:
    assert caption(post(id=6_880_000, score=999), RECIPE).flexible == ("newest", "safe", "masterpiece")
    assert caption(post(id=6_880_001, score=999), RECIPE).flexible == ("newest", "safe")


YEARS = {
    "2005": "old",
    "2010": "old",
    "2011": "early",
    "2014": "early",
    "2015": "mid",
    "2017": "mid",
    "2018": "recent",
    "2020": "recent",
    "2021": "newest",
    "2024": "newest",
    "2004": "early",
    "1999": "early",
}


@pytest.mark.parametrize(("year", "tag"), YEARS.items())
def test_year_tags(year: str, tag: str) -> None:
    assert caption(post(created_at=f"{year}-12-31T23:59:59.000-05:00"), RECIPE).flexible[0] == tag


def test_odd_years() -> None:
    assert caption(post(created_at="yesterday"), RECIPE).flexible[0] == "early"
    assert caption(post(created_at="2025-01-01T00:00:00.000-05:00"), RECIPE).flexible == ("safe", "good quality")


def test_an_unknown_rating_has_no_quality() -> None:
    with pytest.raises(BadInput, match="rating 'unknown'"):
        caption(post(rating="unknown"), RECIPE)
    young = post(rating="unknown", id=7_000_000)
    assert caption(young, RECIPE).flexible == ("newest",)


def test_a_bad_recipe_is_told_in_full() -> None:
    broken = {**VALUES, "keep": ["specials"], "quality_metric": "likes", "quality_table": {"general": [1, 2]}}
    with pytest.raises(BadSetting) as told:
        settings(CaptionRecipe, broken)
    assert all(part in str(told.value) for part in ("'special'", "likes", "quality_table.general: 2 values"))
    with pytest.raises(BadSetting, match="Did you mean 'quality_else'"):
        settings(CaptionRecipe, {**VALUES, "quality_els": "x"})
