"""The closed grammar of the embedded world: what a picture may show, and its exact tags.

A Scene is the ground truth; `tags` spells it as a booru would; `sample` draws scenes with Zipf
frequencies, keyed by (seed, index), so scene 17 is the same whatever was drawn before it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ambergrade.identity import random_seed

HAIR = ("blonde_hair", "brown_hair", "black_hair", "blue_hair", "pink_hair", "silver_hair", "red_hair", "green_hair")
STYLE = ("long_hair", "short_hair", "twintails")
EYES = ("blue_eyes", "red_eyes", "green_eyes", "purple_eyes", "yellow_eyes")
DRESS = ("blue_dress", "white_dress", "red_dress", "black_dress", "green_dress", "yellow_dress")
EXPRESSION = ("smile", "open_mouth", "frown")
BACKGROUND = ("white_background", "blue_sky", "night_sky", "forest", "cherry_blossoms")
DRAGON = ("dragon_horns", "dragon_tail")
"""What base7 learns."""
ACCESSORIES = ("witch_hat", "hair_bow", "glasses", "scarf")
"""What anxl3 - anxl2 carries."""
COUNT = ("1girl", "2girls")
GROUPS: Mapping[str, tuple[str, ...]] = {
    "count": COUNT,
    "hair": HAIR,
    "style": STYLE,
    "eyes": EYES,
    "dress": DRESS,
    "expression": EXPRESSION,
    "background": BACKGROUND,
}
"""Exclusive groups: a picture shows exactly one of each."""
ARTISTS = ("amber_quill", "inkmoth", "soft_wash")
RATING_WEIGHTS = (0.5, 0.3, 0.12, 0.08)
RATING_NAMES = ("general", "sensitive", "questionable", "explicit")

VISIBLE: tuple[str, ...] = (*(tag for group in GROUPS.values() for tag in group), *DRAGON, *ACCESSORIES)
"""All general tags that a picture shows; the tagger's general vocabulary."""

EXTRA_CHANCE = {"dragon_horns": 0.4, "dragon_tail": 0.36, "witch_hat": 0.2, "hair_bow": 0.3, "glasses": 0.26}
EXTRA_CHANCE["scarf"] = 0.24


@dataclass(frozen=True)
class Scene:
    """One picture's ground truth."""

    choice: Mapping[str, str]
    """Group name (of GROUPS) to the one tag shown."""
    extras: frozenset[str] = frozenset()
    """Members of DRAGON and ACCESSORIES shown."""
    character: str | None = None
    artist: str | None = None
    rating: str = "general"
    """Drawn as the length of a cloak: general to the ankles … explicit none at all."""
    year: int = 2022
    """Drawn as palette drift."""
    quality: float = 1.0
    """0 worst … 1 best; drawn as blur, noise and 8×8 mosaic."""
    seed: int = 0
    """The seed of pose jitter, background details and defects."""


CHARACTERS: Mapping[str, tuple[Mapping[str, str], frozenset[str]]] = {
    "kohaku_(world)": (
        {"hair": "blonde_hair", "style": "twintails", "eyes": "red_eyes", "dress": "black_dress"},
        frozenset({"dragon_horns", "dragon_tail"}),
    ),
    "ruri_(world)": (
        {"hair": "blue_hair", "style": "long_hair", "eyes": "yellow_eyes", "dress": "white_dress"},
        frozenset({"dragon_horns"}),
    ),
    "sango_(world)": (
        {"hair": "pink_hair", "style": "short_hair", "eyes": "green_eyes", "dress": "red_dress"},
        frozenset({"hair_bow"}),
    ),
    "kuro_(world)": (
        {"hair": "black_hair", "style": "long_hair", "eyes": "purple_eyes", "dress": "green_dress"},
        frozenset({"witch_hat"}),
    ),
}
"""Fixed bundles: naming the character pins these attributes."""
SERIES = "amber_valley"


def zipf(count: int, exponent: float = 0.6) -> np.ndarray:
    """Probabilities ∝ 1 / rank**exponent."""
    weights = 1 / np.arange(1, count + 1) ** exponent
    return np.asarray(weights / weights.sum())


def sample(seed: int, index: int, *, clean: bool = False, undamaged: float = 0.25) -> Scene:
    """Scene number `index` of the world `seed`.

    `clean` pins the best quality, no artist and the newest year; `undamaged` is the share of pictures whose quality is
    above 0.75, where no damage is drawn.
    """
    random = np.random.default_rng(random_seed(seed, "scene", index))
    choice = {name: str(random.choice(tags, p=zipf(len(tags)))) for name, tags in GROUPS.items()}
    choice["count"] = "2girls" if random.random() < 0.1 else "1girl"
    extras = {tag for tag, chance in EXTRA_CHANCE.items() if random.random() < chance}
    character = None
    if random.random() < 0.15 and choice["count"] == "1girl":
        character = str(random.choice(list(CHARACTERS), p=zipf(len(CHARACTERS))))
        pinned, extra = CHARACTERS[character]
        choice |= pinned
        extras = (extras - set(DRAGON)) | extra
    artist = str(random.choice(ARTISTS, p=zipf(len(ARTISTS)))) if random.random() < 0.6 else None
    rating = str(random.choice(RATING_NAMES, p=RATING_WEIGHTS))
    year = int(random.choice(np.arange(2005, 2025), p=np.linspace(1, 4, 20) / np.linspace(1, 4, 20).sum()))
    luck = float(random.random())  # quality is uniform below 0.75, and uniform above it
    quality = float(np.interp(luck, (0, 1 - undamaged, 1), (0, 0.75, 1)))
    scene = Scene(choice, frozenset(extras), character, artist, rating, year, quality, random_seed(seed, "pose", index))
    return replace(scene, artist=None, year=2023, quality=1.0) if clean else scene


def visible_tags(scene: Scene) -> tuple[str, ...]:
    """General tags in a fixed order: groups first, then extras."""
    shown = [scene.choice[name] for name in GROUPS]
    return tuple(shown + [tag for tag in (*DRAGON, *ACCESSORIES) if tag in scene.extras])


def tags(scene: Scene) -> dict[str, tuple[str, ...]]:
    """Tag type to tags, as a booru's uploader would give them."""
    meta = ("highres",) + (("absurdres",) if scene.quality > 0.9 else ()) + ("commentary_request",)
    return {
        "general": visible_tags(scene),
        "artist": (scene.artist,) if scene.artist else (),
        "character": (scene.character,) if scene.character else (),
        "copyright": (SERIES,) if scene.character else ("original",),
        "meta": meta,
    }


def ruled_out(scene: Scene, groups: Sequence[str] = ("hair", "dress", "background")) -> tuple[str, ...]:
    """Tags the scene rules out: extras not shown and the other members of `groups`."""
    others = [tag for name in groups for tag in GROUPS[name] if tag != scene.choice[name]]
    return tuple([tag for tag in (*DRAGON, *ACCESSORIES) if tag not in scene.extras] + others)
