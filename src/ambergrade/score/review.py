"""What a sweep found, for people: a leaderboard, the pictures that suit its axes, and one HTML page of all of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ambergrade.errors import BadInput
from ambergrade.nouns import Measurement
from ambergrade.score import sweep_figures
from ambergrade.score.comparison import Winners, aggregates, by_prompt, winners
from ambergrade.score.figures import Value, heat_map, leaderboard_text
from ambergrade.score.html import SORTS, arrow, bar, definitions, interval, number, page, picture, table
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.surface import Surface, fit_surface
from ambergrade.score.sweep_figures import Sample

Floats = npt.NDArray[np.float64]

LARGEST_GRID = 400
"""Cells of a heat map; a denser lattice is drawn as a contour."""
SHOWN_AXES = 6
"""Up to so many axes are columns of the page's leaderboard; more stand in the point's name alone."""
LONGEST_NAME = 60


@dataclass(frozen=True)
class Review:
    """A sweep's points, their scores, and which of them are not significantly different from the best."""

    title: str
    objective: str
    """The column that decides."""
    columns: tuple[str, ...]
    """The leaderboard's columns, the objective first."""
    points: Mapping[str, Mapping[str, Value]]
    """Label to axis to value; every point has the same axes."""
    scores: Mapping[str, Mapping[str, Measurement]]
    """Label to metric to its mean with 95 % limits."""
    found: Winners
    early: Mapping[str, Sample] = field(default_factory=dict)
    """Points that left a race early, by label: how far they lay behind the best, as scores beside its own."""
    surface: Surface | None = None
    """Over two coefficients, through all points."""

    @classmethod
    def of(
        cls,
        sheets: Mapping[str, ScoreSheet],
        points: Mapping[str, Mapping[str, Value]],
        *,
        title: str,
        objective: str,
        columns: Sequence[str],
        early: Mapping[str, tuple[Mapping[str, Value], ScoreSheet]] | None = None,
    ) -> Review:
        """Judge score sheets of the same prompts and seeds. Raises BadInput where they cannot be paired.

        early: values and sheet of every point that left a race, on the first of the same prompts.
        """
        if sheets.keys() != points.keys():
            raise BadInput(f"{len(sheets)} score sheets and {len(points)} points: each point needs its own sheet.")
        found = winners(sheets, objective)
        ordered = tuple(dict.fromkeys([objective, *columns]))
        scores = {label: aggregates(sheet) for label, sheet in sheets.items()}
        left = early or {}
        every = {**sheets, **{label: sheet for label, (_, sheet) in left.items()}}
        rows = dict(zip(every, by_prompt(list(every.values()), objective), strict=True))
        best = scores[found.best][objective]
        behind = {label: _beside(best, rows[found.best] - rows[label]) for label in left}
        samples = {label: Sample(values, behind[label]) for label, (values, _) in left.items()}
        review = cls(title, objective, ordered, points, scores, found, samples)
        places = [
            tuple(values[axis] for axis in review.axes) for values in (*points.values(), *(v for v, _ in left.values()))
        ]
        if len(review.axes) != 2 or any(isinstance(value, str) for place in places for value in place):
            return review
        table = np.stack(list(rows.values()))
        surface = fit_surface(np.array(places, dtype=np.float64), table, higher_is_better=best.higher_is_better)
        return replace(review, surface=surface)

    @cached_property
    def best_first(self) -> tuple[str, ...]:
        """Labels by the objective; what could not be scored comes last."""

        def place(label: str) -> tuple[bool, float]:
            score = self.scores[label][self.objective]
            return math.isnan(score.value), -score.value if score.higher_is_better else score.value

        return tuple(sorted(self.points, key=place))

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Axes on which points differ."""
        names = next(iter(self.points.values())).keys()
        every = [*self.points.values(), *(sample.values for sample in self.early.values())]
        return tuple(name for name in names if len({point[name] for point in every}) > 1)

    @property
    def winner_set(self) -> str:
        """Count the winner set: `3 of 25 points`, in the words that table, page and README share."""
        members, points = len(self.found.members), len(self.points) + len(self.early)
        return (
            f"{members} of {points} points {'is' if members == 1 else 'are'} not significantly different from the best"
        )

    @cached_property
    def table(self) -> str:
        """The leaderboard as plain text."""
        table = leaderboard_text(self.scores, self.columns, winner=self.found.best, winner_set=self.found.members)
        return "\n".join([table, "", f"{self.winner_set}.", *([self.surface_text] if self.surface else [])])

    @property
    def surface_text(self) -> str:
        """Say where the fitted surface is best; empty without one."""
        return self.surface.text((self.axes[0], self.axes[1])) if self.surface else ""

    @property
    def samples(self) -> list[Sample]:
        """Every scored point, for pictures."""
        scored = [label for label in self.points if not math.isnan(self.scores[label][self.objective].value)]
        best, members = self.found.best, self.found.members
        found = [
            Sample(self.points[label], self.scores[label][self.objective], label == best, label in members)
            for label in scored
        ]
        return [*found, *self.early.values()]

    def draw(self, folder: Path, *, card: tuple[Value, Value] | None = None) -> dict[str, Path]:
        """Draw the pictures that suit the axes into a folder: what each shows, and its PNG.

        One axis: a curve. Two: a heat map, or a contour where the points lie on no lattice. Three and more: parallel
        coordinates and what each axis does to the score. `card`: a point that a heat map marks with a diamond.
        """
        samples, about = self.samples, {"score_name": self.objective, "title": self.title}
        numeric = [name for name in self.axes if all(not isinstance(s.values[name], str) for s in samples)]
        if not samples or not self.axes:
            return {}
        if len(self.axes) == 1:
            file = sweep_figures.curve(samples, folder / "curve.png", axis=self.axes[0], **about)
            return {"curve": file}
        if len(self.axes) == 2:
            one, two = self.axes
            pairs = [(sample.values[one], sample.values[two]) for sample in samples]
            cells = len({a for a, _ in pairs}) * len({b for _, b in pairs})
            if sweep_figures.is_grid(pairs) and (cells <= LARGEST_GRID or len(numeric) < 2):
                return {"heat map": self._heat_map(folder / "heat_map.png", samples, card)}
            if len(numeric) == 2:
                return {"contour": sweep_figures.contour(samples, folder / "contour.png", axes=(one, two), **about)}
        drawn = sweep_figures.parallel_coordinates(samples, folder / "parallel.png", axes=self.axes, **about)
        found = {"parallel coordinates": drawn}
        if len(numeric) > 2:
            name = "block profile" if sweep_figures.are_blocks(numeric) else "effects"
            file = folder / f"{name.replace(' ', '_')}.png"
            found[name] = sweep_figures.profile(samples, file, axes=numeric, **about)
        return found

    def _heat_map(self, path: Path, samples: Sequence[Sample], card: tuple[Value, Value] | None) -> Path:
        one, two = self.axes
        cells = {(sample.values[one], sample.values[two]): sample for sample in samples}
        return heat_map(
            {place: sample.score.value for place, sample in cells.items()},
            path,
            title=self.title,
            score_name=self.objective,
            axes=(one, two),
            low={place: sample.score.low for place, sample in cells.items()},
            high={place: sample.score.high for place, sample in cells.items()},
            card=card,
            winner=next((place for place, sample in cells.items() if sample.winner), None),
            winner_set=[place for place, sample in cells.items() if sample.member],
            early={(s.values[one], s.values[two]): s.score.n for s in self.early.values()},
            surface=self.surface,
            higher_is_better=samples[0].score.higher_is_better,
        )


CAPTIONS = {
    "heat map": "Mean of {} by point, with the 95 % interval that it has alone.",
    "contour": "Mean of {}, interpolated between the points; beyond them nothing is known.",
    "curve": "Mean of {} along the axis. Neighbouring intervals overlap more than paired differences do.",
    "parallel coordinates": "One line a point, to its {}.",
    "effects": "How {} moves from an axis' lowest value to its highest, along a straight line; 95 % limits.",
    "block profile": "Above, coefficients by block; below, how {} moves from a block's lowest value to its highest.",
    "contact sheet": "The same prompts and seeds in every row.",
}


def html_review(
    review: Review,
    pictures: Mapping[str, Path],
    *,
    facts: Mapping[str, str],
    links: Mapping[str, str] | None = None,
    recipe: str = "",
    command: str = "",
    failures: Mapping[str, str] | None = None,
    out: Mapping[str, str] | None = None,
    more: Sequence[str] = (),
) -> str:
    """The page's text; it needs no other file, and no network.

    Args:
        pictures: what each shows (`CAPTIONS` knows the usual ones) to its file.
        links: text to address, shown under the title.
        recipe: of the winner, as text. command: what made the sweep.
        failures: point to its error. out: point to how it left a race.
        more: HTML of further sections, before the recipe.
    """
    anchors = " · ".join(
        f'<a href="{escape(url, quote=True)}">{escape(text)}</a>' for text, url in (links or {}).items()
    )
    parts = [f"<h1>{escape(review.title)}</h1>", f"<p>{anchors}</p>" if anchors else "", definitions(facts)]
    parts.append(_failures(failures or {}))
    parts.append(_leaderboard(review))
    for name, file in pictures.items():
        caption = CAPTIONS.get(name, "").format(review.objective)
        if name in ("heat map", "contour") and review.surface:
            caption += f" {review.surface_text}"
        if name == "heat map" and review.early:
            caption += " Points that left the race show how far they lay behind the best on the prompts they had."
        parts.append(f"<h2>{escape(name.capitalize())}</h2>{picture(file, caption)}")
    parts += more
    if out:
        rows = [f"<tr><td>{escape(_short(label))}</td><td>{escape(how)}</td></tr>" for label, how in out.items()]
        parts.append(table("Left the race", "Points that fell behind.", "<tr><th>point</th><th></th></tr>", rows))
    if recipe:
        parts.append(f"<h2>The winner's recipe</h2><pre>{escape(recipe)}</pre>")
    if command:
        parts.append(f"<h2>What made it</h2><pre>{escape(command)}</pre>")
    return page(review.title, parts, SORTS)


def _beside(best: Measurement, behind: Floats) -> Measurement:
    """The score of a point that was drawn on fewer prompts, beside the best one's: how far it lay behind it there."""
    apart = behind[~np.isnan(behind)]
    value = best.value - float(apart.mean()) if apart.size else math.nan
    return Measurement(value, math.nan, math.nan, apart.size, best.higher_is_better)


def _failures(failures: Mapping[str, str]) -> str:
    if not failures:
        return ""
    rows = [
        f"<tr><td>{escape(_short(label))}</td><td class=miss style='white-space:normal'>{escape(error)}</td></tr>"
        for label, error in failures.items()
    ]
    note = "They are in no number below. The same command again tries them anew."
    return table(f"{len(failures)} failed", note, "<tr><th>point</th><th>error</th></tr>", rows)


def _leaderboard(review: Review) -> str:
    axes = review.axes if len(review.axes) <= SHOWN_AXES else ()
    first = review.scores[review.found.best][review.objective]
    own = _ends(scores[review.objective] for scores in review.scores.values())
    behind = _ends(review.found.behind.values())
    head = "<tr><th class=n>#</th><th>point</th>"
    head += "".join(f"<th class=n>{_breakable(name)}</th>" for name in axes)
    head += f"<th class=n data-way={'down' if first.higher_is_better else 'up'}>"
    head += f"{_breakable(review.objective)} {arrow(first.higher_is_better)}</th><th class=n>behind the best</th>"
    for name in review.columns[1:]:
        better = next((scores[name].higher_is_better for scores in review.scores.values() if name in scores), True)
        head += f"<th class=n>{_breakable(name)} {arrow(better)}</th>"
    rows = []
    for rank, label in enumerate(review.best_first, 1):
        scores, place = review.scores[label], review.points[label]
        best, member = label == review.found.best, label in review.found.members
        mark = "★ " if best else "= " if member else ""
        cells = [f'<td class=n>{rank}</td><td title="{escape(label, quote=True)}">{mark}{escape(_short(label))}</td>']
        cells += [f'<td class=n data-v="{_sortable(place[name])}">{_written(place[name])}</td>' for name in axes]
        score, gap = scores[review.objective], review.found.behind[label]
        verdict = "undecided" if member else "worse"
        cells.append(_measured(score, bar(score.value, score.low, score.high, ends=own)))
        drawn = _measured(gap, bar(gap.value, gap.low, gap.high, verdict, ends=behind))
        cells.append(drawn if not best else '<td class=n data-v="0">–</td>')
        cells += [_measured(scores[name]) if name in scores else "<td></td>" for name in review.columns[1:]]
        rows.append(f"<tr{' class=winner' if best else ' class=member' if member else ''}>{''.join(cells)}</tr>")
    note = (
        f"★ best by {escape(review.objective)}; = not significantly different from it. "
        f"{escape(review.winner_set)}. Scores with the 95 % interval that each has alone. Behind the best: paired on "
        "the same prompts and seeds, intervals that hold for all points at once. A click on a heading sorts."
    )
    return table("Leaderboard", note, head + "</tr>", rows).replace("<table>", "<table class=sorts>", 1)


def _measured(found: Measurement, drawn: str = "") -> str:
    """A cell: value, interval, and the interval drawn below."""
    limits = f"<span class='soft small'>{interval(found.low, found.high)}</span>"
    shown = f"{limits}{drawn}" if drawn else f"<br>{limits}"
    return f'<td class=n data-v="{found.value!r}">{number(found.value)} {shown}</td>'


def _ends(measured: Iterable[Measurement]) -> tuple[float, float]:
    """Return the ends of the scale that all rows share."""
    known = [m for m in measured if not math.isnan(m.low)]
    return min((m.low for m in known), default=0.0), max((m.high for m in known), default=1.0)


def _sortable(value: Value) -> str:
    return escape(value, quote=True) if isinstance(value, str) else repr(float(value))


def _written(value: Value) -> str:
    return escape(value) if isinstance(value, str) else f"{value:g}".replace("-", "−")


def _breakable(name: str) -> str:
    return escape(name).replace("_", "_<wbr>")


def _short(label: str) -> str:
    return label if len(label) <= LONGEST_NAME else label[: LONGEST_NAME - 1] + "…"
