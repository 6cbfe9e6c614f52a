"""Choose posts by what the database says of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ambergrade.captions.booru import Booru
from ambergrade.captions.values import Array
from ambergrade.errors import BadSetting, UnknownName, unknown_name
from ambergrade.identity import canonical_json
from ambergrade.nouns import RATINGS

SPLITS = ("all", "train", "heldout")
PAIRS = 16_000_000
"""Post–tag pairs looked at in one go."""


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
    """Of `split` and `count`."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise BadSetting(unknown_name("Split", self.split, SPLITS))
        if not 0 <= self.heldout_share <= 1:
            raise BadSetting(f"heldout_share is {self.heldout_share}; it is a share of the posts, from 0 to 1.")
        wrong = [unknown_name("Rating", rating, RATINGS) for rating in self.ratings if rating not in RATINGS]
        if wrong:
            raise BadSetting("\n".join(wrong))


def select_rows(booru: Booru, selection: Selection) -> Array:
    """The rows of the selected posts, rising: `select` on whole columns.

    Raises:
        UnknownName: a tag that the database does not hold.
    """
    columns = booru.columns
    chosen = np.ones(len(booru), bool)
    if selection.ratings:
        chosen &= np.isin(columns["rating"], [RATINGS.index(rating) for rating in selection.ratings])
    sides = np.minimum(columns["image_width"], columns["image_height"])
    pixels = columns["image_width"].astype(np.int64) * columns["image_height"]
    for low, values, high in (
        (selection.score_min, columns["score"], selection.score_max),
        (selection.fav_count_min, columns["fav_count"], None),
        (selection.id_min, columns["id"], selection.id_max),
        (selection.side_min, sides, None),
        (selection.pixels_min, pixels, None),
    ):
        if low is not None:
            chosen &= values >= low
        if high is not None:
            chosen &= values <= high
    if selection.date_from is not None:
        chosen &= _beginnings(columns["created_at"], selection.date_from) >= selection.date_from.encode()
    if selection.date_to is not None:
        chosen &= _beginnings(columns["created_at"], selection.date_to) <= selection.date_to.encode()
    if selection.tags_any:
        chosen &= _with_tags(booru, selection.tags_any)
    for tag in selection.tags_all:
        chosen &= _with_tags(booru, (tag,))
    if selection.tags_none:
        chosen &= ~_with_tags(booru, selection.tags_none)
    rows = np.flatnonzero(chosen)
    ids = columns["id"]
    if selection.split != "all":
        # whole numbers to floats by one rounding, as `holds` divides
        heldout = _seeds(selection.seed, "split", ids[rows]) / 2**63 < selection.heldout_share
        rows = rows[heldout if selection.split == "heldout" else ~heldout]
    if selection.count is not None and len(rows) > selection.count:
        rows = rows[np.argsort(_seeds(selection.seed, "count", ids[rows]), kind="stable")[: selection.count]]
    return np.sort(rows)


def _with_tags(booru: Booru, names: Sequence[str]) -> Array:
    """(N,) bool: posts with at least one of the tags."""
    table = np.zeros(max(1, len(booru.tag_names)), bool)
    for name in names:
        if name not in booru.tag_place:
            near = [known for known in booru.tag_names if known[:1] == name[:1]]
            raise UnknownName("In this database the tag", name, near, "Tags are written raw: long_hair, not long hair.")
        table[booru.tag_place[name]] = True
    found = np.zeros(len(booru), bool)
    for start in range(0, len(booru.tags), PAIRS):
        pairs = start + np.flatnonzero(table[booru.tags[start : start + PAIRS]])
        found[np.searchsorted(booru.offsets, pairs, side="right") - 1] = True
    return found


def _beginnings(texts: Array, like: str) -> Array:
    """The first letters of an `S` array, as many as `like` has."""
    letters = np.ascontiguousarray(texts).view("S1").reshape(len(texts), -1)[:, : len(like)]
    return np.frombuffer(letters.tobytes(), f"S{letters.shape[1]}")


def _seeds(seed: int, purpose: str, ids: Array) -> Array:
    """`random_seed(seed, purpose, id)` of many ids, without the general encoder's cost."""
    head = canonical_json([seed, purpose])[:-1] + ",["
    texts = (f"{head}{post}]]".encode() for post in ids.tolist())
    digests = b"".join(hashlib.sha256(text).digest()[:8] for text in texts)
    return np.frombuffer(digests, ">u8").astype(np.uint64) >> np.uint64(1)
