"""Writes a mini-booru: picture files, a database in the danbooru2023 schema (B), prompts and reference pictures.

    <folder>/booru.sqlite   pictures/   reference/   reference.txt
    <folder>/prompts/{sweep,heldout}.jsonl   prompts/{sweep,heldout}/   the first prompts' own pictures

Awkward specimens are among the pictures, as in the real thing: see AWKWARD.
"""

from __future__ import annotations

import multiprocessing
import shutil
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ambergrade.identity import file_digest, random_seed
from ambergrade.nouns import RATINGS, TAG_TYPES, Prompt, PromptSet
from ambergrade.world import grammar
from ambergrade.world.draw import draw
from ambergrade.world.grammar import Scene

FIRST_ID = 5_000_001
"""The first post after the five million that kohaku-2024-01's score table leaves out."""

PERCENT = (0, *range(5, 100, 5), 99.5, 100)
SCORES = {
    "general": (0, 1, 1, 2, 3, 4, 5, 5, 6, 7, 8, 10, 11, 13, 14, 17, 19, 23, 28, 38, 90, 160),
    "sensitive": (0, 2, 4, 7, 9, 11, 13, 16, 18, 21, 24, 28, 31, 36, 41, 48, 56, 67, 84, 118, 220, 400),
    "questionable": (0, 4, 9, 14, 19, 24, 29, 34, 40, 45, 52, 59, 67, 75, 86, 98, 114, 136, 168, 228, 400, 700),
    "explicit": (0, 5, 11, 16, 22, 28, 34, 40, 47, 54, 63, 72, 82, 94, 108, 124, 145, 174, 216, 296, 500, 900),
}
"""Score at PERCENT, by rating: HakuBooru's `score_percentile_after_5m` between made-up ends."""

ORIGINALS = 16
"""So many prompts of a set have their picture drawn, for the first row of contact sheets."""

AWKWARD = ("alpha", "exif", "cmyk", "palette", "16bit", "truncated", "duplicate")

POST_COLUMNS = (
    *("id INTEGER NOT NULL PRIMARY KEY", "created_at VARCHAR(255) NOT NULL", "uploader_id INTEGER NOT NULL"),
    *("source VARCHAR(255) NOT NULL", "md5 VARCHAR(255)", "parent_id INTEGER", "has_children INTEGER NOT NULL"),
    *("is_deleted INTEGER NOT NULL", "is_banned INTEGER NOT NULL", "pixiv_id INTEGER"),
    *("has_active_children INTEGER NOT NULL", "bit_flags INTEGER NOT NULL", "has_large INTEGER NOT NULL"),
    *("has_visible_children INTEGER NOT NULL", "image_width INTEGER NOT NULL", "image_height INTEGER NOT NULL"),
    *("file_size INTEGER NOT NULL", "file_ext VARCHAR(255) NOT NULL", "rating INTEGER NOT NULL"),
    *("score INTEGER NOT NULL", "up_score INTEGER NOT NULL", "down_score INTEGER NOT NULL"),
    *("fav_count INTEGER NOT NULL", "file_url VARCHAR(255)", "large_file_url VARCHAR(255)"),
    *("preview_file_url VARCHAR(255)", "updated_at VARCHAR(255) NOT NULL"),
)
SCHEMA = (
    f"CREATE TABLE post ({', '.join(POST_COLUMNS)})",
    "CREATE TABLE tag (id INTEGER NOT NULL PRIMARY KEY, name VARCHAR(255) NOT NULL UNIQUE, "
    "type INTEGER NOT NULL, popularity INTEGER NOT NULL)",
    "CREATE TABLE posttagrelation (id INTEGER NOT NULL PRIMARY KEY, post_id INTEGER NOT NULL REFERENCES post (id), "
    "tag_id INTEGER NOT NULL REFERENCES tag (id))",
    "CREATE TABLE localpost (id INTEGER NOT NULL PRIMARY KEY, filepath VARCHAR(255) NOT NULL, "
    "latentpath VARCHAR(255), post_id INTEGER NOT NULL REFERENCES post (id))",
    "CREATE INDEX posttagrelation_post_id ON posttagrelation (post_id)",
    "CREATE INDEX posttagrelation_tag_id ON posttagrelation (tag_id)",
)


@dataclass(frozen=True)
class _Upload:
    """One post before it is written."""

    id: int
    scene: Scene
    size: tuple[int, int]
    suffix: str
    awkward: str = ""
    copy_of: str = ""

    @property
    def file_name(self) -> str:
        return f"{self.id}.{self.suffix}"


def write_booru(
    folder: Path,
    *,
    seed: int,
    count: int,
    prompts: int = 40,
    references: int = 200,
    tag_noise: Mapping[str, float] | None = None,
    awkward: bool = True,
    undamaged: float = 0.25,
    workers: int = 1,
) -> None:
    """Draw a mini-booru of `count` posts into `folder`, replacing what was there.

    `tag_noise` maps a tag to the share of posts whose uploader guessed: there the tag is set by a coin of the
    tag's own frequency, so a model trained on it knows the tag weakly. `undamaged` is the share of pictures without
    blur, noise and mosaic. Two calls with the same arguments write the same bytes. `prompts` are written twice: a set
    to sweep with, and a held-out one.
    """
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    (aside / "pictures").mkdir(parents=True)
    (aside / "reference").mkdir()
    uploads = _uploads(seed, count, awkward, undamaged)
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        jobs = pool.imap(partial(_save, folder=aside / "pictures"), uploads, 16)
        for _ in tqdm(jobs, "drawing posts", len(uploads), unit="picture", disable=None):
            pass
        scenes = [grammar.sample(seed, -1 - index, clean=True) for index in range(references)]
        for _ in pool.imap(partial(_reference, folder=aside / "reference"), enumerate(scenes), 16):
            pass
    names = [f"{number:04d}.png" for number in range(references)]
    (aside / "reference.txt").write_text("".join(f"{name}\n" for name in names))
    for upload in uploads:
        if upload.copy_of:
            shutil.copyfile(aside / "pictures" / upload.copy_of, aside / "pictures" / upload.file_name)
    _write_database(aside / "booru.sqlite", uploads, aside / "pictures", seed, tag_noise or {})
    (aside / "prompts").mkdir()
    for name in ("sweep", "heldout"):
        path = aside / "prompts" / f"{name}.jsonl"
        write_prompts(path, seed=random_seed(seed, name), count=prompts, originals=ORIGINALS)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def write_prompts(path: Path, *, seed: int, count: int, originals: int = 0) -> None:
    """Write prompts of clean scenes in the order of the Kohaku rules, with the tags they ask for and rule out.

    The first `originals` are drawn, as `sweep/000.png` … beside `sweep.jsonl`.
    """
    pictures = path.with_suffix("")
    if originals:
        pictures.mkdir(parents=True, exist_ok=True)
    made = []
    for index in range(count):
        scene = grammar.sample(seed, index, clean=True)
        made.append(prompt(scene, f"{index:03d}", seed=random_seed(seed, "picture", index) % 2**32))
        if index < originals:
            draw(scene).save(pictures / f"{made[-1].id}.png")
    PromptSet(path.stem, tuple(made)).write(path)


def prompt(scene: Scene, name: str, seed: int) -> Prompt:
    """The scene as a user would ask for it at its best."""
    tags = grammar.tags(scene)
    ratings = {"general": "safe", "sensitive": "sensitive", "questionable": "nsfw", "explicit": "explicit, nsfw"}
    asked = grammar.visible_tags(scene)
    words = [asked[0], *tags["character"], *tags["copyright"], *asked[1:]]
    text = ", ".join([*(word.replace("_", " ") for word in words), "newest", ratings[scene.rating], "masterpiece"])
    return Prompt(
        id=name,
        text=text,
        seed=seed,
        negative="worst quality, low quality",
        tags=(*asked, *tags["character"]),
        unwanted=grammar.ruled_out(scene),
        rating=scene.rating,
    )


def _uploads(seed: int, count: int, awkward: bool, undamaged: float) -> list[_Upload]:
    """Posts in order of upload, so that ids rise with time."""
    scenes = [grammar.sample(seed, index, undamaged=undamaged) for index in range(count)]
    order = sorted(range(count), key=lambda index: (scenes[index].year, index))
    uploads = []
    for place, index in enumerate(order):
        random = np.random.default_rng(random_seed(seed, "upload", index))
        side = int(random.choice((128, 144, 160), p=(0.6, 0.25, 0.15)))
        shape = random.random()
        size = (side, side)
        if shape < 0.1:
            size = (side * 3 // 4, side * 5 // 4)
        elif shape < 0.16:
            size = (side * 5 // 4, side * 3 // 4)
        suffix = str(random.choice(("png", "jpg", "webp"), p=(0.6, 0.25, 0.15)))
        uploads.append(_Upload(FIRST_ID + 7 * place, scenes[index], size, suffix))
    if awkward:
        for number, kind in enumerate(AWKWARD):
            place = (number + 1) * count // (len(AWKWARD) + 1)
            old = uploads[place]
            suffix = "jpg" if kind in ("exif", "cmyk", "truncated") else "png"
            twin = uploads[place - 1]
            if kind == "duplicate":
                uploads[place] = _Upload(old.id, twin.scene, twin.size, twin.suffix, kind, twin.file_name)
            else:
                uploads[place] = _Upload(old.id, old.scene, old.size, suffix, kind)
    return uploads


def _save(upload: _Upload, folder: Path) -> None:
    if upload.copy_of:
        return
    picture = draw(upload.scene, *upload.size)
    path = folder / upload.file_name
    if upload.awkward == "alpha":
        pixels = np.asarray(picture)
        alpha = np.where((pixels > 246).all(axis=2), 0, 255).astype(np.uint8)
        hidden = np.where(alpha[..., None] == 0, np.uint8(0), pixels)  # black under the hole: a trap for convert("RGB")
        Image.fromarray(np.dstack([hidden, alpha])).save(path)
    elif upload.awkward == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6  # shown turned a quarter clockwise, so stored turned the other way
        picture.transpose(Image.Transpose.ROTATE_90).save(path, quality=95, subsampling=0, exif=exif)
    elif upload.awkward == "cmyk":
        picture.convert("CMYK").save(path, quality=95, subsampling=0)
    elif upload.awkward == "palette":
        picture.quantize(64).save(path)
    elif upload.awkward == "16bit":
        grey = np.asarray(picture.convert("L"), dtype=np.uint16) * 257
        Image.fromarray(grey).save(path)
    elif upload.awkward == "truncated":
        picture.save(path, quality=95)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif upload.suffix == "webp":
        picture.save(path, lossless=True)
    elif upload.suffix == "jpg":
        picture.save(path, quality=95, subsampling=0)
    else:
        picture.save(path)


def _reference(item: tuple[int, Scene], folder: Path) -> None:
    draw(item[1]).save(folder / f"{item[0]:04d}.png")


def _write_database(
    path: Path, uploads: Sequence[_Upload], pictures: Path, seed: int, tag_noise: Mapping[str, float]
) -> None:
    listed = [_listed_tags(upload, seed, tag_noise) for upload in uploads]
    names: dict[tuple[str, str], int] = {}
    for tags in listed:
        for kind in TAG_TYPES:
            for name in tags[kind]:
                names[kind, name] = names.get((kind, name), 0) + 1
    ranked = sorted(names, key=lambda key: (-names[key], key))
    number = {key: place + 1 for place, key in enumerate(ranked)}
    with sqlite3.connect(path) as database:
        for statement in SCHEMA:
            database.execute(statement)
        rows = [(number[key], key[1], TAG_TYPES.index(key[0]), names[key]) for key in ranked]
        database.executemany("INSERT INTO tag VALUES (?, ?, ?, ?)", rows)
        posts = [_post_row(upload, pictures, seed) for upload in uploads]
        database.executemany(f"INSERT INTO post VALUES ({', '.join('?' * len(POST_COLUMNS))})", posts)
        pairs = [
            (upload.id, number[kind, name])
            for upload, tags in zip(uploads, listed, strict=True)
            for kind in TAG_TYPES
            for name in tags[kind]
        ]
        database.executemany("INSERT INTO posttagrelation (post_id, tag_id) VALUES (?, ?)", pairs)
        files = [(upload.file_name, upload.id) for upload in uploads]
        database.executemany("INSERT INTO localpost (filepath, post_id) VALUES (?, ?)", files)
    database.close()


def _listed_tags(upload: _Upload, seed: int, tag_noise: Mapping[str, float]) -> dict[str, tuple[str, ...]]:
    """The tags the uploader gives: the truth, but for guesses on the tags in `tag_noise`."""
    tags = grammar.tags(upload.scene)
    general = list(tags["general"])
    for tag, share in tag_noise.items():
        random = np.random.default_rng(random_seed(seed, "guess", upload.id, tag))
        if random.random() < share:
            guessed = random.random() < grammar.EXTRA_CHANCE[tag]
            general = [name for name in general if name != tag] + ([tag] if guessed else [])
    if upload.awkward == "16bit":
        colours = (*grammar.HAIR, *grammar.EYES, *grammar.DRESS)
        general = [name for name in general if name not in colours] + ["monochrome"]
    if upload.awkward == "alpha":
        general.append("transparent_background")
    return {**tags, "general": tuple(general)}


def _post_row(upload: _Upload, pictures: Path, seed: int) -> tuple[object, ...]:
    random = np.random.default_rng(random_seed(seed, "votes", upload.id))
    scene, path = upload.scene, pictures / upload.file_name
    liked = float(np.clip(scene.quality + random.normal(0, 0.015), 0, 1)) * 100
    score = round(float(np.interp(liked, PERCENT, SCORES[scene.rating])))
    down = int(random.integers(0, 3))
    favourites = max(0, round(score * random.uniform(0.8, 1.3)))
    month, day, hour = (int(random.integers(1, high)) for high in (13, 29, 24))
    time = f"{scene.year}-{month:02d}-{day:02d}T{hour:02d}:30:25.096-04:00"
    width, height = upload.size
    turned = (height, width) if upload.awkward == "exif" else (width, height)
    uploader = int(random.integers(1, 500))
    fixed = (None, 0, 0, 0, None, 0, 0, 0, 0)
    md5 = file_digest(path)[:32]
    counts = (RATINGS.index(scene.rating), score, score + down, -down, favourites)
    facts = (*turned, path.stat().st_size, upload.suffix, *counts)
    return (upload.id, time, uploader, "", md5, *fixed, *facts, None, None, None, time)
