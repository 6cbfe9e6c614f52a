"""What a sheet of tag probabilities says: recall and its floor, AUROC, corrected shares, the rating, a row per tag.

Pure functions of a ScoreSheet that `metrics/tag_adherence.py` filled. Shapes: n pictures, P prompts, U tags, B draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ambergrade.nouns import RATINGS
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import (
    Floats,
    bootstrap_difference,
    false_discovery_q,
    resampling_weights,
    wilson_interval,
)

SIDE = 10
"""Prompts that must ask for a tag, and prompts that must not, before its AUROC is told."""
LEAST_POWER = 0.3
"""TPR - FPR below which a tagger says too little about a tag to correct its share (facts, section 2)."""
Masks = npt.NDArray[np.bool_]
Statistic = Callable[[Floats], Floats]


@dataclass(frozen=True)
class Tables:
    """One sheet's probabilities and what was asked, by prompt."""

    sheet: ScoreSheet

    @cached_property
    def constants(self) -> Mapping[str, Any]:
        return self.sheet.constants["tag_adherence"]

    @cached_property
    def tags(self) -> list[str]:
        return list(self.constants["tags"])

    @cached_property
    def p(self) -> Floats:
        """(n, U)"""
        return self.sheet.features["tag_adherence.p"].astype(np.float64)

    @cached_property
    def seen(self) -> Masks:
        """(n, U): p above the tag's threshold."""
        return np.asarray(self.p > np.array(self.constants["thresholds"]))

    @cached_property
    def prompts(self) -> list[str]:
        return list(dict.fromkeys(self.sheet.prompt_ids))

    @cached_property
    def member(self) -> Floats:
        """(P, n): which pictures are a prompt's."""
        place = {prompt_id: k for k, prompt_id in enumerate(self.prompts)}
        found = np.zeros((len(self.prompts), self.sheet.n))
        found[[place[prompt_id] for prompt_id in self.sheet.prompt_ids], np.arange(self.sheet.n)] = 1
        return found

    @cached_property
    def asked(self) -> Masks:
        """(P, U)"""
        return self._named("asked")

    @cached_property
    def hits(self) -> Floats:
        """(P, U): pictures of the prompt that show the tag, asked or not."""
        return self.member @ self.seen

    @cached_property
    def pictures(self) -> Floats:
        """(P,)"""
        return np.asarray(self.member.sum(1))

    @cached_property
    def rates(self) -> Floats:
        """(U, 2): measured TPR and FPR, NaN where they are unknown or too close."""
        known = self.constants["rates"]
        found = np.array([known.get(tag, [np.nan] * 4)[:2] for tag in self.tags], dtype=np.float64).reshape(-1, 2)
        weak = ~(found[:, 0] - found[:, 1] >= LEAST_POWER)
        found[weak] = np.nan
        return found

    def _named(self, what: str) -> Masks:
        found = np.zeros((len(self.prompts), len(self.tags)), dtype=np.bool_)
        for row, prompt_id in enumerate(self.prompts):
            found[row, self.constants[what][prompt_id]] = True
        return found


def statistics(tables: Tables) -> dict[str, tuple[Statistic, int]]:
    """Name to a function of bootstrap weights (B, P) giving (B,), and the prompts behind it."""
    asked = tables.asked
    categories = np.array(tables.constants["categories"])
    found: dict[str, tuple[Statistic, int]] = {}

    def add(name: str, formula: Callable[[Floats], Floats], columns: Masks) -> None:
        found[name] = formula, int(asked[:, columns].any(1).sum())

    everything = np.ones(len(tables.tags), dtype=np.bool_)
    subsets = {"": everything}
    subsets |= {f"_{name}": np.isin(tables.tags, members) for name, members in tables.constants["groups"].items()}
    for category in sorted(set(categories[asked.any(0)]) - {"general"}):
        subsets[f"_{category}"] = categories == category
    subsets |= _count_bins(np.array(tables.constants["counts"]), asked)
    for suffix, columns in subsets.items():
        add(f"tag_macro_recall{suffix}", _macro_recall(tables, columns), columns)
    add("tag_micro_recall", _micro_recall(tables), everything)
    if tables.constants["rates"]:
        known = ~np.isnan(tables.rates[:, 0])
        add("tag_recall_of_real", _of_real(tables), known)
    add("tag_lift", _lift(tables), everything)
    eligible = _two_sided(asked)
    add("tag_auroc", _auroc(tables, np.flatnonzero(eligible)), eligible)
    if tables.constants["rates"]:
        correctable = ~np.isnan(tables.rates[:, 0])
        add("tag_corrected_recall", _corrected(tables), correctable)
    return found


def replicates(tables: Tables, formula: Statistic, seed: int) -> tuple[float, Floats]:
    """The statistic of all prompts, and of every bootstrap draw of prompts."""
    count = len(tables.prompts)
    return float(formula(np.ones((1, count)))[0]), formula(resampling_weights(count, seed=seed))


def mask_of(named: Sequence[Sequence[str]], tags: Sequence[str]) -> Masks:
    """(n, U): which of `tags` each picture's prompt names."""
    place = {tag: k for k, tag in enumerate(tags)}
    mask = np.zeros((len(named), len(tags)), dtype=np.bool_)
    for row, names in enumerate(named):
        mask[row, [place[tag] for tag in names if tag in place]] = True
    return mask


def mean_where(values: npt.NDArray[Any], mask: Masks) -> Floats:
    """Mean along axis 1 over the mask, (n, U) to (n,); NaN where the mask is empty."""
    count = mask.sum(1)
    mean: Floats = np.divide((values * mask).sum(1), count, out=np.full(len(count), np.nan), where=count > 0)
    return mean


def recall_by_tag(tables: Tables, weights: Floats) -> Floats:
    """(B, U): share of asked pictures that show the tag; NaN where it is not asked."""
    hits, asked = weights @ (tables.hits * tables.asked), weights @ (tables.pictures[:, None] * tables.asked)
    return np.divide(hits, asked, out=np.full_like(hits, np.nan), where=asked > 0)


def floor_by_tag(tables: Tables, weights: Floats) -> Floats:
    """(B, U): recall if prompts were permuted over the pictures, in expectation: the share of all that show the tag."""
    return np.asarray((weights @ tables.hits) / (weights @ tables.pictures)[:, None])


def auroc(p: Floats, positive: Masks) -> float:
    """P(p of an asked picture > p of another), ties half (Mann & Whitney 1947); NaN with one side empty."""
    from sklearn.metrics import roc_auc_score  # a second to import, and sheets are read without it

    return float(roc_auc_score(positive, p)) if positive.any() and not positive.all() else float("nan")


def average_precision(p: Floats, positive: Masks) -> float:
    """Mean precision over the asked pictures, tied pictures coming in together; NaN where nothing is asked."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(positive, p)) if positive.any() else float("nan")


def rogan_gladen(share: Floats, tpr: Floats, fpr: Floats) -> Floats:
    """The true share behind a share of positives, clip((r - FPR)/(TPR - FPR), 0, 1) (Rogan & Gladen 1978)."""
    return np.asarray(np.clip((share - fpr) / (tpr - fpr), 0, 1))


def rating_confusion(sheet: ScoreSheet) -> npt.NDArray[np.int64] | None:
    """(4, 4) pictures, asked rating by seen rating, in the order of RATINGS; None where the tagger has no ratings."""
    sheet = sheet.rows(sheet.sound)
    seen = sheet.features.get("tag_adherence.rating")
    if seen is None:
        return None
    asked = [RATINGS.index(sheet.constants["tag_adherence"]["rating"][prompt_id]) for prompt_id in sheet.prompt_ids]
    table = np.zeros((4, 4), dtype=np.int64)
    np.add.at(table, (asked, seen.argmax(1)), 1)
    return table


def per_tag(sheet: ScoreSheet, baseline: ScoreSheet | None = None, *, seed: int = 0) -> list[dict[str, Any]]:
    """One row per asked tag, in the tagger's order; with a baseline, its paired difference in recall and q besides."""
    keep = sheet.sound if baseline is None else sheet.sound & baseline.sound
    tables = Tables(sheet.rows(keep))
    whole = np.ones((1, len(tables.prompts)))
    recall, floor = recall_by_tag(tables, whole)[0], floor_by_tag(tables, whole)[0]
    pictures = (tables.pictures[:, None] * tables.asked).sum(0)
    hits = (tables.hits * tables.asked).sum(0)
    low, high = wilson_interval(hits, pictures)
    asked_rows = tables.member.T @ tables.asked > 0  # (n, U)
    corrected = rogan_gladen(recall, tables.rates[:, 0], tables.rates[:, 1])
    two_sided = _two_sided(tables.asked)
    rows = []
    for k, tag in enumerate(tables.tags):
        if not pictures[k]:
            continue
        error = _corrected_error(recall[k], pictures[k], tables.constants["rates"].get(tag))
        rows.append(
            {
                "tag": tag,
                "category": tables.constants["categories"][k],
                "count": tables.constants["counts"][k],
                "prompts": int(tables.asked[:, k].sum()),
                "pictures": int(pictures[k]),
                "hits": int(hits[k]),
                "recall": float(recall[k]),
                "low": float(low[k]),
                "high": float(high[k]),
                "floor": float(floor[k]),
                "mean_prob": float(tables.p[asked_rows[:, k], k].mean()),
                "auroc": auroc(tables.p[:, k], asked_rows[:, k]) if two_sided[k] else float("nan"),
                "ap": average_precision(tables.p[:, k], asked_rows[:, k]),
                "prevalence": float(asked_rows[:, k].mean()),
                "tpr": float(tables.rates[k, 0]),
                "fpr": float(tables.rates[k, 1]),
                "corrected": float(corrected[k]),
                "corrected_error": error,
            }
        )
    if baseline is not None:
        _add_differences(rows, tables, Tables(baseline.rows(keep)), seed)
    return rows


def _add_differences(rows: list[dict[str, Any]], ours: Tables, theirs: Tables, seed: int) -> None:
    count = len(ours.prompts)
    whole, weights = np.ones((1, count)), resampling_weights(count, seed=seed)
    apart = (recall_by_tag(ours, whole) - recall_by_tag(theirs, whole))[0]
    moved = recall_by_tag(ours, weights) - recall_by_tag(theirs, weights)
    for row in rows:
        k = ours.tags.index(row["tag"])
        found = bootstrap_difference(float(apart[k]), moved[:, k], row["prompts"], True)
        row |= {"difference": found.value, "difference_low": found.low, "difference_high": found.high, "p": found.p}
    for row, q in zip(rows, false_discovery_q(np.array([row["p"] for row in rows])), strict=True):
        row["q"] = float(q)


def _corrected_error(recall: float, n: float, rates: list[float] | None) -> float:
    """Standard error of the corrected share by the delta method: of the share, and of TPR and FPR themselves."""
    if rates is None or rates[0] - rates[1] < LEAST_POWER:
        return float("nan")
    tpr, fpr, with_it, without = rates
    share = float(np.clip((recall - fpr) / (tpr - fpr), 0, 1))
    variance = recall * (1 - recall) / n + share**2 * tpr * (1 - tpr) / with_it
    variance += (1 - share) ** 2 * fpr * (1 - fpr) / without
    return float(np.sqrt(variance) / (tpr - fpr))


def _macro(by_tag: Floats) -> Floats:
    """Mean over tags that are known, (B, U) to (B,)."""
    known = ~np.isnan(by_tag)
    count = known.sum(1)
    total = np.where(known, by_tag, 0).sum(1)
    return np.asarray(np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0))


def _macro_recall(tables: Tables, columns: Masks) -> Statistic:
    return lambda weights: _macro(recall_by_tag(tables, weights)[:, columns])


def _micro_recall(tables: Tables) -> Statistic:
    hits, asked = (tables.hits * tables.asked).sum(1), (tables.pictures[:, None] * tables.asked).sum(1)

    def share(weights: Floats) -> Floats:
        count = weights @ asked
        return np.asarray(np.divide(weights @ hits, count, out=np.full(len(count), np.nan), where=count > 0))

    return share


def _of_real(tables: Tables) -> Statistic:
    """Macro recall as a share of the recall that the tagger has on real pictures of the same tags: 1 is as good."""
    tpr = tables.rates[:, 0]

    def share(weights: Floats) -> Floats:
        recall = recall_by_tag(tables, weights)
        return _macro(np.where(np.isnan(tpr), np.nan, recall)) / _macro(np.where(np.isnan(recall), np.nan, tpr))

    return share


def _count_bins(counts: npt.NDArray[np.int64], asked: Masks) -> dict[str, Masks]:
    """Tags by how many pictures the tagger learned them from; none where all asked tags are in one bin."""
    bins = {
        "_over_10k": counts >= 10_000,
        "_1k_to_10k": (counts >= 1_000) & (counts < 10_000),
        "_under_1k": (counts > 0) & (counts < 1_000),
    }
    found = {name: members for name, members in bins.items() if (asked.any(0) & members).any()}
    return found if len(found) > 1 else {}


def _lift(tables: Tables) -> Statistic:
    return lambda weights: _macro(recall_by_tag(tables, weights) - floor_by_tag(tables, weights))


def _corrected(tables: Tables) -> Statistic:
    tpr, fpr = tables.rates.T
    return lambda weights: _macro(rogan_gladen(recall_by_tag(tables, weights), tpr, fpr))


def _auroc(tables: Tables, chosen: npt.NDArray[np.intp]) -> Statistic:
    """Macro AUROC over tags whose two sides are large enough, from prompt-by-prompt comparisons worked out once."""
    parts: list[tuple[Masks, Floats]] = []
    for k in chosen:
        side = tables.asked[:, k]
        rows = side[tables.member.argmax(0)]
        ours, theirs = tables.member[side][:, rows], tables.member[~side][:, ~rows]
        above = _above(tables.p[rows, k], tables.p[~rows, k])
        parts.append((side, (ours @ above @ theirs.T) / np.outer(ours.sum(1), theirs.sum(1))))

    def macro(weights: Floats) -> Floats:
        found = np.full((len(weights), len(parts)), np.nan)
        for column, (side, above) in enumerate(parts):
            ours, theirs = weights[:, side], weights[:, ~side]
            pairs = ours.sum(1) * theirs.sum(1)
            won = ((ours @ above) * theirs).sum(1)
            found[:, column] = np.divide(won, pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)
        return _macro(found)

    return macro


def _two_sided(asked: Masks) -> Masks:
    return np.asarray((asked.sum(0) >= SIDE) & ((~asked).sum(0) >= SIDE))


def _above(ours: Floats, theirs: Floats) -> Floats:
    """(a, b): 1 where ours is larger, ½ where equal."""
    return np.asarray((ours[:, None] > theirs) + 0.5 * (ours[:, None] == theirs))
