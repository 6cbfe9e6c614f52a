"""Captions of millions of posts, and tables of their scores, from the arrays of a database."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ambergrade.captions.booru import UNKNOWN_RATING, Booru
from ambergrade.captions.recipe import CaptionRecipe
from ambergrade.captions.values import Array
from ambergrade.errors import BadInput
from ambergrade.nouns import RATINGS, TAG_TYPES

POSTS = 8192
"""Per piece that is read from the arrays at once."""


def caption_lines(booru: Booru, recipe: CaptionRecipe, rows: Array | None = None) -> Iterator[tuple[int, str | None]]:
    """Yield (post id, caption) of the given rows, or of all, each as `recipe.caption_line` writes it.

    None for a post whose rating has no quality table: the historical exporter leaves it out too.
    """
    chosen = np.arange(len(booru)) if rows is None else np.asarray(rows, np.int64)
    kinds = (TAG_TYPES[kind] for kind in booru.tag_types.tolist())
    placed = [recipe.placed(name, kind) for name, kind in zip(booru.tag_names, kinds, strict=True)]
    names = ("id", "created_at", "rating", recipe.quality_metric)
    for start in range(0, len(chosen), POSTS):
        piece = chosen[start : start + POSTS]
        values = [booru.columns[name][piece].tolist() for name in names]
        spans = [booru.offsets[piece].tolist(), booru.offsets[piece + 1].tolist()]
        for post, created_at, code, metric, first, end in zip(*values, *spans, strict=True):
            tags = dict.fromkeys(booru.tags[first:end].tolist())  # a tag counts once
            rating = RATINGS[code] if 0 <= code < len(RATINGS) else UNKNOWN_RATING
            date = created_at.decode(errors="replace")
            try:
                parts = recipe.arranged(
                    [placed[tag] for tag in tags], created_at=date, rating=rating, post_id=post, metric=metric
                )
            except BadInput:
                yield post, None
            else:
                yield post, recipe.written(parts)


def percentile_table(
    booru: Booru, metric: str, percentiles: tuple[int, ...], *, first_id: int = 0, last_id: int | None = None
) -> dict[str, list[float]]:
    """Rating to `metric` (score or fav_count) at the percentiles, over the posts with `first_id` ≤ id ≤ `last_id`.

    Linear interpolation between ranks (numpy's default, Hyndman & Fan's type 7). Raises BadInput for a rating
    without posts.
    """
    ids = np.asarray(booru.columns["id"])
    window = (ids >= first_id) & (ids <= (ids.max(initial=0) if last_id is None else last_id))
    table = {}
    for code, rating in enumerate(RATINGS):
        values = booru.columns[metric][window & (booru.columns["rating"] == code)]
        if not len(values):
            raise BadInput(f"No post with the rating '{rating}' has an id from {first_id} to {last_id or 'the last'}.")
        table[rating] = [round(float(value), 2) for value in np.percentile(values, percentiles)]
    return table
