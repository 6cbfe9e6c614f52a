"""Tag adherence: which of the asked tags a WD v3 tagger sees in the picture, and which ruled-out ones."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ambergrade.errors import BadInput, BadSetting
from ambergrade.identity import file_digest
from ambergrade.nouns import Measurement, Picture, Prompt
from ambergrade.score.folders import load_timm, require_files, scoring_mode
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import (
    Floats,
    PairedDifference,
    percentile_interval,
    resampling_weights,
    wilson_interval,
)

CATEGORIES = {"0": "general", "1": "artist", "3": "copyright", "4": "character", "5": "meta", "9": "rating"}
"""Danbooru's numbers in selected_tags.csv; 9 is WD's own, its four rows are ratings, not tags."""
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class TagAdherence:
    """Scores pictures with a tagger folder: timm config.json + model.safetensors, selected_tags.csv, thresholds.json.

    Per picture, over the prompt's tags that the tagger knows, with p = sigmoid(logit):
    `tag_recall` share of asked tags with p > threshold; `tag_prob` mean p of asked tags; `tag_leak` mean p
    of unwanted tags; `tag_balance` = ½(mean p over asked + mean (1-p) over unwanted), the closed-world form
    of sdeval's Bikini Plus, with equal weights; `tag_scorable` share of asked tags that the tagger knows.
    Each named group adds `tag_recall_<group>` and `tag_prob_<group>` over its asked tags.
    A picture with nothing to score in a column is NaN there.
    """

    name = "tag_adherence"

    def __init__(
        self,
        tagger: str,
        thresholds: Mapping[str, float] | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        device: str = "cpu",
    ) -> None:
        """`thresholds`: category name to probability; by default the folder's thresholds.json."""
        self._folder = load_timm(tagger, device=device)
        self._device = device
        rows = _read_tags(self._folder.path)
        classes = self._folder.network.num_classes
        if classes != len(rows):
            raise BadInput(
                f"{self._folder.path}: {len(rows)} rows in selected_tags.csv, {classes} outputs in the network."
            )
        needed = {category for _, category in rows} - {"rating"}
        if thresholds is None:
            found = json.loads(require_files(self._folder.path, "thresholds.json")[0].read_text())
            thresholds = {category: float(value) for category, value in found.items() if category in needed}
        if not needed <= thresholds.keys():
            raise BadSetting(f"Thresholds are needed for {sorted(needed)}, found {sorted(thresholds)}.")
        # Tag name to (output, threshold), in the order of the csv.
        self._known = {
            name: (output, float(thresholds[category]))
            for output, (name, category) in enumerate(rows)
            if category != "rating"
        }
        self._groups = {name: list(tags) for name, tags in (groups or {}).items()}
        unknown = sorted({tag for tags in self._groups.values() for tag in tags} - self._known.keys())
        if unknown:
            raise BadSetting(f"Tag groups name tags that the tagger does not know: {', '.join(unknown[:12])}.")
        self.columns: Mapping[str, bool] = {
            "tag_recall": True,
            "tag_prob": True,
            "tag_leak": False,
            "tag_balance": True,
            "tag_scorable": True,
            **{f"tag_{what}_{group}": True for group in self._groups for what in ("recall", "prob")},
        }
        self.fingerprint: Mapping[str, Any] = {
            **self._folder.fingerprint,
            "tags": file_digest(self._folder.path / "selected_tags.csv"),
            "thresholds": {category: float(thresholds[category]) for category in sorted(needed)},
            "groups": self._groups,
            "preprocessing": f"white pad to square, PIL {self._folder.interpolation} to {self._folder.size}, BGR",
        }

    def rows(self, pictures: Sequence[Picture], prompts: Mapping[str, Prompt]) -> Mapping[str, npt.NDArray[Any]]:
        """The columns, and `tag_adherence.asked` / `.unwanted` (n, U): p where the tag is, NaN elsewhere."""
        tags = self._tags(prompts)
        outputs, threshold = _columns_of(self._known, tags)
        p = self.probabilities([picture.pixels for picture in pictures])[:, outputs]
        asked = _mask([prompts[picture.prompt_id].tags for picture in pictures], tags)
        unwanted = _mask([prompts[picture.prompt_id].unwanted for picture in pictures], tags)
        hit = (p > threshold).astype(np.float64)
        prob, leak = _mean_where(p, asked), _mean_where(p, unwanted)
        wanted = np.array([len(set(prompts[picture.prompt_id].tags)) for picture in pictures], dtype=np.float64)
        found: dict[str, npt.NDArray[Any]] = {
            "tag_recall": _mean_where(hit, asked),
            "tag_prob": prob,
            "tag_leak": leak,
            "tag_balance": (prob + 1 - leak) / 2,
            "tag_scorable": np.divide(asked.sum(1), wanted, out=np.full(len(wanted), np.nan), where=wanted > 0),
            "tag_adherence.asked": np.where(asked, p, np.nan).astype(np.float32),
            "tag_adherence.unwanted": np.where(unwanted, p, np.nan).astype(np.float32),
        }
        for group, members in self._groups.items():
            inside = asked & np.isin(tags, members)
            found[f"tag_recall_{group}"] = _mean_where(hit, inside)
            found[f"tag_prob_{group}"] = _mean_where(p, inside)
        return found

    def constants(self, prompts: Mapping[str, Prompt]) -> Mapping[str, Any]:
        """Names and thresholds of the U tags that prompts name, the groups, and the asked tags the tagger lacks."""
        tags = self._tags(prompts)
        named = {tag for prompt in prompts.values() for tag in prompt.tags}
        return {
            "tags": list(tags),
            "thresholds": [self._known[tag][1] for tag in tags],
            "groups": self._groups,
            "unscorable": sorted(named - self._known.keys()),
        }

    def probabilities(self, pixels: Sequence[npt.NDArray[np.uint8]]) -> Floats:
        """Probability of every output for pictures of any size, uint8 RGB: (n, T)."""
        batch = torch.from_numpy(np.stack([self.prepare(picture) for picture in pixels]))
        with scoring_mode():
            logits: torch.Tensor = self._folder.network(batch.to(self._device))
        probabilities: Floats = logits.sigmoid().double().cpu().numpy()
        return probabilities

    def prepare(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """uint8 RGB (height, width, 3) to what a WD v3 network reads: BGR (3, size, size), as wdv3-timm does."""
        height, width, _ = pixels.shape
        side = max(height, width)
        square = np.full((side, side, 3), 255, dtype=np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = pixels
        target_height, target_width = self._folder.size
        image = Image.fromarray(square)
        if image.size != (target_width, target_height):
            image = image.resize((target_width, target_height), _FILTERS[self._folder.interpolation])
        scaled = np.asarray(image, dtype=np.float32) / 255
        # mean and std stand in RGB order; the swap is last, as in wdv3-timm.
        normal = (scaled - np.array(self._folder.mean, np.float32)) / np.array(self._folder.std, np.float32)
        return np.ascontiguousarray(normal[:, :, ::-1].transpose(2, 0, 1))

    @staticmethod
    def aggregates(sheet: ScoreSheet, *, seed: int) -> dict[str, Measurement]:
        """`tag_macro_recall` (and one per group): mean over tags of each tag's recall, bootstrapped over prompts."""
        found = {}
        for name, hits, asked in _macro_tables(sheet):
            value = float(_macro(hits.sum(0), asked.sum(0)))
            low, high = percentile_interval(_resampled_macro(hits, asked, seed))
            found[name] = Measurement(value, low, high, int((asked.sum(1) > 0).sum()))
        return found

    @staticmethod
    def differences(sheet: ScoreSheet, baseline: ScoreSheet, *, seed: int) -> dict[str, PairedDifference]:
        """Paired: both sheets are resampled by the same draws of prompts; p is the bootstrap's."""
        found = {}
        theirs = {name: (hits, asked) for name, hits, asked in _macro_tables(baseline)}
        for name, hits, asked in _macro_tables(sheet):
            other_hits, other_asked = theirs[name]
            value = float(_macro(hits.sum(0), asked.sum(0)) - _macro(other_hits.sum(0), other_asked.sum(0)))
            moved = _resampled_macro(hits, asked, seed) - _resampled_macro(other_hits, other_asked, seed)
            prompts = int((asked.sum(1) > 0).sum())
            found[name] = _bootstrap_difference(value, moved[~np.isnan(moved)], prompts)
        return found

    @staticmethod
    def remarks(sheet: ScoreSheet) -> list[str]:
        unscorable = sheet.constants["tag_adherence"]["unscorable"]
        if not unscorable:
            return []
        some = ", ".join(unscorable[:8]) + (", …" if len(unscorable) > 8 else "")
        share = float(np.nanmean(sheet.columns["tag_scorable"]))
        return [f"tag_adherence: {share:.0%} of asked tags are scorable; the tagger does not know {some}."]

    def _tags(self, prompts: Mapping[str, Prompt]) -> list[str]:
        """The tags that any prompt asks for or rules out and that the tagger knows, in the csv's order."""
        named = {tag for prompt in prompts.values() for tag in (*prompt.tags, *prompt.unwanted)}
        return [tag for tag in self._known if tag in named]


def _bootstrap_difference(value: float, replicates: Floats, prompts: int) -> PairedDifference:
    """A difference with its replicates' percentile interval and p; all NaN where nothing could be compared."""
    if replicates.size < 2:
        return PairedDifference(value, math.nan, math.nan, math.nan, prompts, math.nan)
    low, high = percentile_interval(replicates)
    tail = min(float(np.mean(replicates <= 0)), float(np.mean(replicates >= 0)))
    p = min(1.0, 2 * max(tail, 1 / (1 + replicates.size)))
    return PairedDifference(value, low, high, p, prompts, 2.8 * float(replicates.std(ddof=1)))


def per_tag(sheet: ScoreSheet) -> list[dict[str, Any]]:
    """One row per asked tag: pictures asked and hit, recall with its Wilson 95 % interval, mean probability."""
    constants = sheet.constants["tag_adherence"]
    p = sheet.features["tag_adherence.asked"].astype(np.float64)
    asked = ~np.isnan(p)
    hits, count = ((p > np.array(constants["thresholds"])) & asked).sum(0), asked.sum(0)
    low, high = wilson_interval(hits, count)
    return [
        {
            "tag": tag,
            "pictures": int(count[k]),
            "hits": int(hits[k]),
            "recall": float(hits[k] / count[k]),
            "low": float(low[k]),
            "high": float(high[k]),
            "mean_prob": float(p[asked[:, k], k].mean()),
        }
        for k, tag in enumerate(constants["tags"])
        if count[k]
    ]


def _read_tags(folder: Any) -> list[tuple[str, str]]:
    """(name, category name) of every output, from selected_tags.csv."""
    path = require_files(folder, "selected_tags.csv")[0]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"name", "category"} <= rows[0].keys():
        raise BadInput(f"{path} must have the columns tag_id,name,category,count.")
    strange = sorted({row["category"] for row in rows} - CATEGORIES.keys())
    if strange:
        raise BadInput(f"{path}: unknown categories {', '.join(strange)}; known are {', '.join(CATEGORIES)}.")
    return [(row["name"], CATEGORIES[row["category"]]) for row in rows]


def _columns_of(known: Mapping[str, tuple[int, float]], tags: Sequence[str]) -> tuple[list[int], Floats]:
    return [known[tag][0] for tag in tags], np.array([known[tag][1] for tag in tags], dtype=np.float64)


def _mask(named: Sequence[Sequence[str]], tags: Sequence[str]) -> npt.NDArray[np.bool_]:
    """(n, U): which of `tags` each picture's prompt names."""
    place = {tag: k for k, tag in enumerate(tags)}
    mask = np.zeros((len(named), len(tags)), dtype=np.bool_)
    for row, names in enumerate(named):
        mask[row, [place[tag] for tag in names if tag in place]] = True
    return mask


def _mean_where(values: Floats, mask: npt.NDArray[np.bool_]) -> Floats:
    """Mean along axis 1 over the mask; NaN where the mask is empty."""
    count = mask.sum(1)
    mean: Floats = np.divide((values * mask).sum(1), count, out=np.full(len(count), np.nan), where=count > 0)
    return mean


def _macro_tables(sheet: ScoreSheet) -> list[tuple[str, Floats, Floats]]:
    """(aggregate's name, hits, asked) over all tags and over each group; hits and asked are (P, tags)."""
    constants = sheet.constants["tag_adherence"]
    p = sheet.features["tag_adherence.asked"].astype(np.float64)
    asked = ~np.isnan(p)
    hit = asked & (p > np.array(constants["thresholds"]))
    prompts = list(dict.fromkeys(sheet.prompt_ids))
    member = (np.array(prompts)[:, None] == np.array(sheet.prompt_ids)[None, :]).astype(np.float64)
    hits, count = member @ hit, member @ asked
    tables = [("tag_macro_recall", hits, count)]
    for group, members in constants["groups"].items():
        inside = np.isin(constants["tags"], members)
        tables.append((f"tag_macro_recall_{group}", hits[:, inside], count[:, inside]))
    return tables


def _macro(hits: Floats, asked: Floats) -> Floats:
    """Mean over tags (last axis) of hits/asked; tags that were not asked are left out."""
    known = asked > 0
    recall = np.divide(hits, asked, out=np.zeros_like(hits), where=known)
    count = known.sum(-1)
    macro: Floats = np.divide(recall.sum(-1), count, out=np.full(count.shape, np.nan), where=count > 0)
    return macro


def _resampled_macro(hits: Floats, asked: Floats, seed: int) -> Floats:
    """Macro recall of every bootstrap draw of prompts: (B,)."""
    weights = resampling_weights(hits.shape[0], seed=seed)
    return _macro(weights @ hits, weights @ asked)
