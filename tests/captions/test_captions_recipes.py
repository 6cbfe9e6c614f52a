"""The shipped recipes against captions worked out by hand from their sources."""

from dataclasses import replace
from typing import Any

import pytest

from ambergrade.captions.recipe import CaptionRecipe, caption, caption_line, explain
from ambergrade.door.compose import compose, plain
from ambergrade.errors import BadSetting
from ambergrade.nouns import Post
from ambergrade.typed import settings

TAGS = {
    "general": ("long_hair", "1girl", "^_^", "horns"),
    "artist": ("amber_(painter)",),
    "character": ("kohaku_(world)",),
    "copyright": ("original",),
    "meta": ("highres", "translated"),
}
POST = Post(5_500_000, TAGS, "questionable", "2019-05-19T01:30:25.096-04:00", 100, 66, 640, 480, "1.png")


def recipe(name: str, **changes: Any) -> CaptionRecipe:
    values = plain(compose("world", ["build=card", f"captions={name}"]))["captions"]
    return settings(CaptionRecipe, {**values, **changes})


def line(name: str, **changes: Any) -> str:
    return caption_line(replace(POST, **changes), recipe(name))


KOHAKU = "1girl, kohaku (world), original, amber (painter), |||long hair, ^_^, horns, highres, recent, nsfw, "


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        # score 100 > P75 98 ; fav 66 > P70 65, ≤ P75 75 ; fav 66 > P60 49, ≤ P75 75
        ("kohaku-2024-01", {}, KOHAKU + "great quality"),
        ("kohaku-2024-02", {}, KOHAKU + "good quality"),
        ("kohaku-2024-03", {}, KOHAKU + "great quality"),
        ("kohaku-2024-03", {"fav_count": 133}, KOHAKU + "masterpiece"),
        ("kohaku-2024-03", {"fav_count": 132}, KOHAKU + "best quality"),
        ("kohaku-2024-03", {"fav_count": 33}, KOHAKU + "normal quality"),
        ("kohaku-2024-03", {"fav_count": 8}, KOHAKU + "worst quality"),
        ("kohaku-2024-02", {"id": 7_000_000, "fav_count": 183}, KOHAKU + "masterpiece"),
        ("kohaku-2024-02", {"id": 7_000_001}, KOHAKU.removesuffix(", ")),
        ("kohaku-2024-03", {"id": 7_500_001}, KOHAKU.removesuffix(", ")),
    ],
)
def test_kohaku(name: str, changes: dict[str, Any], expected: str) -> None:
    assert line(name, **changes) == expected


@pytest.mark.parametrize(
    ("score", "quality"),
    [
        *(
            (151, "masterpiece"),
            (150, "best quality"),
            (100, "best quality"),
            (99, "high quality"),
            (75, "high quality"),
        ),
        *((74, "medium quality"), (25, "medium quality"), (24, "normal quality"), (0, "normal quality")),
        *((-1, "low quality"), (-5, "low quality"), (-6, "worst quality")),
    ],
)
def test_anxl3_judges_by_the_score_itself(score: int, quality: str) -> None:
    head = "1girl, kohaku (world), original, ||| amber (painter), long hair, ^_^, horns, highres, "
    assert line("anxl3", score=score) == head + f"rating: questionable, nsfw, {quality}, late"
    general = line("anxl3", score=score, rating="general", created_at="2024-01-01")
    assert general.endswith(f"highres, rating: general, {quality}")  # whatever the rating; 2024 has no tag


def test_anxl31() -> None:
    head = "1girl, kohaku (world), original, ||| amber (painter), long hair, ^_^, horns, highres, "
    assert line("anxl31") == head + "nsfw, best quality, recent"  # 73 < 100 ≤ 134
    assert line("anxl31", rating="explicit", score=211) == head + "explicit, nsfw, best quality, recent"
    assert line("anxl31", rating="general", score=34, created_at="2004-") == head + "safe, masterpiece"


def test_illustrious() -> None:
    general = "long hair, ^_^, horns"
    assert line("illustrious") == (
        f"1girl ||| kohaku (world) ||| questionable ||| {general} ||| amber (painter) ||| best quality ||| old"
    )
    nobody = {**TAGS, "character": (), "artist": ("banned_artist",)}
    assert line("illustrious", tags=nobody, score=3, created_at="2024-05-01") == (
        f"1girl ||| questionable ||| {general} ||| worst quality"
    )


def test_sections_groups_and_spared_tags_reach_the_trainer() -> None:
    found = caption(POST, recipe("kohaku-2024-01", never_drop=["long_hair", "1girl"]))
    assert found.keep == ("1girl", "kohaku (world)", "original", "amber (painter)")
    assert found.groups == (3, 1, 1, 1, 1)  # general, meta, year, rating, quality
    assert sum(found.groups) == len(found.flexible)
    assert found.never_drop == ("long hair",)
    last = caption(POST, recipe("illustrious"))
    assert last.suffix == ("amber (painter)", "best quality", "old")
    assert last.text.endswith("horns, amber (painter), best quality, old")


def test_every_part_of_a_caption_has_its_reason() -> None:
    rules = recipe("kohaku-2024-01", never_drop=["horns"])
    rows = explain(POST, rules)
    told = {asked: (tag, rule) for asked, tag, rule in rows}
    assert told["general 1girl"] == ("1girl", "keep: special")
    assert told["general ^_^"] == ("^_^", "flexible: general, underscores kept")
    assert told["general horns"] == ("horns", "flexible: general, never dropped")
    assert told["meta translated"] == ("–", "drop.meta: contains 'translat'")
    assert told["created_at 2019-05-19T01:30:25.096-04:00"] == ("recent", "year: band …–2020")
    assert told["score 100"] == ("great quality", "quality: > 98 and ≤ 136 for questionable")
    caption_tags = [tag for _, tag, _ in rows if tag != "–"]
    assert ", ".join(caption_tags) == caption(POST, rules).text
    young = explain(replace(POST, id=7_000_000), rules)
    assert ("score 100", "–", "quality: id 7000000 > quality_last_id 6880000") in young


def test_a_recipe_that_names_an_unknown_rule_is_told() -> None:
    with pytest.raises(BadSetting, match=r"Caption part 'qualty' is not known.*\n.*'quality'"):
        recipe("kohaku-2024-01", flexible=["general", "qualty"])
    with pytest.raises(BadSetting, match="named twice"):
        recipe("kohaku-2024-01", flexible=["general", "special"])
    with pytest.raises(BadSetting, match="P93 is not tabled"):
        recipe("illustrious", quality_above={"masterpiece": 93})
