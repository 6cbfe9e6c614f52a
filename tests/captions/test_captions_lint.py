"""Every specimen that lint knows is found and named; sound pictures are left in peace; copies are matched."""

import io
import json
from html import escape
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw

from ambergrade.captions.files import PictureFiles
from ambergrade.captions.lint import RULES, folder_posts, jpeg_quality, lint
from ambergrade.captions.lint_report import write_report
from ambergrade.captions.repeats import nearly_alike
from ambergrade.captions.settings import Limits
from ambergrade.nouns import Post

LANCZOS = Image.Resampling.LANCZOS


def drawing(seed: int, side: int = 256) -> Image.Image:
    """Ellipses and lines, drawn four times as large and brought down by one resample: sharp and without a grid."""
    draw, picture = np.random.default_rng(seed), Image.new("RGB", (4 * side, 4 * side), "white")
    pen = ImageDraw.Draw(picture)
    for _ in range(24):
        x, y, w, h = (int(v) for v in draw.integers(0, 3 * side, 4))
        colour = tuple(int(v) for v in draw.integers(0, 256, 3))
        pen.ellipse((x, y, x + 20 + w // 2, y + 20 + h // 2), fill=colour, outline="black", width=6)
    return picture.resize((side, side), LANCZOS)


def post(number: int, name: str, **changed: object) -> Post:
    values = {"tags": {"general": ("1girl",)}, "rating": "general", "width": 0, "height": 0, **changed}
    return Post(id=number, created_at="", score=0, fav_count=0, file_name=name, **values)  # type: ignore[arg-type]


def grey_gamma_profile() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()


def write_specimens(folder: Path) -> dict[str, str]:
    """File name to the one rule that it breaks."""
    base = drawing(1)
    rgba = np.dstack(
        [np.asarray(drawing(2)), np.where(np.arange(256) < 128, 0, 255).astype(np.uint8)[None].repeat(256, 0)]
    )
    Image.fromarray(rgba).save(folder / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    drawing(3).save(folder / "exif.jpg", quality=97, subsampling=0, exif=exif)
    drawing(4).save(folder / "icc.png", icc_profile=grey_gamma_profile())
    drawing(5).convert("CMYK").save(folder / "cmyk.jpg", quality=97, subsampling=0)
    Image.fromarray(np.asarray(drawing(6).convert("L"), np.uint16) * 257).save(folder / "16-bit.png")
    drawing(7).save(folder / "truncated.png")
    whole = (folder / "truncated.png").read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "unreadable.png").write_bytes(b"not a picture" * 50)
    drawing(8).save(folder / "animated.gif", save_all=True, append_images=[drawing(9)])
    drawing(10).save(folder / "jpeg.jpg", quality=60, subsampling=0)
    drawing(11).save(folder / "chroma.jpg", quality=97, subsampling=2)
    drawing(12).save(folder / "webp.webp", quality=97)
    stored = io.BytesIO()
    drawing(13).save(stored, "JPEG", quality=25)
    Image.open(stored).save(folder / "grid.png")  # damage that the format does not tell
    drawing(14, 128).resize((256, 256), Image.Resampling.BICUBIC).save(folder / "upscaled.png")
    drawing(15, 64).resize((256, 256), Image.Resampling.NEAREST).save(folder / "upscaled2.png")
    base.save(folder / "sound.png")
    (folder / "duplicate.png").write_bytes((folder / "sound.png").read_bytes())
    drawing(16).save(folder / "lossless.webp", lossless=True)
    base.resize((200, 200), LANCZOS).save(folder / "near-duplicate.png")
    rules = {path.name: path.stem.rstrip("2") for path in folder.iterdir()}
    return {**rules, "sound.png": "", "lossless.webp": ""}


@pytest.fixture(scope="module")
def specimens(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("specimens")
    return folder, write_specimens(folder)


def test_each_specimen_is_named_and_sound_ones_are_not(specimens: tuple[Path, dict[str, str]]) -> None:
    folder, wanted = specimens
    names = ["sound.png", *sorted(set(wanted) - {"sound.png"})]
    posts = [post(n, name) for n, name in enumerate(names)]
    found = lint([*posts, post(900, "absent.png")], PictureFiles(folder))
    for number, name in enumerate(names):
        rules = {finding.rule for finding in found.findings if finding.post_id == number}
        expected = {wanted[name]} - {""}
        extra = {"grid", "chroma"} if wanted[name] in ("jpeg", "animated", "chroma", "webp", "grid") else set()
        assert expected <= rules <= expected | extra, name
    assert [f.post_id for f in found.findings if f.rule == "missing"] == [900]
    by_name = {name: number for number, name in enumerate(names)}
    wrong = ("truncated.png", "unreadable.png", "duplicate.png", "near-duplicate.png")
    assert found.left_out == [*map(str, sorted(by_name[name] for name in wrong)), "900"]
    told = {f.rule: f.detail for f in found.findings}
    assert "quality 60" in told["jpeg"]
    assert "orientation 6" in told["exif"]
    assert "2 frames" in told["animated"]
    assert "50%" in told["alpha"]
    assert f"of post {by_name['sound.png']}" in told["near-duplicate"]


def test_what_the_database_says_wrongly(specimens: tuple[Path, dict[str, str]]) -> None:
    folder, _ = specimens
    posts = [
        post(1, "sound.png", width=256, height=256),
        post(2, "lossless.webp", width=512, height=512),
        post(3, "alpha.png", tags={}, rating="unknown"),
    ]
    found = lint(posts, PictureFiles(folder))
    assert {(f.post_id, f.rule) for f in found.findings} == {(2, "size"), (3, "alpha"), (3, "tagless"), (3, "rating")}


def test_several_processes_find_the_same(specimens: tuple[Path, dict[str, str]]) -> None:
    folder, wanted = specimens
    posts = [post(n, name) for n, name in enumerate(sorted(wanted))]
    assert lint(posts, PictureFiles(folder), workers=2) == lint(posts, PictureFiles(folder))


def test_the_report_lists_everything(specimens: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, wanted = specimens
    files = PictureFiles(folder)
    found = lint([post(n, name) for n, name in enumerate(sorted(wanted))], files)
    write_report(found, files, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "findings.jsonl").read_text().splitlines()]
    assert [(row["id"], row["rule"]) for row in rows] == [(f.post_id, f.rule) for f in found.findings]
    assert (tmp_path / "leave_out.txt").read_text().split() == found.left_out
    html = (tmp_path / "lint.html").read_text()
    assert all(f"id='{rule}'" in html for rule in found.counts)
    assert html.count("data:image/png;base64,") == sum(f.severity != "unusable" for f in found.findings)
    assert all(escape(RULES[rule][1]) in html for rule in ("alpha", "grid"))


def test_odd_and_damaged_pictures_do_not_end_a_lint(tmp_path: Path) -> None:
    for n, size in enumerate([(1, 1), (20_000, 1), (1, 20_000), (3, 2), (31, 33)]):
        Image.new("RGB", size, (n, 9, 99)).save(tmp_path / f"{n}.png")
    frames = [drawing(n, 32) for n in (1, 2)]
    for kind in ("gif", "avif", "webp", "png", "tiff"):
        frames[0].save(tmp_path / f"frames.{kind}", save_all=True, append_images=frames[1:])
        whole = (tmp_path / f"frames.{kind}").read_bytes()
        for percent in (30, 60, 90, 99):
            (tmp_path / f"{percent}.{kind}").write_bytes(whole[: len(whole) * percent // 100])
    posts = folder_posts(tmp_path)
    found = lint(posts, PictureFiles(tmp_path), by_name=True)
    assert found.posts == len(posts) == 30
    assert found.pictures + sum(f.severity == "unusable" for f in found.findings) == 30
    assert "30.gif" in found.left_out


def test_damaged_exif_is_no_fault(tmp_path: Path) -> None:
    text = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x1a\0\x02\0\0\0\x04abc\0" + bytes(4)  # XResolution as text
    for name, exif in (("text.png", text), ("cut.png", text[:18]), ("none.png", b"Exif\0\0no tiff")):
        drawing(sum(map(ord, name))).save(tmp_path / name, exif=exif)
    assert not lint(folder_posts(tmp_path), PictureFiles(tmp_path)).findings


def test_a_folder_without_a_database_is_told_by_file_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "deep/a.png", "c.png"):
        drawing(1).save(tmp_path / name)
    (tmp_path / "a.png").write_bytes(b"no picture")
    found = lint(folder_posts(tmp_path), PictureFiles(tmp_path), by_name=True)
    assert found.left_out == ["a.png", "c.png", "deep/a.png"]
    assert {f.file: f.detail for f in found.findings if f.rule == "duplicate"} == dict.fromkeys(
        ("c.png", "deep/a.png"), "of b.png"
    )
    assert "c.png, deep/a.png" in found.text
    write_report(found, PictureFiles(tmp_path), tmp_path / "out")
    assert (tmp_path / "out" / "leave_out.txt").read_text() == "a.png\nc.png\ndeep/a.png\n"
    assert "id" not in json.loads((tmp_path / "out" / "findings.jsonl").read_text().split("\n")[0])


@pytest.mark.parametrize("quality", [30, 50, 75, 85, 92, 100])
def test_jpeg_quality_is_read_from_the_tables(quality: int) -> None:
    file = io.BytesIO()
    drawing(20, 32).save(file, "JPEG", quality=quality)
    assert abs(jpeg_quality(Image.open(file).quantization) - quality) <= 1  # type: ignore[attr-defined]


def test_stored_again_and_shrunk_copies_are_matched_and_others_never() -> None:
    pictures = [drawing(100 + n) for n in range(100)]

    def thumbnail(picture: Image.Image) -> np.ndarray:
        return np.asarray(picture.resize((16, 16), Image.Resampling.BOX)).reshape(-1)

    def stored(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.resize((200, 200), Image.Resampling.BICUBIC).save(file, "JPEG", quality=80)
        return Image.open(file).convert("RGB")

    copies = [stored(picture) for picture in pictures]
    shapes = np.array([picture.size for picture in pictures + copies], float)
    found = nearly_alike(np.array([thumbnail(p) for p in pictures + copies]), shapes, Limits().alike)
    assert {(first, later) for first, later, _ in found} == {(n, n + 100) for n in range(100)}
    shapes[100:] = (96, 48)  # another shape: cut, not copied
    assert not nearly_alike(np.array([thumbnail(p) for p in pictures + copies]), shapes, Limits().alike)
