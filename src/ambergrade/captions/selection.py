"""Choose posts by what the database says of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ambergrade.errors import BadSetting, unknown_name
from ambergrade.identity import random_seed
from ambergrade.nouns import TAG_TYPES, Post

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
    id_min: int | None = None
    id_max: int | None = None
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
    """Of `split` and `count`."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise BadSetting(unknown_name("Split", self.split, SPLITS))
        if not 0 <= self.heldout_share <= 1:
            raise BadSetting(f"heldout_share is {self.heldout_share}; it is a share of the posts, from 0 to 1.")

    def holds(self, post: Post) -> bool:
        """Whether a post is selected, `count` aside."""
        tags = {name for kind in TAG_TYPES for name in post.tags.get(kind, ())}
        return (
            (not self.tags_any or not tags.isdisjoint(self.tags_any))
            and tags.issuperset(self.tags_all)
            and tags.isdisjoint(self.tags_none)
            and (not self.ratings or post.rating in self.ratings)
            and _between(self.score_min, post.score, self.score_max)
            and _between(self.id_min, post.id, self.id_max)
            and (self.date_from is None or post.created_at[: len(self.date_from)] >= self.date_from)
            and (self.date_to is None or post.created_at[: len(self.date_to)] <= self.date_to)
            and self.split in ("all", self._side(post))
        )

    def _side(self, post: Post) -> str:
        return "heldout" if random_seed(self.seed, "split", post.id) / 2**63 < self.heldout_share else "train"


def select(posts: Iterable[Post], selection: Selection) -> list[Post]:
    """The selected posts in ascending id."""
    chosen = [post for post in posts if selection.holds(post)]
    if selection.count is not None:
        chosen = sorted(chosen, key=lambda post: random_seed(selection.seed, "count", post.id))[: selection.count]
    return sorted(chosen, key=lambda post: post.id)


def _between(low: int | None, value: int, high: int | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)
