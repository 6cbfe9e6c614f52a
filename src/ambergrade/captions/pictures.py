"""Open any picture file as upright 8-bit sRGB, and cut it to a bucket."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from ambergrade.captions.buckets import placement
from ambergrade.errors import BadInput

WHITE = (255, 255, 255, 255)
SRGB = ImageCms.createProfile("sRGB")


def open_picture(path: Path) -> Image.Image:
    """A picture as it is meant to be seen: mode RGB, upright, in sRGB, on white where transparent.

    Rotated as EXIF says; colours brought to sRGB by an embedded ICC profile (a broken profile counts as
    none, as in browsers); 16-bit grey scaled to 8 bits; the first frame of an animation.

    Raises:
        BadInput: no such file, not a picture, truncated, or of a kind that has no agreed sRGB form.
    """
    try:
        with path.open("rb") as file:
            return decode(file, str(path))
    except FileNotFoundError:
        raise BadInput(f"No picture at {path}.") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read as a picture: {error}.") from error


def decode_bytes(data: bytes, name: str) -> Image.Image:
    """`open_picture` of a file's bytes, `name` being what it is called in complaints."""
    return decode(io.BytesIO(data), name)


def decode(file: IO[bytes], name: str) -> Image.Image:
    """`open_picture` of an open file, `name` being what it is called in complaints."""
    try:
        with Image.open(file) as stored:
            stored.load()
            profile = stored.info.get("icc_profile")
            picture = _eight_bit(ImageOps.exif_transpose(stored), name)
            return _on_white(picture, profile)
    except UnidentifiedImageError:
        raise BadInput(f"{name} cannot be read as a picture: its format is not known.") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"{name} cannot be read as a picture: {error}.") from error


def cut(path: Path, bucket: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """The pixels a model is trained on: (height, width, 3) uint8 of a bucket given as (width, height).

    One Lanczos resize straight from the original, then the centre crop of `buckets.placement`.

    Raises:
        BadInput: unreadable, or smaller than the bucket.
    """
    picture = open_picture(path)
    place = placement(picture.size, bucket)
    if place is None:
        raise BadInput(f"{path} is {picture.width}×{picture.height}, smaller than its bucket {bucket[0]}×{bucket[1]}.")
    (left, top), (width, height) = place.crop, bucket
    resized = picture.resize(place.resized, Image.Resampling.LANCZOS)
    return np.array(resized.crop((left, top, left + width, top + height)))


def _eight_bit(picture: Image.Image, name: str) -> Image.Image:
    """16-bit grey to 8 bits (`convert` would saturate it to white); other modes as they are."""
    if picture.mode == "F":
        raise BadInput(f"{name} holds floating-point pixels, whose white is not defined. Convert it to 8 bits.")
    if picture.mode != "I" and not picture.mode.startswith("I;16"):
        return picture
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise BadInput(f"{name} holds grey values outside 0–65535. Convert it to 8 bits.")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


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
        except (ImageCms.PyCMSError, OSError):
            converted = None
        if converted is not None:
            return converted
    return picture.convert("RGB")
