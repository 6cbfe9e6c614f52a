"""Stateless sampling: what a step sees depends on (seed, step), and everything is seen."""

from collections import Counter

import pytest

from ambergrade.nouns import Caption
from ambergrade.train.batches import Batches, caption_tags

SIZES = {(64, 64): 40, (32, 96): 10, (96, 32): 7}
CAPTION = Caption(("1girl", "kohaku", "artist"), tuple("abcdefgh"))


def test_a_step_does_not_depend_on_the_steps_before_it():
    in_order = Batches(SIZES, 4, seed=1)
    expected = [in_order(step) for step in range(3000)]
    for step in (2999, 0, 1024, 1023, 57):
        assert Batches(SIZES, 4, seed=1)(step) == expected[step]
    assert [Batches(SIZES, 4, seed=2)(step) for step in range(20)] != expected[:20]


def test_every_picture_is_seen_once_before_any_is_seen_again():
    batches = Batches(SIZES, 4, seed=1)
    seen = {bucket: [] for bucket in SIZES}
    for step in range(200):
        bucket, rows = batches(step)
        assert len(rows) == 4
        seen[bucket] += rows
    for bucket, rows in seen.items():
        size = SIZES[bucket]
        assert len(rows) > 2 * size
        for start in range(0, len(rows) - size, size):
            assert sorted(rows[start : start + size]) == list(range(size))
    epochs = [tuple(seen[64, 64][start : start + 40]) for start in (0, 40)]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("steps", [57, 570])
def test_buckets_take_turns_in_proportion_to_their_size(steps):
    batches = Batches(SIZES, 4, seed=3)
    turns = Counter(batches(step)[0] for step in range(steps))
    for bucket, size in SIZES.items():
        assert abs(turns[bucket] - steps * size / 57) <= len(SIZES)


def test_a_batch_may_be_larger_than_its_bucket():
    bucket, rows = Batches({(8, 8): 3}, 8, seed=0)(0)
    assert bucket == (8, 8)
    assert sorted(rows[:3]) == sorted(rows[3:6]) == [0, 1, 2]


def text_of(*arguments, **options):
    return ", ".join(caption_tags(*arguments, **options))


def plain(image, **changed):
    return text_of(CAPTION, 0, image, **{"shuffle": False, "tag_dropout": 0, "caption_dropout": 0, **changed})


def test_a_caption_untouched_is_its_text():
    assert plain(0) == CAPTION.text


def test_shuffling_keeps_the_fixed_part_and_every_tag():
    texts = [plain(image, shuffle=True) for image in range(20)]
    assert len(set(texts)) > 15
    assert all(text.startswith("1girl, kohaku, artist, ") for text in texts)
    assert all(sorted(text.split(", ")) == sorted(CAPTION.text.split(", ")) for text in texts)
    assert texts == [plain(image, shuffle=True) for image in range(20)]


def test_dropout_happens_as_often_as_asked():
    empty = sum(plain(image, caption_dropout=0.1) == "" for image in range(4000))
    assert abs(empty / 4000 - 0.1) < 4 * (0.1 * 0.9 / 4000) ** 0.5
    texts = [plain(image, tag_dropout=0.25).split(", ") for image in range(1000)]
    assert all(words[:3] == ["1girl", "kohaku", "artist"] for words in texts)
    dropped = 8 - sum(len(words) - 3 for words in texts) / 1000
    assert abs(dropped / 8 - 0.25) < 4 * (0.25 * 0.75 / 8000) ** 0.5


def test_a_group_is_dropped_whole_and_the_spared_never():
    caption = Caption(("1girl",), tuple("abcdef"), ("last",), groups=(3, 2, 1), never_drop=("b",))
    shown = [
        text_of(caption, 0, n, shuffle=True, tag_dropout=0.0, caption_dropout=0.0, group_dropout=0.25).split(", ")
        for n in range(2000)
    ]
    assert all(words[0] == "1girl" and words[-1] == "last" and "b" in words for words in shown)
    assert all(("a" in words) == ("c" in words) and ("d" in words) == ("e" in words) for words in shown)
    for tag in "adf":
        assert abs(sum(tag not in words for words in shown) / 2000 - 0.25) < 4 * (0.1875 / 2000) ** 0.5
    spared = [text_of(caption, 0, n, shuffle=False, tag_dropout=0.9, caption_dropout=0.0) for n in range(200)]
    assert all("b" in text.split(", ") for text in spared)


def test_group_dropout_leaves_the_other_draws_alone():
    plainly = [plain(n, shuffle=True, tag_dropout=0.2) for n in range(50)]
    grouped = [plain(n, shuffle=True, tag_dropout=0.2, group_dropout=1e-9) for n in range(50)]
    assert plainly == grouped
