"""Shows what a sweep found: leaderboard, winner set and pictures, on the screen, on disk and in MLflow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ambergrade.chain.context import Context
from ambergrade.chain.point import cut
from ambergrade.errors import BadInput
from ambergrade.generate.contact_sheet import contact_sheet, write_png
from ambergrade.nouns import Prompt, SamplerSettings
from ambergrade.pictures import open_picture
from ambergrade.score.comparison import aggregates
from ambergrade.score.figures import Value, leaderboard_text
from ambergrade.score.review import Review, html_review
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import interval_text
from ambergrade.store import written_aside
from ambergrade.track import ui
from ambergrade.track.journal import Journal, Run

ROWS = 30
"""Points on a contact sheet, the best ones."""


@dataclass(frozen=True)
class Shown:
    """A review on disk."""

    review: Review
    folder: Path
    pictures: Mapping[str, Path]
    """What each shows to its PNG."""

    @property
    def best(self) -> str:
        """Label of the best point."""
        return self.review.found.best

    def page(self, **parts: Any) -> Path:
        """Write the page (parts: `score.review.html_review`) beside the pictures."""
        file = self.folder / "review.html"
        with written_aside(file) as aside:
            aside.write_text(html_review(self.review, self.pictures, **parts))
        return file

    def journal(self, run: Run, page: Path) -> None:
        """Put the page and the pictures on a run; a sweep that grew shows its pictures one step further."""
        for name, file in self.pictures.items():
            run.picture(name, file, step=len(self.review.points))
        run.file(page)

    def view(self, run: Run, kind: str, params: Sequence[str]) -> str:
        """Save the leaderboard as a view of MLflow's UI on the runs of this kind below `run`; returns its key."""
        review = self.review
        higher = review.scores[self.best][review.objective].higher_is_better
        return run.view(
            "sweep", kind, order_by=review.objective, ascending=not higher, params=params, metrics=review.columns
        )


def draw(
    review: Review,
    folder: Path,
    strips: Mapping[str, Path],
    prompts: Sequence[Prompt],
    sampler: SamplerSettings,
    *,
    card: tuple[Value, Value] | None = None,
    originals: Mapping[str, Path] | None = None,
) -> Shown:
    """Draw the pictures that suit a sweep's axes, and a contact sheet of its best points.

    `strips`: label to the file with the pictures of `prompts`, side by side. `card`: a point to mark on a heat map.
    `originals`: prompt id to a real picture of what it asks for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "leaderboard.txt").write_text(review.table + "\n")
    pictures = review.draw(folder, card=card)
    rows = review.best_first[:ROWS]
    which = f"the {ROWS} best of {len(review.points)} points" if len(rows) < len(review.points) else "best first"
    notes = {}
    for label in rows:
        score = review.scores[label][review.objective]
        notes[label] = f"{review.objective} {score.value:.3f}\n{interval_text(score.low, score.high)}"
        if label != review.found.best and label in review.found.members:
            notes[label] += "\nin the winner set"
    pictures["contact sheet"] = folder / "contact_sheet.png"
    write_contact_sheet(
        {label: strips[label] for label in rows},
        prompts,
        sampler,
        pictures["contact sheet"],
        title=review.title,
        subtitle=f"{which}; the same prompts and seeds in every row",
        notes=notes,
        marked=review.found.best,
        originals=originals,
    )
    return Shown(review, folder, pictures)


def write_contact_sheet(
    strips: Mapping[str, Path],
    prompts: Sequence[Prompt],
    sampler: SamplerSettings,
    path: Path,
    *,
    title: str,
    subtitle: str,
    notes: Mapping[str, str],
    marked: str,
    originals: Mapping[str, Path] | None = None,
) -> None:
    """Write a contact sheet: one row a strip of pictures and one column a prompt; above them the originals, if any."""
    known = {key: np.asarray(open_picture(file)) for key, file in (originals or {}).items()}
    first = {"original": known} if known else {}
    rows = first | {
        label: {prompt.id: pixels for prompt, pixels in zip(prompts, cut(strip, sampler.width), strict=False)}
        for label, strip in strips.items()
    }
    tags = {prompt.id: ", ".join(tag.replace("_", " ") for tag in prompt.tags) or prompt.text for prompt in prompts}
    drawn = contact_sheet(
        rows,
        title=title,
        subtitle=f"{subtitle}, {sampler.steps} {sampler.name} steps",
        captions=tags,
        notes={"original": "what each prompt was written from", **notes},
        marked=[marked],
        side=256 if len(rows) <= 6 else 160,
    )
    write_png(path, drawn)


def tell_unlike(
    context: Context,
    run: Run,
    folder: Path,
    sheets: Mapping[str, ScoreSheet],
    objective: str,
    leaderboard: Sequence[str],
    reason: BadInput,
) -> None:
    """Print the leaderboard of points that cannot be paired, as of a sweep over prompts: each with its own interval."""
    scores = {label: aggregates(sheet) for label, sheet in sheets.items()}
    asked = dict.fromkeys([objective, *leaderboard])
    columns = [name for name in asked if any(name in found for found in scores.values())]
    rows, _, _ = leaderboard_text(scores, columns).rpartition("\n\n")
    table = f"{rows}\n\nbest first by {columns[0]}, 95 % intervals\n\nNo winner set: {reason}"
    (folder / "leaderboard.txt").write_text(table + "\n")
    run.note(f"```\n{table}\n```")
    higher = next(found[columns[0]].higher_is_better for found in scores.values() if columns[0] in found)
    view = run.view("sweep", "point", order_by=columns[0], ascending=not higher, params=[], metrics=columns)
    print(f"\n{table}\n")
    tell_dashboard(context.journal, view)


def tell_dashboard(journal: Journal, view: str, width: int = 8) -> None:
    """Print where MLflow shows a saved view, under a heading of `width` characters; nothing if none is journaled."""
    if journal.is_open:
        print(f"{'MLflow':<{width}}{ui.ui_command(journal.root)}")
        print(f"{'':<{width}}{ui.deep_link(journal.experiment_id, view=view)}", flush=True)


def links_of(journal: Journal, run: Run, view: str) -> dict[str, str]:
    """Addresses of a sweep in MLflow's UI; none where nothing is journaled."""
    if not journal.is_open or not run.id:
        return {}
    number = journal.experiment_id
    return {
        "leaderboard in MLflow": ui.deep_link(number, view=view),
        "pictures side by side": ui.deep_link(number, view=view, chart=True),
        "the sweep's run": ui.run_link(number, run.id),
    }
