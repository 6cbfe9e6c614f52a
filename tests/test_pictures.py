"""Awkward specimens, each made here, and the pixels they must give."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from ambergrade import pictures
from ambergrade.errors import BadInput
from ambergrade.pictures import FORMATS, SUFFIXES, covering_size, cut, decode_bytes, open_picture

W, H = 24, 16
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def pixel(path: Path, at: tuple[int, int] = (0, 0)) -> tuple[int, ...]:
    picture = open_picture(path)
    assert picture.mode == "RGB"
    value = picture.getpixel(at)
    assert isinstance(value, tuple)
    return tuple(int(channel) for channel in value)


def near(found: tuple[int, ...], wanted: tuple[int, ...], within: int = 3) -> bool:
    return all(abs(a - b) <= within for a, b in zip(found, wanted, strict=True))


def test_plain(tmp_path: Path) -> None:
    Image.new("RGB", (W, H), (12, 34, 56)).save(tmp_path / "a.png")
    assert pixel(tmp_path / "a.png") == (12, 34, 56)
    Image.new("1", (W, H), 1).save(tmp_path / "b.png")
    assert pixel(tmp_path / "b.png") == WHITE
    Image.new("L", (W, H), 77).save(tmp_path / "l.png")
    assert pixel(tmp_path / "l.png") == (77, 77, 77)


@pytest.mark.parametrize("extension", ["png", "webp"])
def test_alpha_lies_on_white(tmp_path: Path, extension: str) -> None:
    image = Image.new("RGBA", (W, H), (255, 0, 255, 0))  # a hidden colour under full transparency
    image.paste((0, 0, 255, 128), (W // 2, 0, W, H))
    image.save(tmp_path / f"a.{extension}", lossless=True, exact=True)
    assert pixel(tmp_path / f"a.{extension}") == WHITE
    assert near(pixel(tmp_path / f"a.{extension}", (W - 1, 0)), (127, 127, 255), 1)


def test_grey_with_alpha(tmp_path: Path) -> None:
    Image.new("LA", (W, H), (0, 0)).save(tmp_path / "clear.png")
    assert pixel(tmp_path / "clear.png") == WHITE
    Image.new("LA", (W, H), (0, 255)).save(tmp_path / "black.png")
    assert pixel(tmp_path / "black.png") == (0, 0, 0)


def test_palette_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (W, H), 0)
    image.putpalette([*RED, *GREEN])
    image.paste(1, (W // 2, 0, W, H))
    image.save(tmp_path / "index.png", transparency=0)
    image.save(tmp_path / "table.png", transparency=bytes([0, 255]))
    image.save(tmp_path / "a.gif", transparency=0)
    image.save(tmp_path / "opaque.png")
    for name in ("index.png", "table.png", "a.gif"):
        assert pixel(tmp_path / name) == WHITE, name
        assert pixel(tmp_path / name, (W - 1, 0)) == GREEN, name
    assert pixel(tmp_path / "opaque.png") == RED


def test_a_transparent_colour_beside_rgb_and_grey(tmp_path: Path) -> None:
    Image.new("RGB", (W, H), RED).save(tmp_path / "rgb.png", transparency=RED)
    assert pixel(tmp_path / "rgb.png") == WHITE
    Image.new("L", (W, H), 9).save(tmp_path / "l.png", transparency=9)
    assert pixel(tmp_path / "l.png") == WHITE


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    upright = Image.new("RGB", (W, H), WHITE)
    upright.paste(RED, (0, 0, 8, 8))  # top left
    upright.paste(BLUE, (W - 8, H - 8, W, H))  # bottom right, so that mirrors differ from turns
    upright.paste(GREEN, (0, H - 8, 8, H))
    stored = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],  # shown turned 90° clockwise, so stored turned back
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }[orientation]
    image = upright
    for step in stored:
        image = image.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", quality=100, subsampling=0, exif=exif)
    path = tmp_path / "a.jpg"
    assert open_picture(path).size == (W, H)
    assert near(pixel(path, (3, 3)), RED)
    assert near(pixel(path, (W - 4, H - 4)), BLUE)
    assert near(pixel(path, (3, H - 4)), GREEN)


def test_cmyk(tmp_path: Path) -> None:
    for name, ink in {"cyan": (255, 0, 0, 0), "black": (0, 0, 0, 255), "paper": (0, 0, 0, 0)}.items():
        Image.new("CMYK", (W, H), ink).save(tmp_path / f"{name}.jpg", quality=100)
    assert near(pixel(tmp_path / "cyan.jpg"), (0, 255, 255))
    assert near(pixel(tmp_path / "black.jpg"), (0, 0, 0))
    assert near(pixel(tmp_path / "paper.jpg"), WHITE)


def test_sixteen_bits_keep_their_greys(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, W * H).round().astype(np.uint16).reshape(H, W)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    Image.fromarray(ramp).save(tmp_path / "a.tif")
    wanted = np.rint(ramp / 257).astype(np.uint8)
    for name in ("a.png", "a.tif"):
        assert np.array_equal(np.asarray(open_picture(tmp_path / name))[..., 1], wanted), name


def test_floats_are_refused(tmp_path: Path) -> None:
    Image.new("F", (W, H), 0.5).save(tmp_path / "a.tif")
    with pytest.raises(BadInput, match="floating-point"):
        open_picture(tmp_path / "a.tif")


def wide_gamut_profile() -> bytes:
    """Adobe RGB (1998) written by hand: its published primaries (D50-adapted), gamma 563/256."""
    import struct

    def fixed(number: float) -> bytes:
        return struct.pack(">i", round(number * 65536))

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(fixed, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, 563) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", 6) + b"Wide1\0" + b"\0" * 78
    tags = [
        (b"desc", text),
        (b"cprt", b"text\0\0\0\0none\0\0\0\0"),
        (b"wtpt", xyz(0.9642, 1.0, 0.8249)),
        (b"rXYZ", xyz(0.60974, 0.31111, 0.01947)),
        (b"gXYZ", xyz(0.20528, 0.62567, 0.06087)),
        (b"bXYZ", xyz(0.14919, 0.06322, 0.74457)),
        *((name, curve) for name in (b"rTRC", b"gTRC", b"bTRC")),
    ]
    table, data, offset = b"", b"", 128 + 4 + 12 * len(tags)
    for name, body in tags:
        body += b"\0" * (-len(body) % 4)
        table += name + struct.pack(">II", offset + len(data), len(body))
        data += body
    size = offset + len(data)
    head = struct.pack(">I4sI4s4s4s", size, b"\0\0\0\0", 0x02100000, b"mntr", b"RGB ", b"XYZ ") + b"\0" * 12
    head += b"acsp" + b"\0" * 28 + fixed(0.9642) + fixed(1.0) + fixed(0.8249)
    return head + b"\0" * (128 - len(head)) + struct.pack(">I", len(tags)) + table + data


def adobe_rgb_to_srgb(colour: tuple[int, int, int]) -> tuple[int, ...]:
    """Independent reference: the published matrices (both D50-adapted), clipped to sRGB's gamut."""
    to_xyz = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
    srgb = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
    linear = np.clip(np.linalg.solve(srgb, to_xyz @ (np.array(colour) / 255) ** (563 / 256)), 0, 1)
    shown = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return tuple(int(value) for value in np.rint(shown * 255))


@pytest.mark.parametrize("colour", [(120, 200, 80), (200, 60, 60), (128, 128, 128), (40, 90, 180)])
def test_icc_profiles_are_applied(tmp_path: Path, colour: tuple[int, int, int]) -> None:
    profile = wide_gamut_profile()
    Image.new("RGB", (W, H), colour).save(tmp_path / "a.png", icc_profile=profile)
    assert near(pixel(tmp_path / "a.png"), adobe_rgb_to_srgb(colour), 2)
    Image.new("RGBA", (W, H), (*colour, 255)).save(tmp_path / "alpha.png", icc_profile=profile)
    assert pixel(tmp_path / "alpha.png") == pixel(tmp_path / "a.png")


def test_an_srgb_profile_and_a_broken_one_change_nothing(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in {"srgb": srgb, "broken": b"nonsense"}.items():
        Image.new("RGB", (W, H), (10, 130, 250)).save(tmp_path / f"{name}.png", icc_profile=profile)
        assert near(pixel(tmp_path / f"{name}.png"), (10, 130, 250), 1)


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "gif"])
def test_truncated_files_are_refused(tmp_path: Path, extension: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, {"jpg": "jpeg"}.get(extension, extension))
    (tmp_path / f"a.{extension}").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(BadInput, match="cannot be read"):
        open_picture(tmp_path / f"a.{extension}")


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(BadInput, match="cannot be read"):
        open_picture(tmp_path / "a.png")
    with pytest.raises(BadInput, match="No picture"):
        open_picture(tmp_path / "absent.png")


@pytest.mark.parametrize("extension", ["gif", "webp", "png"])
def test_animations_give_their_first_frame(tmp_path: Path, extension: str) -> None:
    frames = [Image.new("RGB", (W, H), colour) for colour in (RED, GREEN, BLUE)]
    frames[0].save(tmp_path / f"a.{extension}", save_all=True, append_images=frames[1:], duration=50, lossless=True)
    assert pixel(tmp_path / f"a.{extension}") == RED


def test_cut_is_one_resize_and_a_crop() -> None:
    image = Image.new("RGB", (400, 200), RED)
    image.paste(GREEN, (100, 0, 300, 200))
    assert covering_size(image.size, (128, 128)) == (256, 128)
    pixels = np.asarray(cut(image, (128, 128), (64, 0), "a"))
    assert pixels.shape == (128, 128, 3)
    assert (pixels[:, 8:-8] == GREEN).all()
    exact = np.random.default_rng(1).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(cut(Image.fromarray(exact), (160, 96), (0, 0), "a")), exact)
    for corner in ((129, 0), (0, 1), (-1, 0)):
        with pytest.raises(BadInput, match=r"post 5: the crop .* leaves the picture"):
            cut(image, (128, 128), corner, "post 5")


def damaged_exif() -> dict[str, bytes]:
    """EXIF with Orientation 6 and a number field that holds text, one cut short, one that is no TIFF."""
    text = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"
    text += b"\x01\x1a\0\x02\0\0\0\x04abc\0" + bytes(4)  # XResolution as text
    return {"text": text, "cut": text[:20], "no TIFF": b"Exif\0\0no tiff here", "empty": b"Exif\0\0"}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("fault", ["text", "cut", "no TIFF", "empty"])
def test_damaged_exif_counts_as_none_and_a_readable_turn_as_itself(kind: str, fault: str) -> None:
    file = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    Image.new("RGB", (W, H), RED).save(file, kind, exif=damaged_exif()[fault], **options)
    assert decode_bytes(file.getvalue(), "a").size == ((H, W) if fault == "text" else (W, H))


@pytest.mark.parametrize("kind", ["TIFF", "AVIF"])
def test_turns_that_the_format_itself_tells(kind: str) -> None:
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    picture = Image.new("RGB", (W, H), WHITE)
    picture.paste(RED, (0, 0, 8, 8))  # turned clockwise, the top left corner is the top right one
    picture.save(file, kind, exif=exif)
    shown = decode_bytes(file.getvalue(), "a")
    assert shown.size == (H, W)
    assert near(tuple(shown.getpixel((H - 3, 3))), RED, 40)  # type: ignore[arg-type]


def small(kind: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (W, H), RED).save(file, kind)
    return file.getvalue()


SMALL = {kind: small(kind) for kind in FORMATS if kind != "PSD"}  # which Pillow does not write


@pytest.mark.parametrize("kind", SMALL)
def test_the_bound_on_pixels_holds_for_every_format(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_PIXELS", W * H - 1)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("memory was taken for the pixels"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("memory was taken for the pixels"))
    with pytest.raises(BadInput, match=f"a is {W}x{H}; pictures of up to"):
        decode_bytes(SMALL[kind], "a")


def test_a_picture_of_150_megapixels_is_refused(tmp_path: Path) -> None:
    Image.new("1", (15_000, 10_000)).save(tmp_path / "a.png")
    with pytest.raises(BadInput, match="15000x10000"):
        open_picture(tmp_path / "a.png")


def test_odd_shapes_and_names(tmp_path: Path) -> None:
    for size in ((1, 1), (20_000, 1), (1, 20_000)):
        Image.new("RGB", size, RED).save(tmp_path / "a.png")
        assert open_picture(tmp_path / "a.png").size == size
    for name in ("x" * 300, "a\0b"):
        with pytest.raises(BadInput, match="cannot be read"):
            open_picture(tmp_path / name)
    with pytest.raises(BadInput, match="cannot be read"):
        open_picture(tmp_path)
    assert {suffix for suffix in SUFFIXES if Image.registered_extensions()[suffix] not in FORMATS} == set()
