"""Tag adherence: which of the asked tags a WD v3 tagger sees in the picture, and which ruled-out ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ambergrade.errors import BadSetting
from ambergrade.nouns import RATINGS, Measurement, Picture, Prompt
from ambergrade.score.adherence import SIDE, Tables, mask_of, mean_where, per_tag, replicates, statistics
from ambergrade.score.scoring import Metric
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import Floats, PairedDifference, bootstrap_difference, percentile_interval
from ambergrade.score.tags import canonical_tags, closed
from ambergrade.store import find_file

__all__ = ["TagAdherence", "per_tag"]


class TagAdherence(Metric):
    """Scores pictures with a WD v3 tagger folder (see score/tagger.py). p is a tag's probability, τ its threshold.

    Per picture, over the prompt's tags that the tagger knows:
    `tag_recall` share of asked tags with p > τ; `tag_prob` mean p of asked tags; `tag_leak` mean p of unwanted tags;
    `tag_balance` = ½(mean p over asked + mean (1-p) over unwanted), the closed-world form of sdeval's Bikini Plus with
    equal weights; `tag_negative_leak` share of unwanted and negative-prompt tags with p > τ; `tag_contradiction` 1
    where the prompt pins one member of an exclusive group, it is not seen, and another is; `tag_excess` how many
    unasked general tags are seen (compare it with a baseline); `tag_scorable` share of asked tags that it knows.
    `rating_hit` 1 where the most probable rating is the asked one; `rating_error` how many steps it is off;
    `rating_leak` P(questionable) + P(explicit) where the prompt is safe.
    Each named group adds `tag_recall_<group>` and `tag_prob_<group>` over its asked tags.
    A tag that another asked one implies (`very_long_hair` is `long_hair` too) is not counted a second time, is no
    excess where it is seen, and is not ruled out.
    A picture with nothing to score in a column is NaN there. Precision against the prompt is not told: what nobody
    asked for may well be in the picture.
    """

    name = "tag_adherence"

    def __init__(
        self,
        tagger: str,
        thresholds: Mapping[str, float] | None = None,
        groups: Mapping[str, Sequence[str]] | None = None,
        exclusive: Mapping[str, Sequence[str]] | None = None,
        implied: Mapping[str, Sequence[str]] | None = None,
        rates: str | None = None,
        device: str = "cpu",
    ) -> None:
        """`thresholds`: category name to probability; by default the folder's thresholds.json or its model card's.

        `exclusive`: group to tags of which a picture shows one at most. `implied`: tag to the tags that every picture
        of it has as well. Tags the tagger lacks are left out of both. `rates`: a rates.csv of the tagger's errors
        (evaluate.py action=calibrate), by default the folder's own.
        """
        from ambergrade.score.tagger import Tagger, read_rates  # a sheet is read without them

        self._tagger = Tagger(tagger, thresholds, device)
        known = self._tagger.known
        self._groups = {name: list(tags) for name, tags in (groups or {}).items()}
        unknown = sorted({tag for tags in self._groups.values() for tag in tags} - known.keys())
        if unknown:
            raise BadSetting(f"Tag groups name tags that the tagger does not know: {', '.join(unknown[:12])}.")
        self._exclusive = {
            name: [tag for tag in tags if tag in known] for name, tags in sorted((exclusive or {}).items())
        }
        pairs = {tag: [other for other in more if other in known] for tag, more in closed(implied or {}).items()}
        self._implied = {tag: frozenset(more) for tag, more in pairs.items() if more and tag in known}
        own_rates = self._tagger.path / "rates.csv"
        file = find_file(rates) if rates else own_rates if own_rates.is_file() else None
        self._rates = read_rates(file) if file else {}
        self._rated = set(self._tagger.ratings) == set(RATINGS)
        every = self.scores(groups=self._groups)
        self.columns: Mapping[str, bool] = {
            name: better for name, better in every.items() if self._rated or not name.startswith("rating_")
        }
        self.fingerprint: Mapping[str, Any] = {
            **self._tagger.fingerprint,
            "groups": self._groups,
            "exclusive": self._exclusive,
            **({"implied": {tag: sorted(more) for tag, more in self._implied.items()}} if self._implied else {}),
        }

    @classmethod
    def scores(cls, *, groups: Mapping[str, Sequence[str]] | None = None, **settings: Any) -> Mapping[str, bool]:
        """See `Metric`; a tagger without the four ratings scores no `rating_…`."""
        return {
            "tag_recall": True,
            "tag_prob": True,
            "tag_leak": False,
            "tag_balance": True,
            "tag_negative_leak": False,
            "tag_contradiction": False,
            "tag_excess": False,
            "tag_scorable": True,
            "rating_hit": True,
            "rating_error": False,
            "rating_leak": False,
            **{f"tag_{what}_{group}": True for group in groups or {} for what in ("recall", "prob")},
        }

    def rows(self, pictures: Sequence[Picture], prompts: Mapping[str, Prompt]) -> Mapping[str, npt.NDArray[Any]]:
        """The columns; `tag_adherence.p` (n, U) of the tags that prompts name; `tag_adherence.rating` (n, 4)."""
        tags = self._tags(prompts)
        every = self._tagger.probabilities([picture.pixels for picture in pictures])
        p = every[:, [self._tagger.known[tag] for tag in tags]]
        shown = [prompts[picture.prompt_id] for picture in pictures]
        asked = mask_of([self._asked(prompt) for prompt in shown], tags)
        meant = mask_of([self._meant(prompt) for prompt in shown], tags)
        unwanted = mask_of([prompt.unwanted for prompt in shown], tags) & ~meant
        negative = mask_of([_ruled_out(prompt) for prompt in shown], tags) & ~meant
        seen = p > np.array([self._tagger.threshold(tag) for tag in tags])
        prob, leak = mean_where(p, asked), mean_where(p, unwanted)
        wanted = np.array([len(self._asked(prompt)) for prompt in shown], dtype=np.float64)
        found: dict[str, npt.NDArray[Any]] = {
            "tag_recall": mean_where(seen, asked),
            "tag_prob": prob,
            "tag_leak": leak,
            "tag_balance": (prob + 1 - leak) / 2,
            "tag_negative_leak": mean_where(seen, negative),
            "tag_contradiction": self._contradiction(tags, meant, seen),
            "tag_excess": self._excess(every, shown),
            "tag_scorable": np.divide(asked.sum(1), wanted, out=np.full(len(wanted), np.nan), where=wanted > 0),
            "tag_adherence.p": p.astype(np.float32),
        }
        if self._rated:
            found |= self._rating(every, shown)
        for group, members in self._groups.items():
            inside = asked & np.isin(tags, members)
            found[f"tag_recall_{group}"] = mean_where(seen, inside)
            found[f"tag_prob_{group}"] = mean_where(p, inside)
        return found

    def probabilities(self, pixels: Sequence[npt.NDArray[np.uint8]]) -> Floats:
        """Probability of every output of the tagger: (n, T)."""
        return self._tagger.probabilities(pixels)

    def constants(self, prompts: Mapping[str, Prompt]) -> Mapping[str, Any]:
        """The U tags and what is known of them, and what each prompt asks for, as places among the tags."""
        tags = self._tags(prompts)
        place = {tag: k for k, tag in enumerate(tags)}
        named = {tag for prompt in prompts.values() for tag in prompt.tags}
        about = [self._tagger.tags[self._tagger.known[tag]] for tag in tags]
        return {
            "tags": tags,
            "thresholds": [self._tagger.threshold(tag) for tag in tags],
            "categories": [tag.category for tag in about],
            "counts": [tag.count for tag in about],
            "groups": self._groups,
            "rates": {tag: self._rates[tag] for tag in tags if tag in self._rates},
            "asked": {key: sorted(place[t] for t in self._asked(p) if t in place) for key, p in prompts.items()},
            "rating": {key: prompt.rating for key, prompt in prompts.items()},
            "unscorable": sorted(named - self._tagger.known.keys()),
        }

    @classmethod
    def aggregates(cls, sheet: ScoreSheet, *, seed: int) -> dict[str, Measurement]:
        """Over tags, bootstrapped over prompts.

        `tag_macro_recall` (and one per group, per category beside general, and per bin of the csv's counts): mean of
        the tags' recalls, since common tags saturate the `tag_micro_recall` of all slots. `tag_lift`: macro recall less
        what permuted prompts would reach.
        `tag_auroc`: mean over tags of P(p where asked > p where not), for tags with 10 prompts on each side: chance is
        ½ whatever the threshold or the tag's frequency. `tag_corrected_recall`: recall less the tagger's own errors.
        `tag_recall_of_real`: recall as a share of the tagger's recall on real pictures of the same tags.
        """
        tables, found = Tables(sheet), {}
        for name, (formula, prompts) in statistics(tables).items():
            value, moved = replicates(tables, formula, seed)
            low, high = percentile_interval(moved, prompts)
            found[name] = Measurement(value, low, high, prompts)
        return found

    @classmethod
    def differences(cls, sheet: ScoreSheet, baseline: ScoreSheet, *, seed: int) -> dict[str, PairedDifference]:
        """Paired: both sheets are resampled by the same draws of prompts; p is the bootstrap's."""
        ours, theirs = Tables(sheet), Tables(baseline)
        others, found = statistics(theirs), {}
        for name, (formula, prompts) in statistics(ours).items():
            value, moved = replicates(ours, formula, seed)
            other_value, other_moved = replicates(theirs, others[name][0], seed)
            found[name] = bootstrap_difference(value - other_value, moved - other_moved, prompts, True)
        return found

    @classmethod
    def remarks(cls, sheet: ScoreSheet) -> list[str]:
        said = []
        unscorable = sheet.constants["tag_adherence"]["unscorable"]
        if unscorable:
            some = ", ".join(unscorable[:8]) + (", …" if len(unscorable) > 8 else "")
            share = float(np.nanmean(sheet.columns["tag_scorable"]))
            said.append(f"tag_adherence: {share:.0%} of asked tags are scorable; the tagger does not know {some}.")
        if statistics(Tables(sheet))["tag_auroc"][1] == 0:
            said.append(f"tag_auroc: not given, no tag is asked by {SIDE} prompts and not asked by {SIDE} others.")
        return said

    def _asked(self, prompt: Prompt) -> tuple[str, ...]:
        """The prompt's tags, each once and without those that another of them implies."""
        twice = {other for tag in prompt.tags for other in self._implied.get(tag, ())}
        return tuple(tag for tag in dict.fromkeys(prompt.tags) if tag not in twice)

    def _meant(self, prompt: Prompt) -> list[str]:
        """The prompt's tags and all that they imply."""
        return sorted({*prompt.tags, *(other for tag in prompt.tags for other in self._implied.get(tag, ()))})

    def _tags(self, prompts: Mapping[str, Prompt]) -> list[str]:
        """The tags that any prompt names and the exclusive ones that the tagger knows, in the csv's order."""
        named = {tag for prompt in prompts.values() for tag in (*prompt.tags, *_ruled_out(prompt))}
        named |= {tag for tags in self._exclusive.values() for tag in tags}
        return [tag for tag in self._tagger.known if tag in named]

    def _contradiction(
        self, tags: Sequence[str], meant: npt.NDArray[np.bool_], seen: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float64]:
        """(n,): 1 where any pinned group shows another member and not the meant one; NaN where none is pinned."""
        pinned, wrong = np.zeros(len(meant), dtype=np.bool_), np.zeros(len(meant), dtype=np.bool_)
        for members in self._exclusive.values():
            inside = np.isin(tags, members)
            one = (meant & inside).sum(1) == 1
            right, other = (seen & meant & inside).any(1), (seen & ~meant & inside).any(1)
            pinned |= one
            wrong |= one & other & ~right
        return np.where(pinned, wrong, np.nan)

    def _excess(self, every: Floats, shown: Sequence[Prompt]) -> npt.NDArray[np.float64]:
        """(n,): general tags above the threshold that the prompt neither names nor implies."""
        general = [k for name, k in self._tagger.known.items() if self._tagger.tags[k].category == "general"]
        names = np.array([self._tagger.tags[k].name for k in general])
        seen = every[:, general] > self._tagger.thresholds.get("general", 1.0)
        return np.array(
            [float((row & ~np.isin(names, self._meant(one))).sum()) for row, one in zip(seen, shown, strict=True)]
        )

    def _rating(self, every: Floats, shown: Sequence[Prompt]) -> dict[str, npt.NDArray[Any]]:
        p = every[:, [self._tagger.ratings[name] for name in RATINGS]]
        asked = np.array([RATINGS.index(prompt.rating) for prompt in shown])
        off = np.abs(p.argmax(1) - asked).astype(np.float64)
        return {
            "rating_hit": (off == 0).astype(np.float64),
            "rating_error": off,
            "rating_leak": np.where(asked == 0, p[:, 2] + p[:, 3], np.nan),
            "tag_adherence.rating": p.astype(np.float32),
        }


def _ruled_out(prompt: Prompt) -> tuple[str, ...]:
    """What must not be seen: the unwanted tags, and the negative prompt's, unless the prompt asks for them as well."""
    return tuple(tag for tag in (*prompt.unwanted, *canonical_tags(prompt.negative)) if tag not in prompt.tags)
