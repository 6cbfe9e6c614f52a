"""Caption recipes: the rules that turn a post's tags into a caption, as data in conf/captions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ambergrade.errors import BadInput, BadSetting, unknown_name
from ambergrade.nouns import TAG_TYPES, Caption, Post

PARTS = ("special", *TAG_TYPES, "year", "rating", "quality")
PERCENTILES = tuple(range(5, 100, 5))


@dataclass(frozen=True)
class YearBand:
    """Posts uploaded in `first`–`last` (inclusive; None is open) get `tag`."""

    first: int | None
    last: int | None
    tag: str


@dataclass(frozen=True)
class CaptionRecipe:
    """A caption rule set. Build it from a yaml's content with `CaptionRecipe.from_dict`."""

    name: str
    special: tuple[str, ...]
    """General tags that move to the part `special`: how many girls, boys, others."""
    keep: tuple[str, ...]
    """Parts (of PARTS) that stay first and in order."""
    flexible: tuple[str, ...]
    """Parts that a trainer may shuffle and drop."""
    drop: Mapping[str, tuple[str, ...]]
    """Tag type to substrings; a raw name that contains one is dropped."""
    underscores_kept: int
    """Raw names of at most this many characters keep their underscores (`^_^`, `o_o`)."""
    rating: Mapping[str, tuple[str, ...]]
    """Rating to its tags; a rating not listed gets none."""
    year: tuple[YearBand, ...]
    """The first band that holds the year wins; an unreadable date is the year 0."""
    quality_metric: str
    """`score` or `fav_count` of the post."""
    quality_last_id: int | None
    """Posts with a higher id are too young to be judged and get no quality tag."""
    quality_above: Mapping[str, int]
    """Quality tag to the percentile its posts exceed, the highest counting; equal is the lower class."""
    quality_else: str
    """Quality tag of the posts that exceed none."""
    quality_table: Mapping[str, tuple[int, ...]]
    """Rating to the metric at PERCENTILES (5, 10, …, 95)."""

    def __post_init__(self) -> None:
        wrong = [unknown_name("Caption part", p, PARTS) for p in self.keep + self.flexible if p not in PARTS]
        wrong += [f"drop: '{kind}' is not a tag type." for kind in self.drop if kind not in TAG_TYPES]
        wrong += [
            f"quality_table.{rating}: {len(row)} values, one for each of P5, P10, …, P95 (19) needed."
            for rating, row in self.quality_table.items()
            if len(row) != len(PERCENTILES)
        ]
        wrong += [
            f"quality_above.{t}: P{p} is not tabled." for t, p in self.quality_above.items() if p not in PERCENTILES
        ]
        if self.quality_metric not in ("score", "fav_count"):
            wrong.append(f"quality_metric: '{self.quality_metric}' is neither score nor fav_count.")
        if wrong:
            raise BadSetting("\n".join([f"Caption recipe '{self.name}':", *wrong]))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CaptionRecipe:
        """Build a recipe from plain lists and dicts, as a yaml holds them.

        Raises:
            BadSetting: keys missing or unknown, or values that cannot be meant.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        wrong = [unknown_name("Key", key, known) for key in values if key not in known]
        wrong += [f"Key '{key}' is missing." for key in known if key not in values]
        if wrong:
            raise BadSetting("\n".join([f"Caption recipe '{values.get('name', '?')}':", *wrong]))
        lists = {key: tuple(values[key]) for key in ("special", "keep", "flexible")}
        tables = {key: {k: tuple(v) for k, v in values[key].items()} for key in ("drop", "rating", "quality_table")}
        bands = tuple(YearBand(band.get("first"), band.get("last"), band["tag"]) for band in values["year"])
        return cls(**{**values, **lists, **tables, "year": bands, "quality_above": dict(values["quality_above"])})


def caption(post: Post, recipe: CaptionRecipe) -> Caption:
    """The caption of a post: kept and flexible tags, spelled as the text encoder reads them.

    Raises:
        BadInput: the rating has no quality table (the historical exporter drops such a post too).
    """
    parts = _tag_parts(post, recipe)
    parts["year"] = _year_tags(post, recipe)
    parts["rating"] = recipe.rating.get(post.rating, ())
    parts["quality"] = _quality_tags(post, recipe)
    keep = tuple(tag for part in recipe.keep for tag in parts[part])
    return Caption(keep, tuple(tag for part in recipe.flexible for tag in parts[part]))


def _tag_parts(post: Post, recipe: CaptionRecipe) -> dict[str, tuple[str, ...]]:
    raw = {kind: [name for name in post.tags.get(kind, ()) if name.strip()] for kind in TAG_TYPES}
    raw = {
        kind: [n for n in names if not any(s in n for s in recipe.drop.get(kind, ()))] for kind, names in raw.items()
    }
    special = set(recipe.special)
    raw["special"] = [name for name in raw["general"] if name in special]
    raw["general"] = [name for name in raw["general"] if name not in special]
    return {kind: tuple(_spelled(name, recipe) for name in names) for kind, names in raw.items()}


def _spelled(name: str, recipe: CaptionRecipe) -> str:
    return name.replace("_", " ") if len(name) > recipe.underscores_kept else name


def _year_tags(post: Post, recipe: CaptionRecipe) -> tuple[str, ...]:
    match = re.match(r"(\d{4})-", post.created_at)
    year = int(match[1]) if match else 0
    for band in recipe.year:
        if (band.first is None or year >= band.first) and (band.last is None or year <= band.last):
            return (band.tag,)
    return ()


def _quality_tags(post: Post, recipe: CaptionRecipe) -> tuple[str, ...]:
    if recipe.quality_last_id is not None and post.id > recipe.quality_last_id:
        return ()
    if post.rating not in recipe.quality_table:
        raise BadInput(f"Post {post.id}: no quality table for the rating '{post.rating}'.")
    table = dict(zip(PERCENTILES, recipe.quality_table[post.rating], strict=True))
    metric = post.score if recipe.quality_metric == "score" else post.fav_count
    exceeded = [(percentile, tag) for tag, percentile in recipe.quality_above.items() if metric > table[percentile]]
    return (max(exceeded)[1] if exceeded else recipe.quality_else,)
