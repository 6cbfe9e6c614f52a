"""Damaged pictures of every format: a picture comes out or our own error, and nothing else."""

import io
import random
import struct
import warnings
import zlib
from functools import cache

import numpy as np
import pytest
from PIL import Image

from ambergrade.captions.lint import examined
from ambergrade.captions.settings import Limits
from ambergrade.errors import BadInput
from ambergrade.pictures import FORMATS, MOST_PIXELS, decode_bytes

LOSSLESS = {"WEBP": {"lossless": True, "exact": True}}


def photoshop(pixels: np.ndarray) -> bytes:
    """An uncompressed PSD without layers: Pillow reads the format and does not write it."""
    height, width, channels = pixels.shape
    head = struct.pack(">4sH6xHIIHH", b"8BPS", 1, channels, height, width, 8, 3)
    return head + bytes(12) + struct.pack(">H", 0) + np.ascontiguousarray(pixels.transpose(2, 0, 1)).tobytes()


@cache
def sound(kind: str) -> tuple[bytes, ...]:
    """A few small files of a format: colours, greys, alpha, several frames, EXIF and a profile where it has them."""
    noise = np.random.default_rng(3).integers(0, 256, (20, 36, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112], exif[0x011A], exif[0x0128], exif[0x010E] = 6, 72.0, 2, "a drawing"
    made = [photoshop(noise)] if kind == "PSD" else []
    for mode in ("RGB", "RGBA", "L", "P", "CMYK", "I;16"):
        picture = Image.fromarray(noise).convert("L" if mode == "I;16" else mode)
        if mode == "I;16":
            picture = Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
        animated = {"save_all": True, "append_images": [picture.rotate(90)]} if kind in ("GIF", "WEBP", "AVIF") else {}
        about = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}  # Pillow 13 crashes at writing it as AVIF
        for options in ({}, {**about, **animated, **LOSSLESS.get(kind, {})}):
            file = io.BytesIO()
            try:
                picture.save(file, kind, **options)
            except (OSError, ValueError, KeyError):
                continue  # a mode that the format does not have
            made.append(file.getvalue())
    return tuple(dict.fromkeys(made))


def mutated(data: bytes, draw: random.Random) -> bytes:
    """The bytes with one to a few faults: flips, numbers set to extremes, cuts, gaps, repeats, swapped stretches."""
    damaged = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 4, 12))):
        place = int(len(damaged) * draw.random() ** draw.choice((1, 3)))  # headers more often
        fault = draw.randrange(6)
        if fault == 0 and damaged:
            damaged[place % len(damaged)] ^= 1 << draw.randrange(8)
        elif fault == 1:
            damaged[place : place + 4] = draw.choice((b"\xff\xff\xff\xff", bytes(4), b"\0\0\0\x7f", b"\x7f\0\0\0"))
        elif fault == 2:
            del damaged[place:]
        elif fault == 3:
            del damaged[place : place + draw.randrange(1, 9)]
        elif fault == 4:
            damaged[place:place] = damaged[place : place + draw.randrange(1, 40)]
        else:
            damaged[place : place + 8] = draw.randbytes(8)
    sealed = draw.random() < 0.7  # with right checksums, or PNG's decoder would look at none of it
    return resealed(bytes(damaged)) if sealed and damaged.startswith(b"\x89PNG") else bytes(damaged)


def resealed(png: bytes) -> bytes:
    """A PNG's chunks with checksums that fit them."""
    made, place = png[:8], 8
    while place + 12 <= len(png):
        length = min(int.from_bytes(png[place : place + 4], "big"), len(png) - place - 12)
        chunk = png[place + 4 : place + 8 + length]
        made += png[place : place + 4] + chunk + struct.pack(">I", zlib.crc32(chunk))
        place += 12 + length
    return made + png[place:]


def survive(kind: str, count: int) -> tuple[int, int]:
    """(pictures read, files refused); anything else that comes out is a failure."""
    read = refused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(count):
            draw = random.Random(f"{kind} {number}")
            data = mutated(draw.choice(sound(kind)), draw)
            try:
                picture = decode_bytes(data, "x")
                assert picture.mode == "RGB"
                assert picture.width * picture.height <= MOST_PIXELS
                read += 1
                usable = True
            except BadInput:
                refused += 1
                usable = False
            assert bool(examined(data, "x", Limits()).thumbnail) == usable, number
    return read, refused


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_give_a_picture_or_our_own_error(kind: str) -> None:
    assert all(decode_bytes(data, "x").mode == "RGB" for data in sound(kind))
    read, refused = survive(kind, 400)
    assert read + refused == 400
    assert min(read, refused) > 10  # the faults reach the decoder, and some are harmless
