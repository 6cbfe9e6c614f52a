"""Captions of millions of posts from the arrays of a database; the rules are `recipe`'s, applied to whole pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

import numpy as np

from ambergrade.captions.booru import Booru
from ambergrade.captions.readers import TAG_TYPE_ORDER, Array
from ambergrade.captions.recipe import CaptionRecipe
from ambergrade.errors import BadInput
from ambergrade.nouns import RATINGS

POSTS = 8192
"""Per piece: its arrays fit the processor's cache."""


def caption_lines(booru: Booru, recipe: CaptionRecipe, rows: Array | None = None) -> Iterator[tuple[int, str | None]]:
    """(post id, caption) of the given rows, or of all; equal to `recipe.caption_line` of each post.

    None for a post whose rating has no quality table: the historical exporter leaves it out too.
    """
    chosen = np.arange(len(booru)) if rows is None else np.asarray(rows, np.int64)
    writer = _Writer(booru, recipe)
    for start in range(0, len(chosen), POSTS):
        yield from writer.lines(chosen[start : start + POSTS])


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


def upload_years(created_at: Array) -> Array:
    """(N,) int: the year of dates that begin `YYYY-`, else 0; `created_at` is an `S` array."""
    letters = np.ascontiguousarray(created_at).view(np.uint8).reshape(len(created_at), -1)[:, :5].astype(np.int64)
    digits = letters[:, :4] - ord("0")
    dated = ((digits >= 0) & (digits <= 9)).all(axis=1) & (letters[:, 4] == ord("-"))
    years: Array = np.where(dated, digits @ [1000, 100, 10, 1], 0)
    return years


class _Writer:
    """Tables that turn tag numbers into places in the caption and into words.

    Besides a post's own tags there are made-up ones, numbered after them: its year, its rating's words, its quality.
    """

    def __init__(self, booru: Booru, recipe: CaptionRecipe) -> None:
        self.booru = booru
        self.recipe = recipe
        self.rank = {part: place for place, part in enumerate(recipe.parts)}
        kinds = [TAG_TYPE_ORDER[kind] for kind in booru.tag_types]
        parts = [recipe.part_of(name, kind) for name, kind in zip(booru.tag_names, kinds, strict=True)]
        self.tag_rank = np.array([self.rank.get(part, -1) for part in parts] or [-1], np.int64)
        words = [recipe.spelled(name) for name in booru.tag_names]
        self.made_up: dict[str, int] = {}
        texts = [*(band.tag for band in recipe.year), *recipe.quality_above, recipe.quality_else]
        texts += [", ".join(tags) for tags in recipe.rating.values()]
        for text in dict.fromkeys(texts):
            self.made_up[text] = len(words)
            words.append(text)
        self.words = np.empty(len(words), object)
        self.words[:] = words

    def lines(self, rows: Array) -> Iterator[tuple[int, str | None]]:
        ids = self.booru.columns["id"][rows]
        owners, ranks, words = self._own_tags(rows)
        known = np.ones(len(rows), bool)
        for part, made in (("year", self._years(rows)), ("rating", self._ratings(rows))):
            owners, ranks, words = self._with(owners, ranks, words, part, made)
        made, known = self._qualities(rows, ids)
        owners, ranks, words = self._with(owners, ranks, words, "quality", made)
        width = len(self.rank) + 1
        keys = owners * width + ranks
        order = np.argsort(keys, kind="stable")
        told = self.words[words[order]].tolist()
        edges = (np.arange(len(rows))[:, None] * width + self._edges()).ravel()
        bounds = np.searchsorted(keys[order], edges).reshape(len(rows), -1).tolist()
        for post, fine, bound in zip(ids.tolist(), known.tolist(), bounds, strict=True):
            yield post, self._joined(told, bound) if fine else None

    def _edges(self) -> Array:
        """Ranks at which the stretches of a caption begin, and the end of the last."""
        recipe = self.recipe
        if recipe.part_separator is not None:
            return np.arange(len(self.rank) + 1)
        lengths = [len(recipe.keep), len(recipe.flexible), *([len(recipe.suffix)] if recipe.suffix else [])]
        return np.concatenate([[0], np.cumsum(lengths)])

    def _joined(self, words: list[str], bounds: list[int]) -> str:
        stretches = [", ".join(words[a:b]) for a, b in pairwise(bounds)]
        if self.recipe.part_separator is not None:
            return self.recipe.part_separator.join(filter(None, stretches))
        return self.recipe.keep_separator.join(stretches)

    def _own_tags(self, rows: Array) -> tuple[Array, Array, Array]:
        """(owner: 0 … len(rows)-1, rank of its part, word) of every tag that is not dropped, in row order."""
        starts, ends = self.booru.offsets[rows], self.booru.offsets[rows + 1]
        lengths = ends - starts
        owners = np.repeat(np.arange(len(rows)), lengths)
        if len(rows) and rows[-1] - rows[0] == len(rows) - 1:
            words = np.asarray(self.booru.tags[starts[0] : ends[-1]])
        else:
            before = np.cumsum(lengths) - lengths
            words = self.booru.tags[np.arange(lengths.sum()) + np.repeat(starts - before, lengths)]
        ranks = self.tag_rank[words]
        kept = ranks >= 0
        return owners[kept], ranks[kept], words[kept].astype(np.int64)

    def _with(self, owners: Array, ranks: Array, words: Array, part: str, made: Array) -> tuple[Array, Array, Array]:
        """With one made-up tag for each post where `made` is not negative."""
        if part not in self.rank:
            return owners, ranks, words
        added = np.flatnonzero(made >= 0)
        ranked = np.full(len(added), self.rank[part])
        return np.append(owners, added), np.append(ranks, ranked), np.append(words, made[added])

    def _years(self, rows: Array) -> Array:
        years, place = np.unique(upload_years(self.booru.columns["created_at"][rows]), return_inverse=True)
        tags = [self.recipe.year_tag(int(year)) for year in years]
        return np.array([self.made_up[tag] if tag else -1 for tag in tags], np.int64)[place]

    def _ratings(self, rows: Array) -> Array:
        texts = [", ".join(self.recipe.rating.get(rating, ())) for rating in RATINGS]
        numbers = np.array([self.made_up[text] if text else -1 for text in texts] + [-1], np.int64)
        return np.asarray(numbers[self._rating_codes(rows)])

    def _rating_codes(self, rows: Array) -> Array:
        """0–3, and 4 for what the enum does not hold."""
        codes = self.booru.columns["rating"][rows].astype(np.int64)
        return np.where((codes >= 0) & (codes < len(RATINGS)), codes, len(RATINGS))

    def _qualities(self, rows: Array, ids: Array) -> tuple[Array, Array]:
        """(word or -1, whether the post has a caption at all) of each post."""
        recipe, codes = self.recipe, self._rating_codes(rows)
        metric = self.booru.columns[recipe.quality_metric][rows]
        made, known = np.full(len(rows), -1, np.int64), np.zeros(len(rows), bool)
        tables: Mapping[str, tuple[tuple[float, str], ...]] = recipe.thresholds
        for code, rating in enumerate((*RATINGS, "")):
            ranked = tables.get(rating) or tables.get("")
            if ranked is None:
                continue
            here = codes == code
            known |= here
            # how many thresholds, from the lowest, lie strictly below the metric
            exceeded = np.searchsorted([above for above, _ in reversed(ranked)], metric[here], side="left")
            tags = [recipe.quality_else, *(tag for _, tag in reversed(ranked))]
            made[here] = np.array([self.made_up[tag] for tag in tags], np.int64)[exceeded]
        if recipe.quality_last_id is not None:
            young = ids > recipe.quality_last_id
            made[young], known = -1, known | young
        return made, known
