"""Choose posts by what the database says of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from ambergrade.captions.booru import Booru
from ambergrade.captions.settings import Selection
from ambergrade.captions.values import Array
from ambergrade.errors import UnknownName
from ambergrade.identity import canonical_json
from ambergrade.nouns import RATINGS

PAIRS = 16_000_000
"""Post–tag pairs looked at in one go."""


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
