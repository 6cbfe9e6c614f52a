"""Opens any picture file as upright 8-bit sRGB, and cuts it to a size. The one door through which files are decoded."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from ambergrade.errors import BadInput

Size = tuple[int, int]
"""(width, height), pixels."""
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF", "JPEG2000"),
    *("PPM", "QOI", "SGI", "DDS", "PSD", "PCX", "DIB", "TGA"),
)
"""Pillow's names. Those that start other programs (EPS, WMF) or hold a picture of another size inside (ICO) are not."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".avif", ".bmp", ".tif", ".tiff")
"""Suffixes of the files that count as pictures in a folder without a database, lower case."""
MOST_PIXELS = 89_478_485
"""268 MB as RGB: from here on Pillow itself warns of decompression bombs."""
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF's Orientation to what makes the picture upright (Pillow turns counter-clockwise)."""
WHITE = (255, 255, 255, 255)
SRGB = ImageCms.createProfile("sRGB")
DECODER_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, BufferError, EOFError, LookupError, MemoryError, NameError),
    *(OSError, RuntimeError, SyntaxError, TypeError, ValueError, Warning, struct.error, zlib.error),
    *(Image.DecompressionBombError, ImageCms.PyCMSError),
)
"""What decoders were seen to raise at damaged bytes, and their families."""


def open_picture(path: Path) -> Image.Image:
    """Return a picture as it is meant to be seen: mode RGB, upright, in sRGB, on white where transparent.

    Turned as EXIF says (damaged EXIF counts as none); colours brought to sRGB by an embedded ICC profile (a broken
    profile counts as none, as in browsers); 16-bit grey scaled to 8 bits; the first frame of an animation.

    Raises:
        BadInput: no such file, not a picture, truncated, too large, or of a kind that has no agreed sRGB form.
    """
    try:
        with path.open("rb") as file:
            return decode(file, str(path))
    except FileNotFoundError:
        raise BadInput(f"No picture at {path}.") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        raise BadInput(f"{path} cannot be read as a picture: {error}.") from error


def read_rgb(path: Path) -> npt.NDArray[np.uint8]:
    """Return `open_picture` as (H, W, 3) uint8."""
    return np.asarray(open_picture(path))


def decode_bytes(data: bytes, name: str) -> Image.Image:
    """Do as `open_picture` with a file's bytes; `name` is what it is called in complaints."""
    return decode(io.BytesIO(data), name)


def decode(file: IO[bytes], name: str) -> Image.Image:
    """Do as `open_picture` with an open file; `name` is what it is called in complaints."""
    with opened(file, name) as stored:
        return upright(stored, name)


@contextmanager
def opened(file: IO[bytes], name: str) -> Iterator[Image.Image]:
    """Yield a file's picture decoded but otherwise as it is stored.

    Whatever a decoder raises, here or in the body of the `with`, comes out as BadInput naming the file. The size is
    looked at before memory is taken for it.
    """
    try:
        with Image.open(file, formats=FORMATS) as stored:
            if stored.width * stored.height > MOST_PIXELS:
                raise BadInput(
                    f"{name} is {stored.width}x{stored.height}; pictures of up to {MOST_PIXELS:,} pixels are read.\n"
                    "Store it smaller."
                )
            stored.load()
            yield stored
    except UnidentifiedImageError:
        raise BadInput(f"{name} cannot be read as a picture: it is none of {', '.join(FORMATS)}.") from None
    except DECODER_ERRORS as error:
        raise BadInput(f"{name} cannot be read as a picture: {str(error)[:200] or type(error).__name__}.") from error


def upright(stored: Image.Image, name: str) -> Image.Image:
    """Return what `opened` yields as `open_picture` does."""
    profile = stored.info.get("icc_profile")
    turn = TURNS.get(orientation(stored))
    picture = stored.transpose(turn) if turn is not None else stored
    return _on_white(_eight_bit(picture, name), profile)


def orientation(stored: Image.Image) -> int:
    """Return EXIF's Orientation, 1 (as stored) to 8; 1 where EXIF is absent, damaged or says something else."""
    try:
        told = stored.getexif().get(ExifTags.Base.Orientation)
    except DECODER_ERRORS:
        return 1
    return told if isinstance(told, int) and told in TURNS else 1


def profile_name(stored: Image.Image) -> str:
    """Return the description of the embedded ICC profile; "" without one."""
    icc = stored.info.get("icc_profile")
    if not icc:
        return ""
    try:
        return ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(icc))).strip() or "unnamed profile"
    except DECODER_ERRORS:
        return "broken profile, not used"


def covering_size(size: Size, target: Size) -> Size:
    """Return the size, of the shape of `size`, that just covers `target`, by whole numbers, half up.

    >>> covering_size((1000, 2000), (832, 1216))
    (832, 1664)
    """
    (width, height), (target_width, target_height) = size, target
    if width * target_height >= height * target_width:  # wider in shape: the heights meet
        return max(target_width, (2 * width * target_height + height) // (2 * height)), target_height
    return target_width, max(target_height, (2 * height * target_width + width) // (2 * width))


def cut(picture: Image.Image, target: Size, corner: Size, name: str) -> Image.Image:
    """Return a picture of the size `target`: one Lanczos resize that just covers it, then a crop from `corner`.

    `corner` is (left, top) in resized pixels. Raises BadInput, with `name`, where the crop would leave the picture.
    """
    (width, height), (left, top) = target, corner
    size = covering_size(picture.size, target)
    if min(corner) < 0 or left + width > size[0] or top + height > size[1]:
        raise BadInput(
            f"{name}: the crop at {corner} leaves the picture, which is {size[0]}x{size[1]} px when resized to cover "
            f"{width}x{height}.\nThe file has other proportions than the caption set says; build the caption set again."
        )
    resized = picture.resize(size, Image.Resampling.LANCZOS) if size != picture.size else picture
    return resized.crop((left, top, left + width, top + height))


def _eight_bit(picture: Image.Image, name: str) -> Image.Image:
    """16-bit grey to 8 bits (`convert` would saturate it to white); other modes as they are."""
    if picture.mode == "F":
        raise BadInput(f"{name} holds floating-point pixels, whose white is not defined. Convert it to 8 bits.")
    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture
    values = np.asarray(picture)
    if values.min() < 0 or values.max() > 65535:
        raise BadInput(f"{name} holds grey values outside 0–65535. Convert it to 8 bits.")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def _on_white(picture: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB in sRGB. Alpha hides in many modes: RGBA, LA, PA, and a `transparency` beside L, RGB or P."""
    if not (picture.has_transparency_data or picture.mode in ("La", "RGBa")):
        return _in_srgb(picture.convert("RGB") if picture.mode in ("1", "P", "YCbCr", "HSV") else picture, profile)
    grey = picture.mode in ("L", "LA", "La")
    rgba = picture.convert("RGBA")
    colours = _in_srgb(rgba.convert("L") if grey else rgba.convert("RGB"), profile)
    colours.putalpha(rgba.getchannel("A"))
    return Image.alpha_composite(Image.new("RGBA", colours.size, WHITE), colours).convert("RGB")


def _in_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(picture, source, SRGB, outputMode="RGB")
        except DECODER_ERRORS:
            converted = None
        if converted is not None:
            return converted
    return picture.convert("RGB")
