"""A folder with every kind of trouble becomes a caption set and an honest report."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from ambergrade.captions.buckets import aspect_buckets
from ambergrade.captions.manifest import DUPLICATE, MISSING, SMALL, UNCAPTIONED, UNREADABLE, build
from ambergrade.captions.recipe import CaptionRecipe
from ambergrade.errors import BadInput
from ambergrade.nouns import CaptionSet, Post
from ambergrade.typed import settings

BUCKETS = aspect_buckets(128, 32, 96, 160)
CONF = Path(__file__).parents[2] / "conf" / "captions" / "kohaku-2024-01.yaml"
RECIPE = settings(CaptionRecipe, yaml.safe_load(CONF.read_text()))


def post(number: int, name: str, size: tuple[int, int] = (0, 0), rating: str = "general") -> Post:
    date = "2020-01-02T03:04:05.000-05:00"
    return Post(number, {"general": ("1girl", "solo")}, rating, date, 9, 1, *size, name)


def draw(path: Path, size: tuple[int, int], seed: int, orientation: int = 1) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise).save(path, exif=exif)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    draw(tmp_path / "square.png", (200, 200), 1)
    draw(tmp_path / "turned.jpg", (320, 180), 2, orientation=6)
    draw(tmp_path / "small.png", (120, 300), 3)
    draw(tmp_path / "tiny.png", (100, 100), 4)
    draw(tmp_path / "odd.png", (200, 200), 6)
    (tmp_path / "copy.png").write_bytes((tmp_path / "square.png").read_bytes())
    (tmp_path / "cut.png").write_bytes((tmp_path / "square.png").read_bytes()[:5000])
    return tmp_path


POSTS = [
    post(7, "copy.png"),
    post(1, "square.png", (400, 400)),
    post(2, "turned.jpg", (640, 360)),
    post(3, "small.png"),
    post(4, "tiny.png"),
    post(5, "cut.png"),
    post(6, "absent.png"),
    post(8, "odd.png", rating="unknown"),
]


def test_what_is_kept_and_why_the_rest_is_not(folder: Path) -> None:
    captions, report = build(POSTS, RECIPE, folder, BUCKETS)
    square, turned, small = captions.pictures
    assert (square.post_id, square.bucket, square.crop, square.original_size) == (1, (128, 128), (0, 0), (400, 400))
    assert square.sha256 == hashlib.sha256((folder / "square.png").read_bytes()).hexdigest()
    assert square.caption.text == "1girl, solo, recent, safe, good quality"
    # stored lying, shown standing: 180×320 -> 96×171, of which 160 stay
    assert (turned.bucket, turned.crop, turned.original_size) == ((96, 160), (0, 5), (360, 640))
    assert (small.post_id, small.bucket, small.original_size) == (3, (96, 160), (120, 300))
    assert report.dropped == {DUPLICATE: (7,), MISSING: (6,), UNREADABLE: (5,), SMALL: (4,), UNCAPTIONED: (8,)}
    assert report.counts[SMALL] == 1
    assert report.posts == report.kept + sum(report.counts.values()) == 8
    assert report.buckets == {"128x128": 1, "96x160": 2}
    assert "cut.png" in report.details[0]
    assert "left out, picture unreadable: 5" in report.text


def test_the_order_of_posts_does_not_matter_and_the_set_survives_a_file(folder: Path, tmp_path: Path) -> None:
    captions, _ = build(POSTS, RECIPE, folder, BUCKETS)
    again, _ = build(POSTS[::-1], RECIPE, folder, BUCKETS)
    assert again.digest == captions.digest
    captions.write(tmp_path / "set.jsonl")
    assert CaptionSet.read(tmp_path / "set.jsonl") == captions
    fewer, _ = build(POSTS[1:2], RECIPE, folder, BUCKETS)
    assert fewer.digest != captions.digest


def test_nothing_left_is_an_error(folder: Path) -> None:
    with pytest.raises(BadInput, match="No picture is left in the part 'train'"):
        build(POSTS[-2:], RECIPE, folder, BUCKETS)
    with pytest.raises(BadInput, match="No picture is left in the part 'heldout'"):
        build(POSTS[-2:], RECIPE, folder, BUCKETS, part="heldout")


def test_an_empty_held_out_part_is_called_so(folder: Path) -> None:
    with pytest.raises(BadInput, match=r"^No post is held out[\s\S]*data\.selection\.heldout_share"):
        build([], RECIPE, folder, BUCKETS, part="heldout")
