"""Aspect buckets: the few sizes that pictures are trained at, chosen by shape. Sizes are (width, height) in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from ambergrade.errors import BadSetting

Size = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """How a picture is cut to a bucket: one resize, then a centre crop."""

    resized: Size
    """Both sides are at least the bucket's, and one is equal."""
    crop: Size
    """(left, top) cut away, in resized pixels: SDXL's second micro-condition."""


def aspect_buckets(resolution: int, step: int, min_side: int, max_side: int) -> tuple[Size, ...]:
    """For each allowed side the longest other side whose area is ≤ resolution², both ways, widest area per aspect.

    >>> aspect_buckets(128, 32, 96, 160)
    ((96, 160), (128, 128), (160, 96))

    Raises:
        BadSetting: no bucket fits.
    """
    found: dict[tuple[int, int], Size] = {}
    for width in range(-(-min_side // step) * step, max_side + 1, step):
        height = min(resolution**2 // width, max_side) // step * step
        if height >= min_side:
            for size in ((width, height), (height, width)):
                aspect = _reduced(size)
                found[aspect] = max(size, found.get(aspect, size))
    if not found:
        raise BadSetting(
            f"No bucket of area ≤ {resolution}² has sides of {min_side}–{max_side} in steps of {step}.\n"
            "Raise resolution or lower min_side."
        )
    return tuple(sorted(found.values()))


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket of the most similar shape, by |log ratio of aspects|; of equals the larger, then the wider.

    Symmetric in portrait and landscape, and blind to the picture's size.

    >>> nearest_bucket((1000, 1700), aspect_buckets(128, 32, 96, 160))
    (96, 160)
    """

    def stretch(bucket: Size) -> float:
        # max(r, 1/r) orders as |log r| does, and is exact division: the same on every machine
        a, b = size[0] * bucket[1], size[1] * bucket[0]
        return max(a, b) / min(a, b)

    return min(buckets, key=lambda bucket: (stretch(bucket), -bucket[0] * bucket[1], -bucket[0]))


def placement(size: Size, bucket: Size) -> Placement | None:
    """How a picture of `size` is cut to `bucket`; None if it would have to be enlarged.

    >>> placement((1000, 2000), (832, 1216))
    Placement(resized=(832, 1664), crop=(0, 224))
    """
    (width, height), (bucket_width, bucket_height) = size, bucket
    if width < bucket_width or height < bucket_height:
        return None
    if width * bucket_height >= height * bucket_width:  # wider in shape: the heights meet
        resized = (max(bucket_width, (2 * width * bucket_height + height) // (2 * height)), bucket_height)
    else:
        resized = (bucket_width, max(bucket_height, (2 * height * bucket_width + width) // (2 * width)))
    return Placement(resized, ((resized[0] - bucket_width) // 2, (resized[1] - bucket_height) // 2))


def _reduced(size: Size) -> tuple[int, int]:
    divisor = gcd(*size)
    return size[0] // divisor, size[1] // divisor
