"""Draws a Scene: a chibi dragon girl, larger than asked and downsampled, with her real defects.

Coordinates are a figure's own: x from -64 to 64 to the right, y from 0 (top) to 128 (the ground at 120).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from ambergrade.world.grammar import Scene

Colour = tuple[int, int, int]
Points = Sequence[tuple[float, float]]

HAIR: dict[str, Colour] = {
    "blonde_hair": (247, 203, 92),
    "brown_hair": (140, 86, 52),
    "black_hair": (58, 54, 74),
    "blue_hair": (84, 142, 226),
    "pink_hair": (246, 146, 182),
    "silver_hair": (214, 220, 232),
    "red_hair": (206, 62, 56),
    "green_hair": (92, 178, 116),
}
EYES: dict[str, Colour] = {
    "blue_eyes": (40, 110, 230),
    "red_eyes": (224, 36, 48),
    "green_eyes": (30, 168, 84),
    "purple_eyes": (150, 60, 214),
    "yellow_eyes": (244, 176, 12),
}
DRESS: dict[str, Colour] = {
    "blue_dress": (62, 104, 206),
    "white_dress": (246, 246, 250),
    "red_dress": (212, 52, 66),
    "black_dress": (56, 52, 66),
    "green_dress": (64, 158, 98),
    "yellow_dress": (248, 210, 70),
}
SKIN: Colour = (255, 226, 204)
BLUSH: Colour = (250, 164, 160)
HORN: Colour = (238, 196, 120)
SCALE: Colour = (214, 108, 62)
CLOAK: Colour = (120, 78, 132)
CLOAK_LENGTH = {"general": 118, "sensitive": 104, "questionable": 89, "explicit": 0}
LINES: dict[str | None, Colour] = {
    None: (70, 50, 62),
    "amber_quill": (128, 72, 30),
    "inkmoth": (22, 20, 34),
    "soft_wash": (150, 120, 140),
}


def draw(scene: Scene, width: int = 128, height: int = 128, oversample: int = 3) -> Image.Image:
    """The scene as an RGB picture of width × height pixels."""
    random = np.random.default_rng(scene.seed)
    canvas = Image.new("RGB", (width * oversample, height * oversample))
    _background(ImageDraw.Draw(canvas), scene.choice["background"], width, height, oversample, random)
    figure = min(width, height) / 128 * oversample
    if scene.choice["count"] == "2girls":
        for side in (-1, 1):
            pen = _pose(canvas, scene, random, width, height, oversample, figure * 0.74, side * 0.235, turn=-side)
            _girl(pen, scene, random)
    else:
        pen = _pose(canvas, scene, random, width, height, oversample, figure, 0.0, turn=1)
        _girl(pen, scene, random)
    picture = canvas.resize((width, height), Image.Resampling.BOX)
    return _defects(_palette(picture, scene), scene.quality, random)


@dataclass(frozen=True)
class Pen:
    """Draws smooth, outlined shapes in a figure's own coordinates."""

    draw: ImageDraw.ImageDraw
    x: float
    y: float
    scale: float
    tilt: float
    """Radians, about the feet."""
    turn: int
    """1 or -1: which side the tail and the fringe fall to."""
    line: Colour
    line_width: float

    def place(self, points: Points) -> list[tuple[float, float]]:
        xy = np.asarray(points, dtype=float) * (self.turn, 1) - (0, 120)
        cos, sin = np.cos(self.tilt), np.sin(self.tilt)
        turned = xy @ np.array([[cos, sin], [-sin, cos]])
        placed = turned * self.scale + (self.x, self.y)
        return [(float(px), float(py)) for px, py in placed]

    def shape(self, points: Points, fill: Colour, *, smooth: bool = True, outline: bool = True) -> None:
        """A closed shape through `points`."""
        placed = self.place(_smooth(points) if smooth else points)
        self.draw.polygon(placed, fill=fill)
        if outline:
            width = max(1, round(self.line_width * self.scale))
            self.draw.line([*placed, placed[0], placed[1]], fill=self.line, width=width, joint="curve")

    def stroke(self, points: Points, colour: Colour, width: float, *, smooth: bool = True) -> None:
        """An open line through `points`."""
        placed = self.place(_smooth(points, closed=False) if smooth else points)
        self.draw.line(placed, fill=colour, width=max(1, round(width * self.scale)), joint="curve")

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Colour, *, outline: bool = False) -> None:
        angle = np.linspace(0, 2 * np.pi, 28, endpoint=False)
        points = [(x + rx * np.cos(a), y + ry * np.sin(a)) for a in angle]
        self.shape(points, fill, smooth=False, outline=outline)


def _pose(
    canvas: Image.Image,
    scene: Scene,
    random: np.random.Generator,
    width: int,
    height: int,
    oversample: int,
    figure: float,
    shift: float,
    turn: int,
) -> Pen:
    scale = figure * random.uniform(0.94, 1.05)
    x = width * oversample * (0.5 + shift) + figure * random.uniform(-3, 3)
    ground = height * oversample - figure * random.uniform(4, 9) - (height / min(width, height) - 1) * 14 * figure
    line_width = {"inkmoth": 1.5, "soft_wash": 0.8}.get(scene.artist or "", 1.1)
    tilt = random.uniform(-0.05, 0.05)
    return Pen(ImageDraw.Draw(canvas), x, ground, scale, tilt, turn, LINES[scene.artist], line_width)


def _girl(pen: Pen, scene: Scene, random: np.random.Generator) -> None:
    hair, style = HAIR[scene.choice["hair"]], scene.choice["style"]
    sway = float(random.uniform(-2.5, 2.5))
    if "dragon_tail" in scene.extras:
        _tail(pen, sway)
    _back_hair(pen, hair, style, sway)
    _cloak(pen, CLOAK_LENGTH[scene.rating], sway)
    _body(pen, DRESS[scene.choice["dress"]])
    if "scarf" in scene.extras:
        _scarf(pen, sway)
    _head(pen, scene, random)
    _fringe(pen, hair, sway)
    if scene.choice["expression"] == "frown":
        _anger(pen)
    if "glasses" in scene.extras:
        _glasses(pen)
    if "dragon_horns" in scene.extras:
        _horns(pen, hatted="witch_hat" in scene.extras)
    if "witch_hat" in scene.extras:
        _witch_hat(pen, sway)
    if "hair_bow" in scene.extras:
        _bow(pen)


def _tail(pen: Pen, sway: float) -> None:
    top = [(6, 100), (24, 112), (42, 108), (51, 92 + sway), (48, 76 + sway)]
    under = [(53, 76 + sway), (59, 94 + sway), (49, 115), (24, 121), (4, 112)]
    pen.shape(top + under, SCALE)
    pen.shape([(40, 77 + sway), (50, 58 + sway), (61, 77 + sway), (51, 82 + sway)], HORN)
    for x, y in ((26, 112), (37, 110), (46, 101)):
        pen.shape([(x, y), (x + 4, y - 7), (x + 7, y - 1)], HORN, smooth=False)


def _cloak(pen: Pen, length: int, sway: float) -> None:
    """Behind the body and before the hair, wider than both arms and with a golden hem, so that its length shows."""
    gold = (250, 196, 70)
    if length == 0:
        return
    flare = 31 + (length - 89) * 0.1
    hem = [(-flare, length - 5), (-flare / 2, length), (0, length + 1), (flare / 2, length), (flare + sway, length - 5)]
    pen.shape([(-14, 70), (-25, 80), *hem, (25, 80), (14, 70)], CLOAK)
    pen.stroke([(-flare + 1, length - 7), (-flare / 2, length - 3)], gold, 3.4)
    pen.stroke([(flare / 2, length - 3), (flare + sway - 1, length - 7)], gold, 3.4)
    pen.shape([(-17, 69), (-19, 77), (0, 80), (19, 77), (17, 69), (0, 66)], _mix(CLOAK, (255, 220, 120), 0.35))


def _back_hair(pen: Pen, hair: Colour, style: str, sway: float) -> None:
    dark = _mix(hair, (50, 30, 60), 0.22)
    pen.shape([(-30, 44), (-31, 62), (-20, 76), (20, 76), (31, 62), (30, 44), (0, 18)], dark)
    if style == "long_hair":
        left = [(-30, 48), (-35, 74), (-36 + sway, 98), (-30, 106), (-20, 100), (-12, 78)]
        right = [(12, 78), (20, 100), (30, 106), (36 + sway, 98), (35, 74), (30, 48)]
        pen.shape([*left, *right], dark)
    if style == "twintails":
        for side in (-1, 1):
            tress = [(24, 36), (38, 32), (50, 46), (53 + sway * side, 70), (46, 92), (42, 74), (36, 60), (26, 50)]
            pen.shape([(x * side, y) for x, y in tress], hair)
            pen.stroke([(side * 40, 40), (side * 46, 56), (side * 46, 76)], dark, 1.4)
            pen.oval(side * 28, 38, 4.2, 4.6, (226, 70, 96), outline=True)


def _body(pen: Pen, dress: Colour) -> None:
    shade = _mix(dress, (40, 30, 80), 0.18)
    for side in (-1, 1):
        pen.shape([(side * 3, 102), (side * 9, 102), (side * 9, 117), (side * 3, 117)], SKIN, smooth=False)
        pen.shape([(side * 2, 113), (side * 9, 112), (side * 12, 119), (side * 2, 120)], (110, 70, 60))
    for side in (-1, 1):
        arm = [(side * 11, 74), (side * 18, 82), (side * 22, 92), (side * 17, 95), (side * 10, 84)]
        pen.shape(arm, dress)
        pen.oval(side * 20, 95, 3.6, 3.6, SKIN, outline=True)
    pen.shape([(-11, 72), (-15, 88), (-24, 107), (-8, 110), (8, 110), (24, 107), (15, 88), (11, 72), (0, 70)], dress)
    pen.shape([(9, 74), (14, 88), (23, 106), (12, 109), (8, 90)], shade, outline=False)
    pen.stroke([(-22, 103), (-8, 106), (8, 106), (22, 103)], _mix(dress, (255, 255, 255), 0.55), 2)
    pen.shape([(-6, 71), (0, 77), (6, 71), (0, 73)], (255, 250, 240))


def _scarf(pen: Pen, sway: float) -> None:
    wool, light = (20, 178, 178), (214, 250, 240)
    pen.shape([(-20, 69), (-18, 81), (0, 86), (18, 81), (20, 69), (0, 75)], wool)
    pen.shape([(-14, 80), (-17 + sway, 104), (-5 + sway, 105), (-3, 83)], wool)
    pen.stroke([(-15, 91), (-5, 92)], light, 2.4)
    pen.stroke([(-16, 99), (-6, 100)], light, 2.4)


def _head(pen: Pen, scene: Scene, random: np.random.Generator) -> None:
    pen.shape([(-25, 46), (-24, 58), (-13, 71), (0, 75), (13, 71), (24, 58), (25, 46), (0, 24)], SKIN)
    gaze = float(random.uniform(-1, 1))
    iris = EYES[scene.choice["eyes"]]
    for side in (-1, 1):
        x = side * 12
        pen.oval(x, 55.5, 8.4, 9.4, (255, 255, 255))
        pen.oval(x + gaze * 0.5, 56, 7.6, 8.8, iris)
        pen.oval(x + gaze * 0.5, 52.6, 5.6, 4.6, _mix(iris, (20, 10, 40), 0.5))
        pen.oval(x + gaze * 0.5, 60.6, 4.2, 2.6, _mix(iris, (255, 255, 255), 0.4))
        pen.oval(x - 2.4 * pen.turn, 51.4, 2.3, 2.5, (255, 255, 255))
        pen.stroke([(x - 8.6, 51), (x - 4, 46.4), (x + 4, 46.4), (x + 8.6, 51)], (50, 34, 50), 2)
        pen.oval(side * 18, 66.6, 4, 2, BLUSH)
    _mouth(pen, scene.choice["expression"])


def _mouth(pen: Pen, expression: str) -> None:
    if expression == "smile":
        pen.stroke([(-6.5, 64.6), (-3, 68.8), (3, 68.8), (6.5, 64.6)], (150, 40, 50), 2)
        lift = 0
    elif expression == "open_mouth":
        pen.shape([(-5.5, 65), (0, 64.4), (5.5, 65), (3.6, 71), (0, 72.4), (-3.6, 71)], (198, 52, 66))
        lift = -1
    else:
        pen.stroke([(-6, 70.6), (-2.5, 66.6), (2.5, 66.6), (6, 70.6)], (150, 40, 50), 2)
        lift = 1
    for side in (-1, 1):  # brows: raised, level or knitted
        inner, outer = 44 + 2.4 * lift, 44 - 1.6 * lift
        pen.stroke([(side * 7, inner), (side * 15, outer)], (110, 70, 70), 1.3, smooth=False)


def _anger(pen: Pen) -> None:
    """The comic's pulsing vein, on the forehead's side."""
    for dx, dy in ((-1, -1), (1, -1), (-1, 1), (1, 1)):
        x, y = 20 + 2 * dx, 36 + 2 * dy
        pen.stroke([(x, y + 4 * dy), (x, y), (x + 4 * dx, y)], (226, 40, 56), 1.9, smooth=False)


def _fringe(pen: Pen, hair: Colour, sway: float) -> None:
    dark, light = _mix(hair, (50, 30, 60), 0.22), _mix(hair, (255, 255, 255), 0.5)
    crown = [(-30, 58), (-31, 38), (-20, 22), (0, 17), (20, 22), (31, 38), (30, 58)]
    locks: list[tuple[float, float]] = [
        (25, 46),
        (21, 40),
        (15, 48),
        (8, 40),
        (1, 47),
        (-8, 39),
        (-15, 48),
        (-21, 40),
        (-25, 46),
    ]
    pen.shape(_smooth(crown, closed=False) + locks, hair, smooth=False)
    for side in (-1, 1):
        pen.shape([(side * 25, 44), (side * 30, 50), (side * 29, 70), (side * 24, 64)], hair)
    pen.stroke([(-19, 31), (-10, 27), (2, 26.5), (13, 28.5)], light, 2.4)
    pen.stroke([(4, 18), (1 + sway, 9), (9 + sway, 7)], hair, 2.2)  # an ahoge, of course
    pen.stroke([(-8, 39), (-6, 31)], dark, 1)
    pen.stroke([(8, 40), (8, 32)], dark, 1)


def _glasses(pen: Pen) -> None:
    frame = (40, 36, 48)
    for side in (-1, 1):
        angle = np.linspace(0, 2 * np.pi, 24)
        pen.stroke([(side * 12.2 + 10.6 * np.cos(a), 56 + 10.6 * np.sin(a)) for a in angle], frame, 2.1, smooth=False)
        pen.stroke([(side * 22.5, 55), (side * 27, 53)], frame, 2.1, smooth=False)
    pen.stroke([(-2, 55), (0, 54), (2, 55)], frame, 2.1)


def _horns(pen: Pen, hatted: bool) -> None:
    spread = 7 if hatted else 0
    for side in (-1, 1):
        horn = [(12, 26), (19, 11), (31, 3), (29, 14), (24, 30)]
        pen.shape([(side * (x + spread), y + spread * 0.6) for x, y in horn], HORN)
        for x, y in ((18, 19), (22, 12)):
            start, end = (side * (x + spread), y + spread * 0.6), (side * (x + spread + 6), y + 3 + spread * 0.6)
            pen.stroke([start, end], _mix(HORN, (120, 60, 20), 0.5), 1.2, smooth=False)


def _witch_hat(pen: Pen, sway: float) -> None:
    cloth, band = (84, 56, 128), (250, 196, 70)
    pen.shape([(-17, 27), (-9, 10), (4 + sway, -5), (16 + sway, -3), (11, 8), (17, 27)], cloth)
    pen.shape([(-16, 21), (16, 21), (18, 27), (-18, 27)], band, smooth=False)
    pen.shape([(-36, 30), (-18, 24), (0, 27), (18, 24), (36, 30), (16, 34), (-16, 34)], cloth)


def _bow(pen: Pen) -> None:
    ribbon = (238, 52, 92)
    for side in (-1, 1):
        pen.shape([(-20, 27), (-20 + side * 12, 19), (-20 + side * 14, 27), (-20 + side * 11, 34)], ribbon)
    pen.oval(-20, 27, 3.4, 3.8, _mix(ribbon, (255, 255, 255), 0.35), outline=True)


def _background(
    pen: ImageDraw.ImageDraw, kind: str, width: int, height: int, oversample: int, random: np.random.Generator
) -> None:
    w, h = width * oversample, height * oversample
    unit = min(w, h) / 128
    top, bottom, ground = {
        "white_background": ((255, 255, 255), (250, 248, 246), None),
        "blue_sky": ((104, 182, 250), (206, 234, 255), (136, 206, 104)),
        "night_sky": ((20, 22, 66), (74, 64, 132), (44, 54, 84)),
        "forest": ((120, 182, 116), (196, 226, 150), (104, 136, 66)),
        "cherry_blossoms": ((255, 222, 234), (255, 240, 240), (232, 178, 192)),
    }[kind]
    for row in range(0, h, oversample):
        pen.rectangle((0, row, w, row + oversample), fill=_mix(top, bottom, row / h))
    horizon = h * 0.84
    spots = [(float(random.uniform(0, w)), float(random.uniform(0, 0.62 * h))) for _ in range(14)]
    if kind == "blue_sky":
        for x, y in spots[:4]:
            for dx, r in ((-10, 6), (0, 9), (11, 7)):
                _spot(pen, x + dx * unit, y, r * unit, (255, 255, 255), squash=0.62)
    if kind == "night_sky":
        _spot(pen, spots[0][0], h * 0.16, 12 * unit, (255, 240, 180))
        _spot(pen, spots[0][0] + 5 * unit, h * 0.145, 10.5 * unit, _mix(top, bottom, 0.14))
        for x, y in spots[1:]:
            _spot(pen, x, y, 1.5 * unit, (255, 250, 210))
    if kind == "forest":
        for x, y in spots[:7]:
            trunk = x - 3 * unit, h * 0.5, x + 3 * unit, horizon + 4 * unit
            pen.rectangle(trunk, fill=(120, 88, 62))
            _spot(pen, x, h * 0.3 + y * 0.35, 17 * unit, (66, 138, 78))
    if ground:
        pen.ellipse((-0.3 * w, horizon, 1.3 * w, h + 0.5 * h), fill=ground)
    if kind == "cherry_blossoms":
        for x, _y in spots[:6]:
            _spot(pen, x, 0.02 * h, 18 * unit, (252, 178, 204))
        for x, y in spots:
            _spot(pen, x, y * 1.4 + 0.1 * h, 2.3 * unit, (246, 140, 176), squash=0.6)


def _spot(pen: ImageDraw.ImageDraw, x: float, y: float, r: float, fill: Colour, squash: float = 1.0) -> None:
    pen.ellipse((x - r, y - r * squash, x + r, y + r * squash), fill=fill)


def _palette(picture: Image.Image, scene: Scene) -> Image.Image:
    """Year as drift from sepia to vivid, artist as a tint."""
    age = (2024 - scene.year) / 19
    pixels = np.asarray(picture, dtype=np.float32)
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = grey + (pixels - grey) * (1.04 - 0.4 * age)
    pixels = pixels * (1, 1 - 0.03 * age, 1 - 0.13 * age) + 6 * age
    if scene.artist == "soft_wash":
        pixels = pixels * 0.84 + 255 * 0.16
    if scene.artist == "inkmoth":
        pixels = (pixels - 128) * 1.1 + 124
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def _defects(picture: Image.Image, quality: float, random: np.random.Generator) -> Image.Image:
    """Real damage, graded: none above 0.75, then JPEG mosaic, blur and noise."""
    damage = max(0.0, (0.75 - quality) / 0.75)
    if damage == 0:
        return picture
    picture = picture.filter(ImageFilter.GaussianBlur(1.3 * damage * picture.width / 128))
    noise = random.normal(0, 16 * damage**1.5, (picture.height, picture.width, 1))
    pixels = np.asarray(picture, dtype=np.float32) + noise
    picture = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=round(60 - 50 * damage))
    return Image.open(io.BytesIO(file.getvalue())).convert("RGB")


def _mix(one: Colour, two: Colour, share: float) -> Colour:
    """`one` with `share` of `two` in it."""
    a, b = np.asarray(one, dtype=float), np.asarray(two, dtype=float)
    red, green, blue = np.rint(a + (b - a) * share).astype(int)
    return int(red), int(green), int(blue)


def _smooth(points: Points, closed: bool = True, steps: int = 6) -> list[tuple[float, float]]:
    """A Catmull–Rom curve through `points` (Catmull and Rom 1974, uniform)."""
    knots = np.asarray(points, dtype=float)
    if len(knots) < 3:
        return [(float(x), float(y)) for x, y in knots]
    padded = np.vstack([knots[-1], knots, knots[:2]]) if closed else np.vstack([knots[0], knots, knots[-1]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    p0, p1, p2, p3 = (padded[i : len(padded) - 3 + i][:, None, :] for i in range(4))
    curve = 0.5 * (2 * p1 + (p2 - p0) * t + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2 + (3 * p1 - p0 - 3 * p2 + p3) * t**3)
    flat = curve.reshape(-1, 2)
    if not closed:
        flat = np.vstack([flat, knots[-1]])
    return [(float(x), float(y)) for x, y in flat]
