"""Pictures of what a sweep found: a curve over one axis, a contour over two, effects by block, parallel coordinates.

They show means with the intervals that each mean has alone; which points differ significantly is the winner set's word,
and its members are marked in every picture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.tri import TriAnalyzer, Triangulation

from ambergrade.errors import BadSetting
from ambergrade.nouns import Measurement
from ambergrade.score.figures import (
    BETTER,
    GREY,
    INK,
    WORSE,
    Value,
    blank,
    colour_bar,
    ordered,
    save,
    scale,
    ticks,
)
from ambergrade.score.statistics import percentile_interval, resampling_weights

Floats = npt.NDArray[np.float64]

PAINT, AMBER, FAINT = "#cfe3f1", "#de8e1e", "#c9c4bd"
BLOCK = re.compile(r"(?:^|[_.])(BASE|IN\d\d|M00|MID\d*|OUT\d\d|VAE)$", re.IGNORECASE)
"""A coefficient that belongs to a block is named after it: `IN04`, `a_OUT00`."""


@dataclass(frozen=True)
class Sample:
    """One scored point of a sweep."""

    values: Mapping[str, Value]
    """Axis to coefficient, or to a word."""
    score: Measurement
    winner: bool = False
    member: bool = False
    """Whether it is in the winner set."""


def curve(samples: Sequence[Sample], path: Path, *, axis: str, score_name: str = "score", title: str = "") -> Path:
    """Draw the score along one axis as a PNG: means, their 95 % intervals as a band, the winner set ringed.

    Words on the axis stand side by side, with bars instead of a band.
    """
    _refuse_none(samples)
    places = ordered(sample.values[axis] for sample in samples)
    numbers = all(not isinstance(place, str) for place in places)
    where = {place: float(place) if not isinstance(place, str) else number for number, place in enumerate(places)}
    if not numbers:
        where = {place: float(number) for number, place in enumerate(places)}
    rows = sorted(samples, key=lambda sample: where[sample.values[axis]])
    x = np.array([where[sample.values[axis]] for sample in rows])
    mean, low, high = (np.array([getattr(s.score, name) for s in rows]) for name in ("value", "low", "high"))
    figure = blank(max(6.4, 2.0 + 0.45 * len(places)), 4.2)
    ax = figure.add_subplot()
    if numbers:
        ax.fill_between(x, low, high, color=PAINT, linewidth=0, zorder=1)
        ax.plot(x, mean, color=BETTER, linewidth=1.6, zorder=2)
        _spread_out(ax, "x", x)
    else:
        ax.vlines(x, low, high, color=PAINT, linewidth=9, zorder=1)
        ax.set_xticks(x, ticks(places), rotation=0 if len(places) <= 8 else 45)
        ax.set_xlim(-0.6, len(places) - 0.4)
    ax.plot(x, mean, "o", color=BETTER, markersize=6, zorder=3)
    _ring(ax, x, mean, rows)
    ax.set_xlabel(axis)
    _score_axis(ax, score_name, rows)
    if title:
        ax.set_title(title, loc="left", pad=12, fontweight="bold")
    _legend(figure, rows, [Patch(color=PAINT, label="95 % interval of the mean")])
    return save(figure, path)


def contour(
    samples: Sequence[Sample], path: Path, *, axes: tuple[str, str], score_name: str = "score", title: str = ""
) -> Path:
    """Draw the score over two numeric axes as a PNG: colours between points that lie anywhere, and the points.

    Between points the mean is interpolated linearly over Delaunay triangles; beyond their hull nothing is claimed.
    """
    _refuse_none(samples)
    x, y = (np.array([float(sample.values[name]) for sample in samples]) for name in axes)
    mean = np.array([sample.score.value for sample in samples])
    higher = samples[0].score.higher_is_better
    figure = blank(7.4, 5.6)
    ax = figure.add_subplot()
    _spread_out(ax, "x", x)
    _spread_out(ax, "y", y)
    colours, norm = "viridis" if higher else "viridis_r", scale(mean)
    triangles = _triangles(_unit(x, ax.get_xscale() == "log"), _unit(y, ax.get_yscale() == "log"))
    if triangles is not None:
        between = Triangulation(x, y, triangles.triangles, triangles.mask)
        levels = np.linspace(float(mean.min()), max(float(mean.max()), float(mean.min()) + 1e-9), 13)
        ax.tricontourf(between, mean, levels, cmap=colours, norm=norm, extend="both", zorder=1)
        ax.tricontour(between, mean, levels, colors="white", linewidths=0.5, zorder=2)
    edge = np.array(["white" if not sample.member else WORSE for sample in samples])
    width = np.array([0.8 if not sample.member else 2.2 for sample in samples])
    drawn = np.argsort([sample.member for sample in samples], kind="stable")  # members on top
    ax.scatter(
        *(x[drawn], y[drawn]),
        c=mean[drawn],
        s=52,
        cmap=colours,
        norm=norm,
        edgecolors=edge[drawn],
        linewidths=list(width[drawn]),
        zorder=3,
    )
    for place in (k for k, sample in enumerate(samples) if sample.winner):
        ax.plot(x[place], y[place], "*", color=INK, markeredgecolor="white", markersize=15, zorder=4)
    ax.set_xlabel(axes[0])
    ax.set_ylabel(axes[1], rotation=0, labelpad=14)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.use_sticky_edges = False  # else the points at the hull are cut in half
    ax.margins(0.04)
    colour_bar(figure, ax, ScalarMappable(norm, colours), score_name, higher)
    if title:
        ax.set_title(title, loc="left", pad=12, fontweight="bold")
    _legend(figure, samples, [Line2D([], [], **_dot(GREY), label="a point")])
    return save(figure, path)


def parallel_coordinates(
    samples: Sequence[Sample], path: Path, *, axes: Sequence[str], score_name: str = "score", title: str = ""
) -> Path:
    """Draw many axes as a PNG: one line a point from axis to axis to its score, coloured by it.

    Points outside the winner set are faint; the winner is drawn in black.
    """
    _refuse_none(samples)
    worst_first = sorted(samples, key=lambda s: (s.winner, s.member, _worth(s.score)))
    higher = samples[0].score.higher_is_better
    mean = np.array([sample.score.value for sample in worst_first])
    scales = [_Scale.of([sample.values[name] for sample in samples]) for name in axes]
    scales.append(_Scale.of(list(mean), log=False))
    heights = np.array(
        [
            [scale_.height(value) for scale_, value in zip(scales, [*map(sample.values.get, axes), score], strict=True)]
            for sample, score in zip(worst_first, mean, strict=True)
        ]
    )
    if not higher:
        heights[:, -1] = 1 - heights[:, -1]  # better is up
    crowded = len(axes) > 10
    figure = blank(min(18.0, 2.4 + 1.25 * len(axes)), 5.4)
    ax = figure.add_subplot()
    colours, norm = "viridis" if higher else "viridis_r", scale(mean)
    paint = ScalarMappable(norm, colours)
    faint = max(0.08, min(0.5, 18 / len(samples)))
    for row, sample, colour in zip(heights, worst_first, paint.to_rgba(mean), strict=True):
        strong = sample.member or sample.winner
        ax.plot(
            row,
            color=INK if sample.winner else colour,
            linewidth=2.6 if sample.winner else 1.8 if strong else 1.0,
            alpha=1.0 if strong else faint,
            zorder=4 if sample.winner else 3 if strong else 2,
            solid_joinstyle="round",
        )
    for place, one in enumerate(scales):
        last = place == len(axes)
        ax.axvline(place, color=INK if last else GREY, linewidth=1.2 if last else 0.8, zorder=1)
        for height, text in one.marks(2 if crowded else 5):
            height = 1 - height if last and not higher else height
            label: dict[str, Any] = {
                "textcoords": "offset points",
                "va": "center",
                "fontsize": 7,
                "color": INK,
                "zorder": 5,
            }
            box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.4}
            ax.annotate(
                text, (place, height), (5 if last else -4, 0), ha="left" if last else "right", bbox=box, **label
            )
    ax.set_xticks(
        range(len(axes) + 1), [*axes, score_name], rotation=40 if crowded else 0, ha="right" if crowded else "center"
    )
    ax.set_xlim(-0.55, len(axes) + 0.45)
    ax.set_yticks([])
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    colour_bar(figure, ax, paint, score_name, higher)
    if title:
        ax.set_title(title, loc="left", pad=12, fontweight="bold")
    handles = [Line2D([], [], color=INK, linewidth=2.6, label="winner")]
    good, middle = paint.to_rgba(mean)[-1], paint.to_rgba(np.median(mean, keepdims=True))[0]
    if any(sample.member and not sample.winner for sample in samples):
        handles.append(Line2D([], [], color=good, linewidth=1.8, label="not significantly different from the winner"))
    if not all(sample.member or sample.winner for sample in samples):
        handles.append(Line2D([], [], color=middle, linewidth=1.0, alpha=0.5, label="the rest"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return save(figure, path)


def effects(samples: Sequence[Sample], axes: Sequence[str], *, seed: int = 0) -> dict[str, Measurement]:
    """How the score moves from each axis' lowest value to its highest, along a straight line over all points.

    One axis at a time (least squares; over logarithms where values are spaced like powers), so other axes count as
    noise: true of grids and of samples spread evenly, a hint where a search went after its favourites. Limits: 95 %,
    points resampled. NaN where an axis has one value.
    """
    scored = [sample for sample in samples if not math.isnan(sample.score.value)]
    if not scored:
        raise BadSetting("Effects need scored points.")
    y = np.array([sample.score.value for sample in scored])
    weights = resampling_weights(len(y), seed=seed) / len(y)
    found = {}
    for name in axes:
        x = np.array([float(sample.values[name]) for sample in scored])
        x = np.log(x) if is_log(x) else x
        span = float(np.ptp(x))
        whole = np.full((1, len(y)), 1 / len(y))
        value = float(_slopes(whole, x, y)[0]) * span if span else math.nan
        low, high = percentile_interval(_slopes(weights, x, y) * span, len(y)) if span else (math.nan, math.nan)
        found[name] = Measurement(value, low, high, len(y), scored[0].score.higher_is_better)
    return found


def profile(
    samples: Sequence[Sample], path: Path, *, axes: Sequence[str], score_name: str = "score", title: str = ""
) -> Path:
    """Draw what each of many numeric axes does to the score as a PNG.

    Axes named after blocks stand in the order in which a picture runs through them (BASE, IN00 …, M00, OUT00 …, VAE),
    and above them the coefficients that the winner and its set have.
    """
    _refuse_none(samples)
    blocks = are_blocks(axes)
    names = sorted(axes, key=_block_order) if blocks else list(axes)
    figure = blank(max(6.4, 2.0 + 0.5 * len(names)), 6.2 if blocks else 3.8)
    panels = figure.subplots(2 if blocks else 1, 1, sharex=True, squeeze=False)[:, 0]
    if blocks:
        _coefficients(panels[0], samples, names)
    bottom, shown = panels[-1], effects(samples, names)
    bottom.axhline(0, color=INK, linewidth=0.8, zorder=1)
    for place, effect in enumerate(shown.values()):
        if math.isnan(effect.value):
            continue
        sure = effect.low > 0 or effect.high < 0
        colour = GREY if not sure else BETTER if (effect.value > 0) == effect.higher_is_better else WORSE
        bottom.bar(place, effect.value, 0.62, color=colour, alpha=0.55, zorder=2)
        bottom.vlines(place, effect.low, effect.high, color=colour, linewidth=2, zorder=3)
    bottom.set_ylabel(f"change of {score_name}\nlowest → highest")
    crowded = len(names) > 8
    turn = {"rotation": 50, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
    bottom.set_xticks(range(len(names)), names, **turn)
    for ax in panels:
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        ax.grid(axis="y", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.locator_params(axis="y", nbins=6)
        ax.margins(x=0.02)
    if title:
        panels[0].set_title(title, loc="left", pad=12, fontweight="bold")
    handles: list[Line2D | Patch] = []
    if blocks:
        handles += [
            Line2D([], [], **_star(), label="winner"),
            Patch(color=AMBER, alpha=0.6, label="range of the winner set"),
            Line2D([], [], color=FAINT, marker="_", linestyle="", markersize=9, label="a point"),
        ]
    for colour, label in ((BETTER, "more is better"), (WORSE, "less is better"), (GREY, "undecided")):
        handles.append(Patch(color=colour, alpha=0.55, label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return save(figure, path)


def are_blocks(axes: Sequence[str]) -> bool:
    """Whether every axis is named after a block."""
    return bool(axes) and all(BLOCK.search(name) for name in axes)


def is_grid(pairs: Sequence[tuple[Value, Value]]) -> bool:
    """Whether points over two axes fill at least half of the lattice of their values, so that cells show them."""
    columns, rows = {a for a, _ in pairs}, {b for _, b in pairs}
    return 2 * len(set(pairs)) >= len(columns) * len(rows)


def is_log(values: Floats) -> bool:
    """Whether values are spaced like powers: all positive, far apart, and their middle near the low end."""
    low, high = float(values.min()), float(values.max())
    return low > 0 and high >= 9 * low and (float(np.median(values)) - low) / (high - low) < 0.25


@dataclass(frozen=True)
class _Scale:
    """One axis of parallel coordinates: values to heights from 0 to 1."""

    words: tuple[Value, ...]
    low: float
    high: float
    log: bool

    @classmethod
    def of(cls, values: Sequence[Value], log: bool | None = None) -> _Scale:
        places = ordered(values)
        if any(isinstance(place, str) for place in places):
            return cls(tuple(places), 0.0, float(max(len(places) - 1, 1)), False)
        numbers = np.array([float(place) for place in places])
        return cls((), float(numbers.min()), float(numbers.max()), is_log(numbers) if log is None else log)

    def height(self, value: Value | None) -> float:
        assert value is not None
        number = float(self.words.index(value)) if self.words else float(value)
        if self.high == self.low:
            return 0.5
        if self.log:
            return math.log(number / self.low) / math.log(self.high / self.low)
        return (number - self.low) / (self.high - self.low)

    def marks(self, count: int) -> list[tuple[float, str]]:
        """Heights and texts: every word, or so many numbers from lowest to highest."""
        if self.words:
            return [(self.height(word), str(word)) for word in self.words]
        if self.high == self.low:
            return [(0.5, f"{self.low:g}")]
        if self.log:
            numbers = np.geomspace(self.low, self.high, count)
            return [(self.height(float(number)), f"{number:.2g}") for number in numbers]
        numbers = np.linspace(self.low, self.high, count)
        decimals = max(0, 2 - math.floor(math.log10(self.high - self.low)))
        return [(self.height(float(number)), f"{number:.{decimals}f}".replace("-", "−")) for number in numbers]


def _coefficients(ax: Axes, samples: Sequence[Sample], names: Sequence[str]) -> None:
    x = np.arange(len(names))
    table = np.array([[float(sample.values[name]) for name in names] for sample in samples])
    inside = np.array([sample.member or sample.winner for sample in samples])
    for row in table:
        ax.plot(x, row, "_", color=FAINT, markersize=9, zorder=1)
    if inside.any():
        ax.vlines(x, table[inside].min(0), table[inside].max(0), color=AMBER, linewidth=7, alpha=0.6, zorder=2)
    for row in (row for row, sample in zip(table, samples, strict=True) if sample.winner):
        ax.plot(x, row, "*", color=INK, markersize=11, zorder=3)
    ax.set_ylabel("coefficient")


def _slopes(weights: Floats, x: Floats, y: Floats) -> Floats:
    """Slope of y over x under each row of weights (B, n), rows summing to 1; NaN where x does not vary."""
    x = x - x.mean()
    middle_x, middle_y = weights @ x, weights @ y
    spread = weights @ (x * x) - middle_x**2
    together = weights @ (x * y) - middle_x * middle_y
    slopes: Floats = np.divide(together, spread, out=np.full(len(spread), np.nan), where=spread > 1e-12 * np.var(x))
    return slopes


def _block_order(name: str) -> tuple[str, int, str]:
    """First what stands before the block, then the block's place."""
    found = BLOCK.search(name)
    if not found:
        return "", 0, ""
    block = found[1].upper()
    part = next(k for k, start in enumerate(("BASE", "IN", "M", "OUT", "VAE")) if block.startswith(start))
    return name[: found.start()], part, block


def _triangles(x: Floats, y: Floats) -> Triangulation | None:
    """Delaunay triangles of points in the unit square, without slivers at the hull; None where all lie on a line."""
    if len(x) < 3 or np.linalg.matrix_rank(np.stack([x - x[0], y - y[0]]), tol=1e-6) < 2:
        return None
    found = Triangulation(x, y)
    found.set_mask(TriAnalyzer(found).get_flat_tri_mask(0.02))
    return None if found.mask is not None and found.mask.all() else found


def _unit(values: Floats, log: bool) -> Floats:
    values = np.log(values) if log else values
    unit: Floats = (values - values.min()) / (np.ptp(values) or 1.0)
    return unit


def _spread_out(ax: Axes, which: str, values: Floats) -> None:
    if is_log(values):
        (ax.set_xscale if which == "x" else ax.set_yscale)("log")
        ax.tick_params(which="minor", length=0)


def _ring(ax: Axes, x: Floats, y: Floats, samples: Sequence[Sample]) -> None:
    for place, sample in enumerate(samples):
        if sample.member and not sample.winner:
            ax.plot(
                x[place], y[place], "o", markersize=10, color="none", markeredgecolor=WORSE, markeredgewidth=2, zorder=4
            )
        if sample.winner:
            ax.plot(x[place], y[place], "*", color=INK, markeredgecolor="white", markersize=15, zorder=5)


def _score_axis(ax: Axes, score_name: str, samples: Sequence[Sample]) -> None:
    higher = samples[0].score.higher_is_better
    ax.set_ylabel(score_name + ("" if higher else " (lower is better)"))
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)


def _legend(figure: Figure, samples: Sequence[Sample], more: Sequence[Line2D | Patch]) -> None:
    handles: list[Line2D | Patch] = [Line2D([], [], **_star(), label="winner")]
    if any(sample.member for sample in samples):
        ring = Line2D([], [], **_dot("none", WORSE), label="not significantly different from the winner")
        handles.append(ring)
    figure.legend(handles=[*handles, *more], loc="outside lower center", ncols=3, frameon=False, fontsize=9)


def _star() -> dict[str, Any]:
    return {"color": INK, "marker": "*", "linestyle": "", "markersize": 11}


def _dot(colour: str, edge: str = "white") -> dict[str, Any]:
    shape = {"marker": "o", "linestyle": "", "markersize": 8}
    return {**shape, "color": colour, "markeredgecolor": edge, "markeredgewidth": 2 if edge != "white" else 0.8}


def _worth(score: Measurement) -> float:
    return score.value if score.higher_is_better else -score.value


def _refuse_none(samples: Sequence[Sample]) -> None:
    if not samples:
        raise BadSetting("A picture of a sweep needs at least one scored point.")
