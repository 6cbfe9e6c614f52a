"""Figures: same values, same bytes; marks where they belong; tables that fit a terminal."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ambergrade.errors import BadSetting
from ambergrade.nouns import Measurement
from ambergrade.score.figures import heat_map, interval_plot, leaderboard_text
from ambergrade.score.statistics import PairedDifference

A, B = (0.4, 0.6, 0.8, 1.0, 1.2), (0.1, 0.3, 0.5, 0.7, 0.9)
SURFACE = {(a, b): 0.7 - (a - 0.8) ** 2 - (b - 0.5) ** 2 for a in A for b in B}
PLOT = {"tag_recall": {"base7": PairedDifference(0.1, 0.05, 0.15, 0.01, 40, 0.05)}}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_equal_figures_are_equal_bytes_without_a_trace_of_when_and_by_what(tmp_path: Path) -> None:
    for draw, values in ((heat_map, SURFACE), (interval_plot, PLOT)):
        one, two = draw(values, tmp_path / "one.png"), draw(values, tmp_path / "two.png")  # type: ignore[operator]
        assert one.read_bytes() == two.read_bytes()
        assert not set(Image.open(one).info) & {"Software", "Creation Time", "date"}


def test_heat_map_is_brightest_at_the_best_point_whichever_way_is_better(tmp_path: Path) -> None:
    """Yellow (viridis' top) covers exactly the best cell's place, the middle of the grid."""
    for sign, better in ((1, True), (-1, False)):
        values = {point: sign * value for point, value in SURFACE.items()}
        image = pixels(heat_map(values, tmp_path / "map.png", higher_is_better=better, card=None))
        image = image[:, : int(image.shape[1] * 0.84)]  # without the colour bar
        yellow = (image[:, :, 0] > 230) & (image[:, :, 1] > 210) & (image[:, :, 2] < 60)
        rows, columns = np.nonzero(yellow)
        assert np.ptp(rows) < 0.25 * image.shape[0]
        assert np.median(columns) / image.shape[1] == pytest.approx(0.54, abs=0.05)


def test_winner_set_is_outlined_where_it_lies(tmp_path: Path) -> None:
    orange = (213, 94, 0)
    plain = pixels(heat_map(SURFACE, tmp_path / "plain.png"))
    outlined = pixels(heat_map(SURFACE, tmp_path / "set.png", winner=(0.8, 0.5), winner_set=[(0.8, 0.5), (1.0, 0.5)]))
    assert not (plain == orange).all(2).any()
    top = outlined[: int(outlined.shape[0] * 0.9)]  # without the legend
    rows, columns = np.nonzero((top == orange).all(2))
    assert 1.5 < np.ptp(columns) / np.ptp(rows) < 3  # two cells wide, one high


def test_missing_points_and_flat_surfaces_are_drawn(tmp_path: Path) -> None:
    some = dict.fromkeys(list(SURFACE)[3:], 0.5)
    assert heat_map(some, tmp_path / "some.png", low=some, high=some).stat().st_size > 5000
    with pytest.raises(BadSetting):
        heat_map({}, tmp_path / "none.png")
    with pytest.raises(BadSetting):
        interval_plot({}, tmp_path / "none.png")


def test_forest_colours_say_better_worse_undecided(tmp_path: Path) -> None:
    blue, orange, grey = (0, 114, 178), (213, 94, 0), (138, 138, 138)
    for low, high, better, colour in [
        (0.05, 0.15, True, blue),
        (0.05, 0.15, False, orange),
        (-0.15, -0.05, True, orange),
        (-0.15, -0.05, False, blue),
        (-0.05, 0.15, True, grey),
    ]:
        rows = {"base7": PairedDifference((low + high) / 2, low, high, 0.01, 40, 0.05, better)}
        image = pixels(interval_plot({"score": rows}, tmp_path / "forest.png"))
        counts = {shade: int((image == shade).all(2).sum()) for shade in (blue, orange, grey)}
        assert max(counts, key=counts.__getitem__) == colour


BOARD = {
    name: {
        "tag_balance": Measurement(value, value - 0.02, value + 0.02, 40),
        "tag_macro_recall": Measurement(value, value - 0.1, value + 0.1, 40),
        "clip_score": Measurement(40 * value, 28, 31, 40),
        "fid": Measurement(60 - 30 * value, 30, 50, 40, higher_is_better=False),
        "tag_leak": Measurement(math.nan, math.nan, math.nan, 0, higher_is_better=False),
    }
    for name, value in (("beta7", 0.55), ("gamma a=0.8 b=0.5", 0.75), ("gamma a=0.6 b=0.5", 0.74))
}
COLUMNS = ["tag_balance", "tag_macro_recall", "clip_score", "fid", "tag_leak"]


def test_leaderboard_fits_and_aligns() -> None:
    text = leaderboard_text(BOARD, COLUMNS, winner="gamma a=0.8 b=0.5", winner_set=["gamma a=0.6 b=0.5"])
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert [line[:19] for line in lines[1:4]] == ["* gamma a=0.8 b=0.5", "= gamma a=0.6 b=0.5", "  beta7" + " " * 12]
    header = lines[0]
    for line in lines[1:4]:
        assert line[header.index("tag_balance")] == "0"
        assert line[header.index("tag_balance") - 1] == " "
    assert "tag_leak" in text.split("\n\n")[1]  # what does not fit stands below
    assert text.split("\n\n")[1].splitlines()[1].endswith(" -")
    assert lines[-1] == "* best by tag_balance, 95 % intervals; = not significantly different from it"


def test_leaderboard_puts_the_better_first_and_the_unscored_last() -> None:
    board = dict(BOARD, empty={})
    text = leaderboard_text(board, ["fid"])
    assert [line.split()[0] for line in text.splitlines()[1:5]] == ["gamma", "gamma", "beta7", "empty"]
    assert "(lower is better)" in text


@pytest.mark.parametrize("side", [1, 2, 5])
def test_a_small_heat_map_has_room_for_its_title_and_legend(tmp_path: Path, side: int) -> None:
    points = {(float(a), float(b)): 0.1 * a + 0.2 * b for a in range(side) for b in range(side)}
    title = "gamma rev1 = beta7 + a * (anxl3 - anxl2) + b * (base7 - beta7)"
    marks = {"card": (0.0, 0.0), "winner": (0.0, 0.0), "winner_set": [(0.0, 0.0)]}
    drawn = pixels(heat_map(points, tmp_path / "map.png", title=title, **marks))
    for edge in (drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]):
        assert edge.min() == 255  # what is cut off reaches the edge


def test_a_table_says_whose_winner_it_marks_and_where_no_interval_is_known() -> None:
    points = {"first": {"m": Measurement(0.5, math.nan, math.nan, 1)}, "second": {"m": Measurement(0.4, 0.3, 0.5, 9)}}
    lines = leaderboard_text(points, ["m"], winner="second", chosen="the sweep's winner").splitlines()
    assert lines[1:3] == ["  first   0.500 [–]", "* second  0.400 [0.300–0.500]"]
    assert lines[-2] == "* the sweep's winner; sorted by m, 95 % intervals"
    assert lines[-1].startswith("[–] no interval: fewer than 6 prompts, ")
