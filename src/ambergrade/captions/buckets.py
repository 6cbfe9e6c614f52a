"""Aspect buckets: the few sizes that pictures are trained at, chosen by shape. Sizes are (width, height) in pixels."""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd

from ambergrade.errors import BadSetting
from ambergrade.pictures import Size, covering_size


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


def centre_corner(size: Size, bucket: Size) -> Size | None:
    """Return (left, top) of the centre crop, in pixels of the picture resized to cover the bucket.

    It is SDXL's second micro-condition. None for a picture that would have to be enlarged.

    >>> centre_corner((1000, 2000), (832, 1216))
    (0, 224)
    """
    if size[0] < bucket[0] or size[1] < bucket[1]:
        return None
    width, height = covering_size(size, bucket)
    return (width - bucket[0]) // 2, (height - bucket[1]) // 2


def _reduced(size: Size) -> tuple[int, int]:
    divisor = gcd(*size)
    return size[0] // divisor, size[1] // divisor
