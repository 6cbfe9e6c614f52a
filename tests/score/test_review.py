"""The review of a sweep: effects against scipy, pictures by their pixels, the page by a parser of its own."""

from __future__ import annotations

import base64
import math
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from ambergrade.errors import BadInput, BadSetting
from ambergrade.nouns import Measurement
from ambergrade.score import sweep_figures
from ambergrade.score.review import Review, html_review
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.sweep_figures import Sample, effects, is_grid, is_log

ORANGE, BLUE = (213, 94, 0), (0, 114, 178)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def places(image: np.ndarray, colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of one colour."""
    return np.nonzero((image == colour).all(2))


def samples(points: list[dict], scores: list[float], *, higher: bool = True, members: int = 1) -> list[Sample]:
    order = np.argsort(scores)[::-1] if higher else np.argsort(scores)
    inside = {int(place) for place in order[:members]}
    return [
        Sample(point, Measurement(s, s - 0.02, s + 0.02, 40, higher), winner=k == order[0], member=k in inside)
        for k, (point, s) in enumerate(zip(points, scores, strict=True))
    ]


def sheet(scores: np.ndarray, fid: float = 30.0) -> ScoreSheet:
    ids = tuple(f"p{k}" for k in range(len(scores)))
    columns = {"prob": scores, "fid": np.full(len(scores), fid)}
    return ScoreSheet(ids, (0,) * len(ids), columns, {}, {"prob": True, "fid": False}, {}, {}, {}, "")


def review(points: dict[str, dict], centre: float = 0.8) -> Review:
    """Points whose score falls with the distance of their first axis from a centre; prompts add noise of their own."""
    rng = np.random.default_rng(0)
    own = rng.normal(0, 0.1, 40)
    sheets = {}
    for label, point in points.items():
        first = next(iter(point.values()))
        distance = abs(float(first) - centre) if not isinstance(first, str) else 0.0
        sheets[label] = sheet(0.9 - 0.3 * distance + own + rng.normal(0, 0.01, 40), 20 + distance)
    return Review.of(sheets, points, title="a sweep <1>", objective="prob", columns=["prob", "fid"])


GRID = {f"a {a}, b {b}": {"a": a, "b": b} for a in (0.0, 0.4, 0.8, 1.2) for b in (0.0, 0.5, 1.0)}


def raced(prompts: int = 12) -> Review:
    """A sweep over a grid whose worst points left a race after so many of the forty prompts."""
    rng = np.random.default_rng(3)
    own = rng.normal(0, 0.2, 40)
    rows = {
        label: 0.9 - 0.2 * (p["a"] - 0.7) ** 2 - 0.1 * (p["b"] - 0.6) ** 2 + own + rng.normal(0, 0.005, 40)
        for label, p in GRID.items()
    }
    worst = sorted(rows, key=lambda label: rows[label].mean())[:8]
    whole = {label: sheet(row) for label, row in rows.items() if label not in worst}
    early = {label: (GRID[label], sheet(rows[label][:prompts])) for label in worst}
    points = {label: GRID[label] for label in whole}
    return Review.of(whole, points, title="a race", objective="prob", columns=["prob"], early=early)


def test_points_that_left_a_race_stand_beside_the_best_by_the_prompts_they_share() -> None:
    whole, found = raced(40), raced()
    assert found.winner_set.endswith("of 12 points is not significantly different from the best")
    for label, sample in found.early.items():
        assert sample.score.n == 12
        assert math.isnan(sample.score.low)
        assert sample.score.value == pytest.approx(whole.early[label].score.value, abs=0.01)
    assert len(found.samples) == 12


def test_a_surface_goes_through_all_points_of_a_race_and_is_told_drawn_and_on_the_page(tmp_path: Path) -> None:
    found = raced()
    assert found.surface is not None
    assert found.surface.best == pytest.approx((0.7, 0.6), abs=0.06)
    assert "is best at a 0." in found.table
    drawn = pixels(found.draw(tmp_path)["heat map"])
    plain = pixels(replace(found, surface=None).draw(tmp_path / "plain")["heat map"])
    assert drawn.shape != plain.shape or (drawn != plain).any()
    page = html_review(found, found.draw(tmp_path), facts={})
    assert "quadratic surface" in page
    assert "left the race" in page


def test_words_on_an_axis_and_few_points_have_no_surface() -> None:
    assert review({"x": {"a": 0.0, "b": "one"}, "y": {"a": 1.0, "b": "two"}}).surface is None
    assert review({"x": {"a": 0.0, "b": 1.0}, "y": {"a": 1.0, "b": 2.0}}).surface is None


# --- effects ----------------------------------------------------------------------------------------------------


def test_effects_are_the_slopes_of_scipy_times_the_range_and_their_limits_near_those_of_its_t_test() -> None:
    rng = np.random.default_rng(1)
    table = rng.uniform(0, 2, (80, 3))
    scores = 0.5 + 0.04 * table[:, 0] - 0.02 * table[:, 1] + rng.normal(0, 0.02, 80)
    points = [dict(zip("abc", row, strict=True)) for row in table.tolist()]
    found = effects(samples(points, scores.tolist()), "abc")
    for column, name in enumerate("abc"):
        line, span = stats.linregress(table[:, column], scores), np.ptp(table[:, column])
        half = stats.t.ppf(0.975, 78) * line.stderr * span
        assert found[name].value == pytest.approx(line.slope * span, rel=1e-9)
        assert (found[name].high - found[name].low) / 2 == pytest.approx(half, rel=0.25)
    assert found["a"].low > 0 > found["b"].high
    assert found["c"].low < 0 < found["c"].high


def test_an_effect_of_a_power_axis_is_taken_over_logarithms_and_a_fixed_axis_has_none() -> None:
    rates = np.repeat([1e-6, 1e-5, 1e-4, 1e-3], 5)
    points = [{"lr": float(rate), "still": 1.0} for rate in rates]
    scores = (0.1 * np.log10(rates) + 1).tolist()
    found = effects(samples(points, scores), ["lr", "still"])
    assert found["lr"].value == pytest.approx(0.3)
    assert (found["lr"].low, found["lr"].high) == pytest.approx((0.3, 0.3))
    assert math.isnan(found["still"].value)


def test_lattices_and_powers_are_known_from_their_points() -> None:
    rng = np.random.default_rng(0)
    grid = [(a, b) for a in range(5) for b in range(4)]
    assert is_grid(grid)
    assert is_grid(grid[:12])  # some failed
    assert not is_grid([tuple(row) for row in rng.uniform(size=(30, 2)).tolist()])
    assert is_log(np.array([1e-6, 1e-5, 1e-4]))
    assert is_log(10 ** rng.uniform(-6, -3, 40))
    assert not is_log(rng.uniform(0.05, 1.6, 40))
    assert not is_log(np.array([-1.0, 0.0, 10.0]))


# --- pictures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([{"a": a, "c": 1.0} for a in (0.0, 0.4, 0.8)], ["curve"]),
        ([{"a": "euler"}, {"a": "ddim"}, {"a": "heun"}], ["curve"]),
        (list(GRID.values()), ["heat map"]),
        ([{"a": a, "s": s} for a in (0.0, 0.8) for s in ("euler", "ddim")], ["heat map"]),
        ([{"a": 0.1 * k, "b": (0.37 * k) % 1} for k in range(12)], ["contour"]),
        ([{"a": 0.1 * k, "s": "xy"[k % 2]} for k in range(12)], ["heat map"]),
        ([{"a": 0.1 * k, "s": "xyz"[k % 3]} for k in range(12)], ["parallel coordinates"]),
        ([{"a": 0.1 * k, "b": (0.3 * k) % 1, "s": "xy"[k % 2]} for k in range(12)], ["parallel coordinates"]),
        ([{n: (k * m) % 7 for m, n in enumerate("abcd", 1)} for k in range(7)], ["parallel coordinates", "effects"]),
        (
            [{n: (k * m) % 7 for m, n in enumerate(("BASE", "IN00", "M00", "OUT08"), 1)} for k in range(7)],
            ["parallel coordinates", "block profile"],
        ),
        ([{"a": 0.8}], []),
    ],
)
def test_the_axes_choose_the_pictures(points: list[dict], expected: list[str], tmp_path: Path) -> None:
    named = {", ".join(f"{name} {value}" for name, value in point.items()): point for point in points}
    found = review(named).draw(tmp_path)
    assert list(found) == expected
    for file in found.values():
        assert file.parent == tmp_path
        assert np.ptp(pixels(file)) > 200


def test_a_curve_rings_the_winner_set_where_it_lies(tmp_path: Path) -> None:
    points = [{"a": a} for a in (0.0, 1.0, 2.0, 3.0, 4.0)]
    alone = samples(points, [0.1, 0.5, 0.9, 0.88, 0.2], members=1)
    with_second = samples(points, [0.1, 0.5, 0.9, 0.88, 0.2], members=2)
    plain = pixels(sweep_figures.curve(alone, tmp_path / "one.png", axis="a"))
    ringed = pixels(sweep_figures.curve(with_second, tmp_path / "two.png", axis="a"))
    band = slice(0, int(plain.shape[0] * 0.85))  # without the legend
    assert not len(places(plain[band], ORANGE)[0])
    blue = places(ringed[band], BLUE)[1]
    ring = np.median(places(ringed[band], ORANGE)[1])
    assert (ring - blue.min()) / np.ptp(blue) == pytest.approx(0.75, abs=0.02)


def test_a_contour_claims_nothing_beyond_its_points(tmp_path: Path) -> None:
    """A triangle of points: its colours rise to the right, and the corner across stays white."""
    points = [{"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 1.0}, {"a": 0.3, "b": 0.31}]
    found = samples(points, [0.0, 1.0, 0.0, 0.3])
    image = pixels(sweep_figures.contour(found, tmp_path / "contour.png", axes=("a", "b")))
    height, width = image.shape[:2]
    assert (image[int(0.15 * height), int(0.7 * width)] == 255).all()
    low, high = image[int(0.75 * height), int(0.2 * width)], image[int(0.79 * height), int(0.7 * width)]
    assert low[2] > low[0]  # viridis: blue where low, green and yellow where high
    assert high[1] > high[2]


def test_points_on_a_line_and_equal_scores_are_drawn_without_a_surface(tmp_path: Path) -> None:
    line = [{"a": 0.1 * k, "b": 0.2 * k} for k in range(6)]
    for scores in ([0.1 * k for k in range(6)], [0.5] * 6):
        assert sweep_figures.contour(samples(line, scores), tmp_path / "line.png", axes=("a", "b")).stat().st_size
    flat = [{"a": 0.1 * k, "b": (0.7 * k) % 1} for k in range(6)]
    assert sweep_figures.contour(samples(flat, [0.5] * 6), tmp_path / "flat.png", axes=("a", "b")).stat().st_size
    with pytest.raises(BadSetting):
        sweep_figures.curve([], tmp_path / "none.png", axis="a")


@pytest.mark.parametrize("higher", [True, False])
def test_parallel_coordinates_lead_the_winner_to_the_top_whichever_way_is_better(higher: bool, tmp_path: Path) -> None:
    points = [{"a": float(k), "b": float(k % 3), "c": float(k % 2)} for k in range(8)]
    found = samples(points, [0.1 * k for k in range(8)], higher=higher)
    image = pixels(sweep_figures.parallel_coordinates(found, tmp_path / "p.png", axes=list("abc")))
    body = image[: int(0.82 * image.shape[0]), : int(0.85 * image.shape[1])]
    ink = body.max(2) < 60  # the winner, the axis of scores, and words
    score_axis = int(np.argmax(ink.sum(0)))
    assert np.nonzero(ink[:, score_axis - 12])[0].min() < 0.2 * body.shape[0]


def test_equal_reviews_are_equal_bytes(tmp_path: Path) -> None:
    many = {str(k): {n: (k * m) % 7 / 7 for m, n in enumerate(("BASE", "IN00", "M00"), 1)} for k in range(7)}
    scattered = {str(k): {"a": 0.1 * k, "b": (0.37 * k) % 1} for k in range(12)}
    for points in (many, scattered, {str(k): {"a": k / 4} for k in range(5)}):
        one, two = review(points).draw(tmp_path / "one"), review(points).draw(tmp_path / "two")
        assert [file.read_bytes() for file in one.values()] == [file.read_bytes() for file in two.values()]


# --- the page ---------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Rows of the leaderboard, what is loaded from elsewhere, and the texts of pre."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[tuple[str, list[str]]] = []
        self.loaded: list[str] = []
        self.texts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag == "table":
            self._inside = found.get("class") or "other"
        if tag == "tr" and self._inside == "sorts":
            self.rows.append((found.get("class") or "", []))
        if tag in ("td", "th") and self._inside == "sorts":
            self.rows[-1][1].append(found.get("data-v") or "")
        if tag == "pre":
            self.texts.append("")
            self._inside = "pre"
        self.loaded += [value or "" for name, value in attributes if name in ("src", "srcset", "data")]
        if tag == "link":
            self.loaded.append(found.get("href") or "")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("table", "pre"):
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "pre":
            self.texts[-1] += data


def test_the_page_is_whole_in_itself_best_first_and_escapes_what_people_wrote(tmp_path: Path) -> None:
    made = review(GRID)
    pictures = made.draw(tmp_path)
    text = html_review(
        made,
        pictures,
        facts={"formula": "a < b & c"},
        links={"leaderboard": "http://127.0.0.1:5000/#/x?a=1&b=2"},
        recipe="formula: beta7 + a * (x - <y>)",
        command="python pipelines/sweep.py --multirun 'coefficients.a=0.6,0.8'",
        failures={"a 9": "ValueError: <nothing>"},
        out={"a 7": "after 8 prompts"},
    )
    page = Page(text)
    assert all(source.startswith("data:image/") for source in page.loaded)
    held = page.loaded[0].partition("base64,")[2]
    assert base64.b64decode(held) == pictures["heat map"].read_bytes()
    rows = page.rows[1:]
    scores = [float(cells[4]) for _, cells in rows]
    assert len(rows) == len(GRID)
    assert scores == sorted(scores, reverse=True)
    assert [kind for kind, _ in rows].count("winner") == 1
    assert rows[0][0] == "winner"
    assert sum(kind != "" for kind, _ in rows) == len(made.found.members)
    for cells, label in zip((cells for _, cells in rows), made.best_first, strict=True):
        assert (float(cells[2]), float(cells[3])) == tuple(GRID[label].values())
        assert float(cells[4]) == made.scores[label]["prob"].value
    assert page.texts == [
        "formula: beta7 + a * (x - <y>)",
        "python pipelines/sweep.py --multirun 'coefficients.a=0.6,0.8'",
    ]
    for written in ("a sweep &lt;1&gt;", "a &lt; b &amp; c", "ValueError: &lt;nothing&gt;", "after 8 prompts"):
        assert written in text


def test_a_point_without_a_score_comes_last_and_in_no_picture(tmp_path: Path) -> None:
    scored = review(GRID)
    empty = Measurement(math.nan, math.nan, math.nan, 0)
    lost = scored.best_first[0]
    scores = {label: {**row, "prob": empty} if label == lost else row for label, row in scored.scores.items()}
    made = Review(scored.title, "prob", scored.columns, scored.points, scores, scored.found)
    assert made.best_first[-1] == lost
    assert len(made.samples) == len(GRID) - 1
    assert "heat map" in made.draw(tmp_path)


def test_sheets_and_points_must_be_the_same_and_paired() -> None:
    with pytest.raises(BadInput, match="its own sheet"):
        Review.of({"a": sheet(np.zeros(4))}, {}, title="", objective="prob", columns=[])
    sheets = {"a": sheet(np.zeros(4)), "b": sheet(np.zeros(5))}
    with pytest.raises(BadInput, match="cannot be compared"):
        Review.of(sheets, {"a": {"x": 1.0}, "b": {"x": 2.0}}, title="", objective="prob", columns=[])
