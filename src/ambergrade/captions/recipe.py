"""Caption recipes: the rules that turn a post's tags into a caption, as data in conf/captions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ambergrade.errors import BadInput, BadSetting, unknown_name
from ambergrade.nouns import TAG_TYPES, Caption, Post

PARTS = ("special", *TAG_TYPES, "year", "rating", "quality")
PERCENTILES = tuple(range(5, 100, 5))
METRICS = ("score", "fav_count")


@dataclass(frozen=True)
class YearBand:
    """Posts uploaded in `first`–`last` (inclusive; None is open) get `tag`."""

    tag: str
    first: int | None = None
    last: int | None = None

    def holds(self, year: int) -> bool:
        return (self.first is None or year >= self.first) and (self.last is None or year <= self.last)


@dataclass(frozen=True)
class CaptionRecipe:
    """A caption rule set; its fields are the keys of a yaml in conf/captions."""

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
    """Quality tag to what its posts exceed, the highest counting; equal is the lower class. A percentile of
    `quality_table`, or a value of the metric itself where the table is empty."""
    quality_else: str
    """Quality tag of the posts that exceed none."""
    quality_table: Mapping[str, tuple[float, ...]]
    """Rating to the metric at `quality_percentiles`; empty: `quality_above` holds plain values."""
    quality_percentiles: tuple[int, ...] = PERCENTILES
    """Columns of `quality_table`."""
    suffix: tuple[str, ...] = ()
    """Parts that stay last and in order."""
    keep_separator: str = ", |||"
    """Stands between the sections of the written caption; a trainer splits there."""
    part_separator: str | None = None
    """Where given, it sets off every part that is not empty, and `keep_separator` is not used."""
    never_drop: tuple[str, ...] = ()
    """Raw names of flexible tags that dropout spares."""

    def __post_init__(self) -> None:
        wrong = [unknown_name("Caption part", part, PARTS) for part in self.parts if part not in PARTS]
        wrong += [f"The part '{part}' is named twice." for part in set(self.parts) if self.parts.count(part) > 1]
        wrong += [unknown_name("drop: tag type", kind, TAG_TYPES) for kind in self.drop if kind not in TAG_TYPES]
        columns = len(self.quality_percentiles)
        wrong += [
            f"quality_table.{rating}: {len(row)} values, one for each of "
            f"P{', P'.join(map(str, self.quality_percentiles))} ({columns}) needed."
            for rating, row in self.quality_table.items()
            if len(row) != columns
        ]
        if self.quality_table:
            absent = {t: p for t, p in self.quality_above.items() if p not in self.quality_percentiles}
            wrong += [f"quality_above.{tag}: P{percentile} is not tabled." for tag, percentile in absent.items()]
        if self.quality_metric not in METRICS:
            wrong.append(f"quality_metric: '{self.quality_metric}' is neither score nor fav_count.")
        if wrong:
            raise BadSetting("\n".join([f"Caption recipe '{self.name}':", *wrong]))

    @property
    def parts(self) -> tuple[str, ...]:
        """All parts in the order of the written caption."""
        return self.keep + self.flexible + self.suffix

    @cached_property
    def thresholds(self) -> Mapping[str, tuple[tuple[float, str], ...]]:
        """Rating to (value to exceed, quality tag), highest first; "" stands for every rating."""
        ranked = sorted(((above, tag) for tag, above in self.quality_above.items()), reverse=True)
        if not self.quality_table:
            return {"": tuple(ranked)}
        columns = {percentile: column for column, percentile in enumerate(self.quality_percentiles)}
        return {
            rating: tuple((row[columns[percentile]], tag) for percentile, tag in ranked)
            for rating, row in self.quality_table.items()
        }

    def spelled(self, name: str) -> str:
        """A raw tag name as the text encoder reads it.

        Parentheses are not escaped.
        """
        return name.replace("_", " ") if len(name) > self.underscores_kept else name

    def part_of(self, name: str, kind: str) -> str:
        """The part that a raw tag name of type `kind` goes to; "" if it is dropped."""
        if not name.strip() or self.dropped_by(name, kind):
            return ""
        return "special" if kind == "general" and name in self.special else kind

    def dropped_by(self, name: str, kind: str) -> str:
        """The substring that drops a tag, or ""."""
        return next((part for part in self.drop.get(kind, ()) if part in name), "")

    def placed(self, name: str, kind: str) -> tuple[str, str]:
        """Return a tag's part ("" if it is dropped) and its spelling."""
        return self.part_of(name, kind), self.spelled(name)

    def arranged(
        self, placed: Iterable[tuple[str, str]], *, created_at: str, rating: str, post_id: int, metric: int
    ) -> dict[str, list[str]]:
        """Return part (of PARTS, and "" for what is dropped) to its tags in order, as spelled.

        `placed` is what `placed` says of each of the post's tags. Raises BadInput as `quality_tag` does.
        """
        parts: dict[str, list[str]] = {part: [] for part in ("", *PARTS)}
        for part, word in placed:
            parts[part].append(word)
        parts["year"] = _listed(self.year_tag(upload_year(created_at)))
        parts["rating"] = list(self.rating.get(rating, ()))
        parts["quality"] = _listed(self.quality_tag(post_id, rating, metric))
        return parts

    def year_tag(self, year: int) -> str:
        """The tag of an upload year (0: the date was unreadable), or ""."""
        return next((band.tag for band in self.year if band.holds(year)), "")

    def quality_tag(self, post_id: int, rating: str, metric: int) -> str:
        """The quality tag of a post, or "" for one too young.

        Raises:
            BadInput: the rating has no quality table (the historical exporter drops such a post too).
        """
        if self.quality_last_id is not None and post_id > self.quality_last_id:
            return ""
        rows = self.thresholds.get(rating) or self.thresholds.get("")
        if rows is None:
            raise BadInput(f"Post {post_id}: no quality table for the rating '{rating}'.")
        return next((tag for above, tag in rows if metric > above), self.quality_else)

    def written(self, parts: Mapping[str, Sequence[str]]) -> str:
        """The caption as a line of text, separators included, as a caption file holds it.

        The separator stands also before an empty keep section: the historical files begin `, |||` then.
        """
        if self.part_separator is not None:
            return self.part_separator.join(", ".join(parts[part]) for part in self.parts if parts[part])
        sections = (self.keep, self.flexible, *([self.suffix] if self.suffix else []))
        return self.keep_separator.join(", ".join(t for p in section for t in parts[p]) for section in sections)


def caption(post: Post, recipe: CaptionRecipe) -> Caption:
    """The caption of a post: kept, flexible and last tags, spelled as the text encoder reads them.

    Raises:
        BadInput: the rating has no quality table.
    """
    parts = caption_parts(post, recipe)
    keep, flexible, suffix = (
        tuple(tag for part in section for tag in parts[part])
        for section in (recipe.keep, recipe.flexible, recipe.suffix)
    )
    spared = {recipe.spelled(name) for name in recipe.never_drop}
    return Caption(
        keep,
        flexible,
        suffix,
        tuple(len(parts[part]) for part in recipe.flexible if parts[part]),
        tuple(tag for tag in flexible if tag in spared),
    )


def caption_line(post: Post, recipe: CaptionRecipe) -> str:
    """The caption as one line with its separators. Raises BadInput as `caption` does."""
    return recipe.written(caption_parts(post, recipe))


def caption_parts(post: Post, recipe: CaptionRecipe) -> dict[str, list[str]]:
    """Return what `CaptionRecipe.arranged` does, for a post. Raises BadInput as `caption` does."""
    placed = (recipe.placed(name, kind) for kind in TAG_TYPES for name in post.tags.get(kind, ()))
    metric = quality_metric(post, recipe)
    return recipe.arranged(placed, created_at=post.created_at, rating=post.rating, post_id=post.id, metric=metric)


def explain(post: Post, recipe: CaptionRecipe) -> list[tuple[str, str, str]]:
    """(what the database says, what became of it, which rule) for every tag and property, in the caption's order."""
    found: dict[str, list[tuple[str, str, str]]] = {part: [] for part in ("", *PARTS)}
    for kind in TAG_TYPES:
        for name in post.tags.get(kind, ()):
            part = recipe.part_of(name, kind)
            found[part if part in recipe.parts else ""].append(_explained_tag(name, kind, part, recipe))
    year = upload_year(post.created_at)
    band = next((band for band in recipe.year if band.holds(year)), None)
    rule = f"band {band.first or '…'}–{band.last or '…'}" if band else "no band holds this year"
    found["year"].append((f"created_at {post.created_at or 'absent'}", band.tag if band else "–", f"year: {rule}"))
    tags = ", ".join(recipe.rating.get(post.rating, ()))
    found["rating"].append((f"rating {post.rating}", tags or "–", "rating" if tags else "rating: not listed"))
    found["quality"].append(_explained_quality(post, recipe))
    return [row for part in (*recipe.parts, "") for row in found[part]]


def upload_year(created_at: str) -> int:
    """Return the year of a date that begins `YYYY-`; 0 for any other text."""
    match = re.match(r"([0-9]{4})-", created_at)
    return int(match[1]) if match else 0


def quality_metric(post: Post, recipe: CaptionRecipe) -> int:
    return post.score if recipe.quality_metric == "score" else post.fav_count


def _explained_tag(name: str, kind: str, part: str, recipe: CaptionRecipe) -> tuple[str, str, str]:
    asked = f"{kind} {name}"
    if not name.strip():
        return asked, "–", "blank names are dropped"
    if not part:
        return asked, "–", f"drop.{kind}: contains '{recipe.dropped_by(name, kind)}'"
    if part not in recipe.parts:
        return asked, "–", f"part {part}: in no section of the recipe"
    section = next(s for s in ("keep", "flexible", "suffix") if part in getattr(recipe, s))
    spelling = "underscores kept" if "_" in name and recipe.spelled(name) == name else ""
    spared = "never dropped" if name in recipe.never_drop and section == "flexible" else ""
    rule = ": ".join([section, "special" if part == "special" else part])
    return asked, recipe.spelled(name), ", ".join(filter(None, [rule, spelling, spared]))


def _explained_quality(post: Post, recipe: CaptionRecipe) -> tuple[str, str, str]:
    metric = quality_metric(post, recipe)
    asked = f"{recipe.quality_metric} {metric}"
    if recipe.quality_last_id is not None and post.id > recipe.quality_last_id:
        return asked, "–", f"quality: id {post.id} > quality_last_id {recipe.quality_last_id}"
    rows = recipe.thresholds.get(post.rating) or recipe.thresholds.get("")
    if rows is None:
        return asked, "–", f"quality: no table for the rating '{post.rating}'; the post is left out"
    tag = recipe.quality_tag(post.id, post.rating, metric)
    below = [above for above, _ in rows if metric > above]
    over = [above for above, _ in rows if metric <= above]
    bounds = [f"> {max(below):g}" if below else "", f"≤ {min(over):g}" if over else ""]
    of = f" for {post.rating}" if recipe.quality_table else ""
    return asked, tag, f"quality: {' and '.join(filter(None, bounds))}{of}"


def _listed(tag: str) -> list[str]:
    return [tag] if tag else []
