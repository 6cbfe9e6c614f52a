"""Bucket lists, the nearest shape, and how a picture is cut."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambergrade.captions.buckets import aspect_buckets, centre_corner, nearest_bucket
from ambergrade.errors import BadSetting
from ambergrade.pictures import covering_size

TINY = aspect_buckets(128, 32, 96, 160)
SDXL = aspect_buckets(1024, 64, 512, 2048)


def test_the_tiny_family_has_three() -> None:
    assert TINY == ((96, 160), (128, 128), (160, 96))


def test_sdxl_has_the_known_thirty_three() -> None:
    assert len(SDXL) == 33
    assert math.isclose(sum(w * h for w, h in SDXL) / 33 / 1024**2, 0.962, abs_tol=0.0005)  # the published mean area
    assert {(1024, 1024), (832, 1216), (1216, 832), (512, 2048)} <= set(SDXL)
    assert {(h, w) for w, h in SDXL} == set(SDXL)
    assert len({w / h for w, h in SDXL}) == 33


def test_no_bucket_is_an_error() -> None:
    with pytest.raises(BadSetting, match="No bucket"):
        aspect_buckets(64, 32, 96, 160)


sizes = st.tuples(st.integers(1, 6000), st.integers(1, 6000))


@given(sizes)
def test_nearest_is_nearest_by_log_ratio_and_symmetric(size: tuple[int, int]) -> None:
    def distance(bucket: tuple[int, int]) -> float:
        return abs(math.log(size[0] / size[1]) - math.log(bucket[0] / bucket[1]))

    chosen = nearest_bucket(size, SDXL)
    assert math.isclose(distance(chosen), min(map(distance, SDXL)), abs_tol=1e-12)
    turned = nearest_bucket((size[1], size[0]), SDXL)
    if size[0] != size[1] and sorted(map(distance, SDXL))[1] - distance(chosen) > 1e-9:
        assert turned == (chosen[1], chosen[0])


@given(sizes, st.sampled_from(TINY + SDXL))
def test_a_cut_covers_its_bucket_with_one_resize(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    corner = centre_corner(size, bucket)
    if corner is None:
        assert size[0] < bucket[0] or size[1] < bucket[1]
        return
    (width, height), (left, top) = covering_size(size, bucket), corner
    assert width >= bucket[0]
    assert height >= bucket[1]
    assert width == bucket[0] or height == bucket[1]
    assert width <= size[0]
    assert height <= size[1]
    assert 0 <= left <= width - bucket[0] - left <= left + 1
    assert 0 <= top <= height - bucket[1] - top <= top + 1
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    assert abs(width - size[0] * scale) <= 0.5 + 1e-9
    assert abs(height - size[1] * scale) <= 0.5 + 1e-9


def test_the_axis_is_right() -> None:
    # a tall picture in a less tall bucket loses top and bottom (a trainer in wide use records the other axis)
    assert centre_corner((1000, 2000), (832, 1216)) == (0, 224)


def test_exact_fit_is_left_alone() -> None:
    for size, bucket in itertools.product([(128, 128)], [(128, 128)]):
        assert (covering_size(size, bucket), centre_corner(size, bucket)) == (size, (0, 0))
