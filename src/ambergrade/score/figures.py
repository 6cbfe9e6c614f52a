"""Pictures and tables of scores: a sweep's heat map, a forest plot of differences, a leaderboard for the terminal.

The same values give the same PNG bytes. Colours hold for colour-blind eyes (viridis; Okabe & Ito 2008).
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from ambergrade.errors import BadSetting
from ambergrade.nouns import Measurement
from ambergrade.score.statistics import FEWEST, PairedDifference
from ambergrade.score.surface import Surface
from ambergrade.store import written_aside

INK, GREY = "#222222", "#8a8a8a"
BETTER, WORSE = "#0072B2", "#D55E00"
TABLE_WIDTH, LONGEST_LABEL = 100, 48
NO_INTERVAL = f"[–] no interval: fewer than {FEWEST} prompts, too few pictures, or a value that is biased"
Value = float | str
Point = tuple[Value, Value]


def heat_map(
    points: Mapping[Point, float],
    path: Path,
    *,
    title: str = "",
    score_name: str = "score",
    axes: tuple[str, str] = ("a", "b"),
    low: Mapping[Point, float] | None = None,
    high: Mapping[Point, float] | None = None,
    card: Point | None = (0.8, 0.5),
    winner: Point | None = None,
    winner_set: Collection[Point] = (),
    early: Mapping[Point, int] | None = None,
    surface: Surface | None = None,
    higher_is_better: bool = True,
) -> Path:
    """Draw a sweep over two coefficients as a PNG: one cell a point, its score as colour and number.

    Args:
        points: (a, b) to the score's mean; a point of the grid that is not there stays blank. Numbers stand in
            their order, words in the order they come.
        low, high: limits of each mean, printed small below it while there is room: up to 10 columns.
        card: the model card's point, marked with a diamond where the grid holds it.
        winner: marked with a star. winner_set: outlined, as one region.
        early: points that left a race, to the prompts that they were drawn on, printed in place of limits.
        surface: over the two coefficients, drawn as lines of equal height with the limits of its best point.
    """
    if not points:
        raise BadSetting("A heat map needs at least one point.")
    columns, rows = ordered(a for a, _ in points), ordered(b for _, b in points)
    grid = np.full((len(rows), len(columns)), np.nan)
    for (a, b), value in points.items():
        grid[rows.index(b), columns.index(a)] = value

    roomy = len(columns) <= 10
    cell = (1.02, 0.84) if roomy else (0.62, 0.42)
    width = max(2.2 + cell[0] * len(columns), 6.4)  # inches; the legend needs as much
    figure = blank(width, 1.9 + cell[1] * len(rows))
    ax = figure.add_subplot()
    shown = np.ma.masked_invalid(grid)
    colours = "viridis" if higher_is_better else "viridis_r"
    norm, digits = scale(grid), digits_of(float(np.nanmax(np.abs(grid))))
    image = ax.imshow(shown, origin="lower", cmap=colours, norm=norm, aspect="auto")
    for i, b in enumerate(rows):
        for k, a in enumerate(columns):
            if (a, b) in points:
                ink = _readable_on(image.cmap(norm(grid[i, k])))
                known = roomy and low and high and (a, b) in low and (a, b) in high
                under = f"{low[a, b]:.{digits}f}–{high[a, b]:.{digits}f}" if known and low and high else ""
                under = f"{early[a, b]} prompts" if roomy and early and (a, b) in early else under
                _write_cell(ax, k, i, f"{points[a, b]:.{digits}f}", under, ink, 11 if roomy else 8)
                _mark_cell(ax, k, i, ink, card=(a, b) == card, winner=(a, b) == winner)
    if surface is not None:
        _draw_surface(ax, surface, columns, rows)
    _outline(ax, {(columns.index(a), rows.index(b)) for a, b in winner_set if a in columns and b in rows})

    ax.set_xticks(range(len(columns)), ticks(columns))
    ax.set_yticks(range(len(rows)), ticks(rows))
    ax.set_xlabel(axes[0])
    ax.set_ylabel(axes[1], rotation=0, labelpad=12)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    colour_bar(figure, ax, image, score_name, higher_is_better)
    if title:
        ax.set_title(textwrap.fill(title, int(9 * width)), loc="left", pad=12, fontweight="bold")
    marks = card is not None and card in points, winner is not None, bool(winner_set), surface is not None
    _heat_map_legend(figure, *marks)
    return save(figure, path)


def interval_plot(
    differences: Mapping[str, Mapping[str, PairedDifference]],
    path: Path,
    *,
    title: str = "",
    baseline: str = "beta7",
) -> Path:
    """Draw differences from a baseline as a forest plot PNG.

    `differences` maps a score's name (one panel each, with its own scale) to {row label: difference}. Rows
    are shared by all panels. Blue is better, orange is worse, grey is undecided: its interval holds zero.
    """
    labels = list(dict.fromkeys(label for panel in differences.values() for label in panel))
    if not labels:
        raise BadSetting("An interval plot needs at least one difference.")
    figure = blank(max(6.0, 1.6 + 2.5 * len(differences)), 1.7 + 0.42 * len(labels))
    panels = figure.subplots(1, len(differences), sharey=True, squeeze=False)[0]
    for ax, (score_name, rows) in zip(panels, differences.items(), strict=True):
        ax.axvline(0, color=INK, linewidth=0.8, zorder=1)
        for label, found in rows.items():
            y = labels.index(label)
            colour = {"better": BETTER, "worse": WORSE, "undecided": GREY}[found.verdict]
            ax.plot([found.low, found.high], [y, y], color=colour, linewidth=2.2, solid_capstyle="round", zorder=2)
            ax.plot([found.value], [y], "o", color=colour, markersize=6, zorder=3)
            text = f"{found.value:+.3g}".replace("-", "−")
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            ax.annotate(
                text, (found.value, y), (0, 7), textcoords="offset points", ha="center", fontsize=8, bbox=box, zorder=2
            )
        better = any(found.higher_is_better for found in rows.values())
        ax.set_title(score_name, loc="left", fontsize=10)
        ax.set_xlabel("better →" if better else "← better", fontsize=8, color=GREY)
        ax.set_yticks(range(len(labels)), labels)
        ax.set_ylim(len(labels) - 0.5, -0.6)
        ax.margins(x=0.12)
        ax.locator_params(axis="x", nbins=4)
        ax.tick_params(length=0, labelsize=9)
        ax.grid(axis="x", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.spines[:].set_visible(False)
    figure.suptitle(
        title or f"Difference from {baseline}, with paired 95 % intervals", x=0.01, ha="left", fontweight="bold"
    )
    return save(figure, path)


def leaderboard_text(
    points: Mapping[str, Mapping[str, Measurement]],
    columns: Sequence[str],
    *,
    winner: str | None = None,
    winner_set: Collection[str] = (),
    chosen: str = "",
) -> str:
    """A plain-text table of points with 95 % intervals, best first by the first column, at most 100 columns wide.

    `*` marks the winner, `=` the others that are not significantly different from it; `chosen` says whose
    winner, if not this table's.
    Columns that do not fit stand in a second block below.

    >>> old, new = Measurement(0.5, 0.4, 0.6, 40), Measurement(0.8, 0.7, 0.9, 40)
    >>> print(leaderboard_text({"beta7": {"recall": old}, "gamma": {"recall": new}}, ["recall"], winner="gamma"))
             recall
    * gamma  0.800 [0.700–0.900]
      beta7  0.500 [0.400–0.600]
    <BLANKLINE>
    * best by recall, 95 % intervals
    """
    first = columns[0]
    best_first = sorted(points, key=lambda name: _rank(points[name].get(first)))
    labels = [f"{'*' if name == winner else '=' if name in winner_set else ' '} {_cut(name)}" for name in best_first]
    width = max(len(label) for label in labels)
    cells = {column: _cells(column, [points[name].get(column) for name in best_first]) for column in columns}
    blocks: list[list[str]] = []
    for column in columns:
        room = TABLE_WIDTH - width - sum(len(cells[name][0]) + 2 for name in (blocks[-1] if blocks else []))
        if not blocks or len(cells[column][0]) > room:
            blocks.append([])
        blocks[-1].append(column)
    texts = []
    for block in blocks:
        lines = ["  ".join(["".ljust(width), *(cells[column][0] for column in block)])]
        for row, label in enumerate(labels):
            lines.append("  ".join([label.ljust(width), *(cells[column][1 + row] for column in block)]))
        texts.append("\n".join(line.rstrip() for line in lines))
    better = next((found[first].higher_is_better for found in points.values() if first in found), True)
    lower = "" if better else " (lower is better)"
    note = f"* {chosen}; sorted by {first}{lower}" if chosen else f"* best by {first}{lower}"
    note += ", 95 % intervals"
    if set(winner_set) - {winner}:
        note += "; = not significantly different from it"
    if any("[–]" in cell for column in columns for cell in cells[column]):
        note += f"\n{NO_INTERVAL}"
    return "\n\n".join([*texts, note])


def _cut(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else label[: LONGEST_LABEL - 1] + "…"


def _cells(column: str, found: Sequence[Measurement | None]) -> list[str]:
    """The header and one cell a row, of equal width."""
    scored = [m for m in found if m is not None and not math.isnan(m.value)]
    largest = max((abs(m.value) for m in scored), default=1.0)
    digits = digits_of(largest)
    texts = [
        "-"
        if m is None or math.isnan(m.value)
        else f"{m.value:.{digits}f} [–]"
        if math.isnan(m.low)
        else f"{m.value:.{digits}f} [{m.low:.{digits}f}–{m.high:.{digits}f}]"
        for m in found
    ]
    width = max(len(text) for text in [column, *texts])
    return [text.ljust(width) for text in [column, *texts]]


def _rank(found: Measurement | None) -> float:
    if found is None or math.isnan(found.value):
        return math.inf
    return -found.value if found.higher_is_better else found.value


def blank(width: float, height: float) -> Figure:
    """A figure of so many inches. No pyplot: it keeps figures alive in a global list."""
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write the PNG without its software tag, so that equal pictures are equal bytes."""
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", metadata={"Software": None})
    return path


def scale(values: npt.NDArray[np.float64]) -> Normalize:
    """Return the norm of colours, from the lowest to the highest value; also where they are one."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    return Normalize(low, high if high > low else low + 1e-9)


def colour_bar(figure: Figure, ax: Axes, image: ScalarMappable, score_name: str, higher_is_better: bool) -> None:
    """What the colours stand for, beside the axes."""
    bar = figure.colorbar(image, ax=ax, pad=0.02, fraction=0.05)
    bar.set_label(score_name + ("" if higher_is_better else " (lower is better)"))
    bar.outline.set_visible(False)


def ordered(values: Iterable[Value]) -> list[Value]:
    """Each once: numbers in their order, anything else in the order it comes."""
    known = dict.fromkeys(values)
    numbers = [value for value in known if not isinstance(value, str)]
    return [*sorted(numbers)] if len(numbers) == len(known) else [*known]


def _write_cell(ax: Axes, x: int, y: int, text: str, under: str, ink: str, size: int) -> None:
    ax.text(x, y + (0.04 if under else 0), text, ha="center", va="center", color=ink, fontsize=size, zorder=7)
    if under:
        ax.text(x, y - 0.25, under, ha="center", va="center", color=ink, fontsize=7, zorder=7)


def _draw_surface(ax: Axes, surface: Surface, columns: Sequence[Value], rows: Sequence[Value]) -> None:
    """Draw lines of equal height between the cells' centres, and a cross over the limits of the best point."""
    across, up = (np.array([float(value) for value in values]) for values in (columns, rows))
    x, y = np.meshgrid(np.linspace(0, len(across) - 1, 97), np.linspace(0, len(up) - 1, 97))
    heights = surface.heights(np.interp(x, range(len(across)), across), np.interp(y, range(len(up)), up))
    ax.contour(x, y, heights, 9, colors="white", linewidths=0.8, linestyles="solid", alpha=0.6, zorder=2)
    best = np.interp(surface.best[0], across, range(len(across))), np.interp(surface.best[1], up, range(len(up)))
    limits = [
        np.interp(ends, values, range(len(values)))
        for ends, values in zip(surface.intervals, (across, up), strict=True)
    ]
    for line, width in (("white", 4.0), (WORSE, 2.0)):
        ax.plot(limits[0], [best[1]] * 2, color=line, linewidth=width, zorder=5)
        ax.plot([best[0]] * 2, limits[1], color=line, linewidth=width, zorder=5)
    ax.plot(*best, "o", color=WORSE, markeredgecolor="white", markersize=7, zorder=6)


def _readable_on(colour: tuple[float, float, float, float]) -> str:
    """White or ink, whichever contrasts more (WCAG 2 relative luminance; the two are equal at 0.2)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return "white" if 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] < 0.2 else INK


def ticks(values: Sequence[Value]) -> list[str]:
    """Words as they are, numbers with as many decimals as the longest needs; very small or large ones as 1e-05."""
    numbers = [value for value in values if not isinstance(value, str)]
    plain = [f"{value:g}" for value in numbers]
    if len(numbers) < len(values) or any("e" in text for text in plain):
        return [value if isinstance(value, str) else f"{value:g}" for value in values]
    decimals = max(len(text.partition(".")[2]) for text in plain)
    return [f"{value:.{decimals}f}" for value in numbers]


def digits_of(largest: float) -> int:
    """Decimals that suit numbers up to `largest`."""
    return 3 if largest < 2 else 2 if largest < 20 else 1


def _mark_cell(ax: Axes, x: int, y: int, ink: str, *, card: bool, winner: bool) -> None:
    if winner:
        ax.plot([x - 0.36], [y + 0.31], "*", color=ink, markersize=11, markeredgewidth=0)
    if card:
        ax.plot([x + 0.37], [y + 0.31], "D", color="none", markeredgecolor=ink, markersize=6, markeredgewidth=1.5)


def _outline(ax: Axes, cells: Collection[tuple[int, int]]) -> None:
    """Draw the borders between cells that are in the set and those that are not."""
    inside = set(cells)
    for x, y in sorted(inside):
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            if (x + dx, y + dy) not in inside:
                xs = [x + 0.5 * dx - 0.5 * abs(dy), x + 0.5 * dx + 0.5 * abs(dy)]
                ys = [y + 0.5 * dy - 0.5 * abs(dx), y + 0.5 * dy + 0.5 * abs(dx)]
                ax.plot(xs, ys, color=WORSE, linewidth=3, solid_capstyle="projecting", clip_on=False, zorder=4)


def _heat_map_legend(figure: Figure, card: bool, winner: bool, winner_set: bool, surface: bool) -> None:
    handles: list[Line2D | Rectangle] = []
    if winner:
        handles.append(Line2D([], [], color=INK, marker="*", linestyle="", markersize=11, label="winner"))
    if winner_set:
        handles.append(
            Rectangle(
                (0, 0),
                1,
                1,
                fill=False,
                edgecolor=WORSE,
                linewidth=2,
                label="not significantly different from the winner",
            )
        )
    if card:
        handles.append(
            Line2D([], [], color="none", markeredgecolor=INK, marker="D", markersize=6, label="the card's point")
        )
    if surface:
        label = "the fitted surface's best point, 95 % limits"
        handles.append(Line2D([], [], color=WORSE, marker="o", markeredgecolor="white", linewidth=2, label=label))
    if handles:
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=2 if len(handles) > 3 else len(handles),
            frameon=False,
            fontsize=9,
        )
