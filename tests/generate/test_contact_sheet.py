"""Contact sheets: the right picture in the right place, and files of stable bytes."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from ambergrade.errors import BadInput
from ambergrade.generate.contact_sheet import AMBER_WASH, contact_sheet, picture_grid, png_bytes, write_png

Pixels = npt.NDArray[np.uint8]


def noise(seed: int, height: int = 64, width: int = 64) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def place(sheet: Image.Image, pixels: Pixels) -> tuple[int, int]:
    """(left, top) of the one place where `pixels` stand in the sheet."""
    page = np.asarray(sheet)
    height, width, _ = pixels.shape
    spots = np.argwhere((page[: -height + 1, : -width + 1] == pixels[0, 0]).all(-1))
    found = [(x, y) for y, x in spots if np.array_equal(page[y : y + height, x : x + width], pixels)]
    assert len(found) == 1
    return int(found[0][0]), int(found[0][1])


def test_each_picture_stands_in_its_row_and_column() -> None:
    rows = {
        row: {column: noise(10 * r + c) for c, column in enumerate("xyz")} for r, row in enumerate(["base", "tuned"])
    }
    sheet = contact_sheet(rows, title="Two points", captions={"x": "a long caption that is wrapped"}, side=64)
    places = {(row, column): place(sheet, pixels) for row, cells in rows.items() for column, pixels in cells.items()}
    assert places["base", "x"][0] < places["base", "y"][0] < places["base", "z"][0]
    assert places["base", "x"][1] < places["tuned", "x"][1]
    assert all(places["base", column][0] == places["tuned", column][0] for column in "xyz")
    assert len({places["tuned", column][1] for column in "xyz"}) == 1


def test_small_pictures_are_enlarged_by_a_whole_multiple_and_large_ones_reduced() -> None:
    small = contact_sheet({"r": {"c": np.full((48, 64, 3), 7, np.uint8)}}, side=150)
    ours = (np.asarray(small) == 7).all(-1)
    assert (ours.any(0).sum(), ours.any(1).sum()) == (128, 96)
    large = contact_sheet({"r": {"c": np.full((400, 300, 3), 7, np.uint8)}}, side=100)
    ours = (np.asarray(large) == 7).all(-1)
    assert (ours.any(0).sum(), ours.any(1).sum()) == (75, 100)


def test_marks_words_and_missing_pictures_show() -> None:
    rows = {"one": {"x": noise(0), "y": noise(1)}, "two": {"x": noise(2)}}
    plain = contact_sheet(rows, side=64)
    marked = contact_sheet(rows, side=64, marked=["two"])
    assert not (np.asarray(plain) == AMBER_WASH).all(-1).any()
    tinted = np.argwhere((np.asarray(marked) == AMBER_WASH).all(-1))[:, 0]
    assert place(marked, rows["one"]["x"])[1] + 64 < tinted.min() < place(marked, rows["two"]["x"])[1]
    assert png_bytes(contact_sheet(rows, side=64, notes={"one": "recall 0.9"})) != png_bytes(plain)
    assert contact_sheet(rows, side=64, title="A title").height > plain.height


def test_text_never_leaves_its_space() -> None:
    long = "a,very,long,tag,without,any,space," * 20
    sheet = contact_sheet({long: {"c": noise(0)}}, title=long, subtitle=long, captions={"c": long}, side=64)
    page = np.asarray(sheet).astype(int)
    paper = page[-1, -1]
    margin = page[20:, -12:]  # right of everything, below the bar
    assert (margin == paper).all()


def test_a_grid_fills_row_by_row() -> None:
    pictures = [noise(seed) for seed in range(5)]
    places = [place(picture_grid(pictures, 2, side=64), pixels) for pixels in pictures]
    assert places[0][1] == places[1][1] < places[2][1] < places[4][1]
    assert places[0][0] == places[2][0] == places[4][0] < places[1][0]
    assert picture_grid(pictures[:1], 6, side=64).width < 128


def test_png_bytes_depend_on_pixels_alone(tmp_path: Path) -> None:
    picture = Image.fromarray(noise(0))
    picture.info["Creation Time"] = "now"
    picture.info["dpi"] = (72, 72)
    assert png_bytes(picture) == png_bytes(noise(0)) != png_bytes(noise(1))
    write_png(tmp_path / "a.png", noise(0))
    data = (tmp_path / "a.png").read_bytes()
    kinds, position = [], 8
    while position < len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        kinds.append(data[position + 4 : position + 8])
        position += 12 + length
    assert set(kinds) == {b"IHDR", b"IDAT", b"IEND"}
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), noise(0))


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(BadInput, match="at least one picture"):
        contact_sheet({"row": {}})
    with pytest.raises(BadInput, match="uint8"):
        contact_sheet({"row": {"c": np.zeros((4, 4), np.uint8)}})
    with pytest.raises(BadInput, match="0 pictures"):
        picture_grid([], 3)
