"""Pictures side by side: a labelled contact sheet (points × prompts), a plain grid, and PNG files of stable bytes."""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from ambergrade.errors import BadInput
from ambergrade.store import written_aside

Pixels = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

PAPER, EMPTY, EDGE = (251, 249, 245), (240, 237, 231), (219, 213, 206)
INK, MUTED = (41, 36, 46), (118, 110, 120)
AMBER, AMBER_WASH = (222, 142, 30), (253, 238, 210)


def contact_sheet(
    rows: Mapping[str, Mapping[str, Pixels]],
    *,
    title: str = "",
    subtitle: str = "",
    captions: Mapping[str, str] | None = None,
    notes: Mapping[str, str] | None = None,
    marked: Collection[str] = (),
    side: int = 256,
) -> Image.Image:
    """A labelled grid of pictures: one row a point, one column a prompt.

    `rows` maps row label to (column label to H × W × 3 uint8 RGB); a row that lacks a column shows an empty card.
    `captions` stand above the columns in place of their labels, `notes` stand small under row labels (scores, say);
    all are wrapped and may hold line ends. `marked` rows are set off in amber. The longer side of a picture becomes
    `side` pixels or, when it is enlarged, the largest whole multiple within `side`.
    """
    if not any(rows.values()):
        raise BadInput("A contact sheet needs at least one picture.")
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    cards = {(row, column): _scaled(pixels, side) for row, cells in rows.items() for column, pixels in cells.items()}
    card_width = max(card.width for card in cards.values())
    card_height = max(card.height for card in cards.values())

    em = max(side, 160) / 16  # all measures follow the pictures' size
    gap, margin, label_space = round(0.8 * em), round(2.2 * em), round(14 * em)
    labels = {row: _Text(row, 1.1 * em, INK, label_space, lines=3, bold=True) for row in rows}
    small = {row: _Text((notes or {}).get(row, ""), 0.9 * em, MUTED, label_space, lines=5) for row in rows}
    label_width = max(text.width for text in (*labels.values(), *small.values()))
    left = margin + label_width + round(1.4 * em)
    width = left + len(columns) * (card_width + gap) - gap + margin
    width = max(width, round(36 * em) if title else 0)
    heading = _Text(title, 1.9 * em, INK, width - 2 * margin, lines=2, bold=True)
    under = _Text(subtitle, em, MUTED, width - 2 * margin, lines=3)
    tops = {
        column: _Text((captions or {}).get(column, column), 0.9 * em, MUTED, card_width, lines=6) for column in columns
    }

    heading_top = margin + round(0.4 * em)
    under_top = heading_top + heading.height + (round(0.3 * em) if title else 0)
    captions_top = under_top + under.height + (round(1.2 * em) if title or subtitle else 0)
    cards_top = captions_top + max(text.height for text in tops.values()) + round(0.5 * em)
    sheet = Image.new("RGB", (width, cards_top + len(rows) * (card_height + gap) - gap + margin), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((0, 0, width, round(0.5 * em)), fill=AMBER)
    heading.draw(pen, margin, heading_top)
    under.draw(pen, margin, under_top)
    for place, column in enumerate(columns):
        text = tops[column]
        text.draw(pen, left + place * (card_width + gap), cards_top - round(0.5 * em) - text.height)
    for number, row in enumerate(rows):
        top = cards_top + number * (card_height + gap)
        if row in marked:
            band = (top - gap // 2, top + card_height + (gap - 1) // 2)
            pen.rectangle((0, band[0], width, band[1]), fill=AMBER_WASH)
            pen.rectangle((0, band[0], round(0.6 * em), band[1]), fill=AMBER)
        text_top = top + (card_height - labels[row].height - small[row].height) // 2
        labels[row].draw(pen, margin, text_top)
        small[row].draw(pen, margin, text_top + labels[row].height)
        for place, column in enumerate(columns):
            x = left + place * (card_width + gap)
            card = cards.get((row, column)) or Image.new("RGB", (card_width, card_height), EMPTY)
            corner = (x + (card_width - card.width) // 2, top + (card_height - card.height) // 2)
            sheet.paste(card, corner)
            # A hairline around the card, so that white backgrounds end somewhere.
            pen.rectangle((corner[0] - 1, corner[1] - 1, corner[0] + card.width, corner[1] + card.height), outline=EDGE)
    return sheet


def picture_grid(pictures: Sequence[Pixels], columns: int, *, side: int = 256) -> Image.Image:
    """Pictures (H × W × 3 uint8 RGB) row by row, `columns` a row, without words; scaled as in `contact_sheet`."""
    if not pictures or columns < 1:
        raise BadInput(f"A grid needs pictures and columns; found {len(pictures)} pictures, {columns} columns.")
    cards = [_scaled(pixels, side) for pixels in pictures]
    width, height = max(card.width for card in cards), max(card.height for card in cards)
    gap = max(4, side // 40)
    columns = min(columns, len(cards))
    lines = -(-len(cards) // columns)
    grid = Image.new("RGB", (gap + columns * (width + gap), gap + lines * (height + gap)), PAPER)
    for place, card in enumerate(cards):
        line, column = divmod(place, columns)
        x, y = gap + column * (width + gap), gap + line * (height + gap)
        grid.paste(card, (x + (width - card.width) // 2, y + (height - card.height) // 2))
    return grid


def png_bytes(picture: Image.Image | Pixels) -> bytes:
    """The picture as PNG, with no chunk but header, data and end: equal pixels give equal bytes."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    plain = Image.fromarray(np.asarray(image.convert("RGB")))  # leaves behind `info`, which PIL would write
    buffer = io.BytesIO()
    plain.save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def write_png(path: Path, picture: Image.Image | Pixels) -> None:
    """Write `png_bytes` under the final name in one step."""
    with written_aside(path) as aside:
        aside.write_bytes(png_bytes(picture))


@dataclass(frozen=True)
class _Text:
    """A text wrapped to `space` pixels and at most `lines` lines, in DejaVu Sans; what does not fit ends in `…`."""

    text: str
    size: float
    colour: Colour
    space: int
    lines: int
    bold: bool = False

    @cached_property
    def wrapped(self) -> list[str]:
        """
        >>> _Text("one two three four\\nfive", 10, INK, space=60, lines=3).wrapped
        ['one two', 'three four', 'five']
        """
        lines: list[str] = []
        for paragraph in self.text.splitlines():
            words = paragraph.split()
            while words:
                count = len(words)
                while count > 1 and not self._fits(" ".join(words[:count])):
                    count -= 1
                lines.append(" ".join(words[:count]))
                words = words[count:]
        shown = [line if self._fits(line) else self._cut(line) for line in lines[: self.lines]]
        if len(lines) > self.lines:
            shown[-1] = self._cut(shown[-1])
        return shown

    @property
    def width(self) -> int:
        return max((round(self._font.getlength(line)) for line in self.wrapped), default=0)

    @property
    def height(self) -> int:
        return len(self.wrapped) * self._leading

    def draw(self, pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
        for number, line in enumerate(self.wrapped):
            pen.text((x, y + number * self._leading), line, self.colour, self._font)

    def _fits(self, line: str) -> bool:
        return self._font.getlength(line) <= self.space

    def _cut(self, line: str) -> str:
        while line and not self._fits(line + "…"):
            line = line[:-1]
        return line.rstrip(" ,…") + "…"

    @property
    def _leading(self) -> int:
        return round(1.35 * self.size)

    @property
    def _font(self) -> ImageFont.FreeTypeFont:
        return _font(round(self.size), self.bold)


@lru_cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    """DejaVu Sans as matplotlib ships it: the same on every machine. BASIC layout, as RAQM is not in every build."""
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def _scaled(pixels: Pixels, side: int) -> Image.Image:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise BadInput(f"A picture is H × W × 3 uint8; found {pixels.shape} {pixels.dtype}.")
    image = Image.fromarray(pixels)
    longer = max(image.size)
    factor = side // longer if longer <= side else side / longer
    if factor == 1:
        return image
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS)
