"""Says the last word on prompts that nothing was chosen on: the winner beside what it is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ambergrade.chain.context import Context
from ambergrade.chain.point import HELDOUT, LiveMerge, Point, Scoring, score_point
from ambergrade.chain.review import write_contact_sheet
from ambergrade.nouns import PromptSet
from ambergrade.score import figures
from ambergrade.score.comparison import aggregates, differences
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import PairedDifference, interval_text
from ambergrade.store import Finished


@dataclass(frozen=True)
class Finalists:
    """Scores of the winner and of what it is compared with, on the same prompts and seeds."""

    sheets: Mapping[str, ScoreSheet]
    """By label, the winner's first."""
    base: str | None
    """Label of the base; None where there is nothing to compare with."""
    prompts: PromptSet
    leaderboard: tuple[str, ...]
    folder: Path
    done: Mapping[str, Finished]
    """The records of the scores, by label: their files are `scores` and `pictures`, the first ones side by side."""

    @property
    def winner(self) -> str:
        return next(iter(self.sheets))

    @cached_property
    def apart(self) -> dict[str, PairedDifference]:
        """Metric to winner minus base, paired; nothing where there is no base."""
        return differences(self.sheets[self.winner], self.sheets[self.base]) if self.base else {}

    @cached_property
    def text(self) -> str:
        """The tables as the command prints them."""
        scores = {label: aggregates(sheet) for label, sheet in self.sheets.items()}
        word = self.winner.partition(":")[0]
        chosen = "the sweep's winner" if word == "winner" else "what is released"
        table = figures.leaderboard_text(scores, self.leaderboard, winner=self.winner, chosen=chosen)
        lines = [f"Held-out prompts ({len(self.prompts.prompts)}):", table]
        lines += ["", f"{word.capitalize()} minus {self.base}, paired:"] if self.base else []
        for name in filter(self.apart.__contains__, self.leaderboard):
            found = self.apart[name]
            limits = interval_text(found.low, found.high, "+.3f")
            lines.append(f"  {name:<24}{found.value:+.3f} {limits}  {found.verdict}")
        return "\n".join(lines)

    @property
    def contact_sheet(self) -> Path:
        return self.folder / "contact_sheet.png"

    @property
    def differences_plot(self) -> Path:
        return self.folder / "differences.png"


def compare_finalists(
    context: Context,
    scoring: Scoring,
    winner: tuple[str, LiveMerge, Point],
    rivals: Mapping[str, tuple[LiveMerge, Point]],
    base: str | None,
    prompts: PromptSet,
    *,
    leaderboard: tuple[str, ...],
    objective: str,
    kept: int,
    title: str,
    folder: Path,
    originals: Mapping[str, Path] | None = None,
) -> Finalists:
    """Score winner and rivals anew; write held-out table, contact sheet and interval plot into `folder`.

    winner: its label, merge and point. rivals: the same by label; `base`, if any, is one of them. kept: pictures a row.
    originals: prompt id to a real picture of what it asks for.
    """
    label, merge, point = winner
    entered = {label: (merge, point), **rivals}
    done = {name: _scored(context, scoring, made, at, prompts, name, kept) for name, (made, at) in entered.items()}
    sheets = {name: ScoreSheet.read(found.files["scores"]) for name, found in done.items()}
    known = aggregates(next(iter(sheets.values())))
    final = Finalists(sheets, base, prompts, tuple(name for name in leaderboard if name in known), folder, done)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "heldout.txt").write_text(final.text + "\n")
    scores = {name: aggregates(sheet).get(objective) for name, sheet in sheets.items()}
    write_contact_sheet(
        {name: found.files["pictures"] for name, found in done.items()},
        prompts.first(kept).prompts,
        scoring.sampler,
        final.contact_sheet,
        title=title,
        subtitle=f"{prompts.name} prompts, one seed a column",
        notes={name: f"{objective} {score.value:.3f}" for name, score in scores.items() if score},
        marked=label,
        originals=originals,
    )
    if base:
        plotted = {name: {label: final.apart[name]} for name in final.leaderboard}
        figures.interval_plot(plotted, final.differences_plot, baseline=base)
    return final


def _scored(
    context: Context, scoring: Scoring, merge: LiveMerge, point: Point, prompts: PromptSet, label: str, kept: int
) -> Finished:
    return score_point(
        context,
        merge,
        scoring,
        point,
        prompts,
        label,
        stage=HELDOUT,
        kept=kept,
        line=f"held out: {label}",
        journaled_as="evaluation",
    )
