"""Declares what is chosen of a booru and what counts as damaged; it loads no library, as the door needs it first."""

from __future__ import annotations

from dataclasses import dataclass

from ambergrade.errors import BadSetting, unknown_name
from ambergrade.nouns import RATINGS

SPLITS = ("all", "train", "heldout")


@dataclass(frozen=True)
class Selection:
    """Which posts to take; every condition must hold, and an empty one holds for all."""

    tags_any: tuple[str, ...] = ()
    """Raw tag names of any type, of which the post has at least one."""
    tags_all: tuple[str, ...] = ()
    tags_none: tuple[str, ...] = ()
    ratings: tuple[str, ...] = ()
    score_min: int | None = None
    score_max: int | None = None
    fav_count_min: int | None = None
    id_min: int | None = None
    id_max: int | None = None
    side_min: int | None = None
    """Pixels, of the shorter side of the original upload."""
    pixels_min: int | None = None
    """Width × height of the original upload."""
    date_from: str | None = None
    """Upload date `2019-05-31` or the beginning of one (`2019`), inclusive."""
    date_to: str | None = None
    """Likewise, inclusive: `2019` ends with its last day."""
    split: str = "all"
    """`train` and `heldout` divide all posts by a hash of their id: a post never changes sides."""
    heldout_share: float = 0.05
    count: int | None = None
    """At most so many, drawn without replacement by a hash of their id."""
    seed: int = 0
    """Keys the draws of `split` and `count`."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise BadSetting(unknown_name("Split", self.split, SPLITS))
        if not 0 <= self.heldout_share <= 1:
            raise BadSetting(f"heldout_share is {self.heldout_share}; it is a share of the posts, from 0 to 1.")
        wrong = [unknown_name("Rating", rating, RATINGS) for rating in self.ratings if rating not in RATINGS]
        if wrong:
            raise BadSetting("\n".join(wrong))


@dataclass(frozen=True)
class Limits:
    """From where on a file counts as damaged."""

    jpeg_quality: int = 90
    """On libjpeg's scale, read from the file's tables."""
    grid: float = 0.4
    """Grey levels of `grid_strength`; sound 128 px drawings stay below 0.3, larger ones far below."""
    detail: float = 0.06
    """Bounds `detail_share` from below; sound drawings lie above 0.1, anything enlarged 1.5 times smoothly below."""
    alike: float = 3.0
    """Mean difference of two 16 x 16 thumbnails, grey levels, up to which they look the same."""
