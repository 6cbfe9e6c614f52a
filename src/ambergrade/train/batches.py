"""Chooses the pictures and words that the k-th optimizer step sees, as functions of (seed, k): no state can be lost."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

from ambergrade.identity import random_seed
from ambergrade.nouns import Caption

Bucket = tuple[int, int]


class Batches:
    """Gives each optimizer step a batch of one bucket.

    A bucket's pictures form an endless stream of shuffled epochs, cut into batches, so every picture of it is
    seen once before any is seen again. Each bucket gets its turns evenly spaced and in proportion to its size.
    """

    def __init__(self, sizes: Mapping[Bucket, int], batch: int, seed: int) -> None:
        """`sizes` maps buckets to picture counts; `batch` is images per optimizer step."""
        self.sizes = {bucket: size for bucket, size in sorted(sizes.items()) if size}
        self.batch = batch
        self.seed = seed
        self._turns = lru_cache(maxsize=2)(self._make_turns)
        self._order = lru_cache(maxsize=4 * len(self.sizes))(self._make_order)

    def __call__(self, step: int) -> tuple[Bucket, list[int]]:
        """Return the bucket of step `step` (from 0) and the rows of its pictures within the bucket."""
        horizon = 1 << max(10, step.bit_length())  # a power of two, so that neighbouring steps share a table
        index, turn = self._turns(horizon)[step]
        bucket = list(self.sizes)[index]
        size = self.sizes[bucket]
        places = range(turn * self.batch, (turn + 1) * self.batch)
        return bucket, [int(self._order(bucket, place // size)[place % size]) for place in places]

    def _make_turns(self, horizon: int) -> list[tuple[int, int]]:
        """List (bucket index, how many batches of it came before) of the first `horizon` steps.

        Bucket b takes its j-th turn at time (j + u_b) / size_b with u_b in 0..1 from the seed; a step's place is
        its rank in time, which does not depend on the horizon.
        """
        total = sum(self.sizes.values())
        times, indices, turns = [], [], []
        for index, (bucket, size) in enumerate(self.sizes.items()):
            shift = random.Random(random_seed(self.seed, "bucket", bucket)).random()
            turn = np.arange(horizon * size // total + 2)
            times.append((turn + shift) / size)
            indices.append(np.full(len(turn), index))
            turns.append(turn)
        order = np.argsort(np.concatenate(times), kind="stable")[:horizon]
        pairs = np.stack([np.concatenate(indices), np.concatenate(turns)], axis=1)[order]
        return [(int(index), int(turn)) for index, turn in pairs]

    def _make_order(self, bucket: Bucket, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        generator = np.random.default_rng(random_seed(self.seed, "order", bucket, epoch))
        return generator.permutation(self.sizes[bucket])


def caption_tags(
    caption: Caption,
    seed: int,
    image: int,
    *,
    shuffle: bool,
    tag_dropout: float,
    caption_dropout: float,
    group_dropout: float = 0.0,
) -> list[str]:
    """Choose the tags that image number `image` of the run (from 0) shows.

    `keep` stays first, whole and in order, `suffix` last; of `flexible` each tag is dropped with probability
    `tag_dropout` and each group whole with `group_dropout`, but for those in `never_drop`; the rest are shuffled.
    With probability `caption_dropout` nothing is shown: what guidance is contrasted with.
    """
    draw = random.Random(random_seed(seed, "caption", image))
    if draw.random() < caption_dropout:
        return []
    spared = frozenset(caption.never_drop)
    flexible = [tag for tag in caption.flexible if draw.random() >= tag_dropout or tag in spared]
    if group_dropout:
        # keyed apart, so that the draws above are the same with and without it
        chance = random.Random(random_seed(seed, "caption groups", image))
        gone: Counter[str] = Counter()
        start = 0
        for length in caption.groups or (len(caption.flexible),):
            if chance.random() < group_dropout:
                gone.update(tag for tag in caption.flexible[start : start + length] if tag not in spared)
            start += length
        flexible = [tag for tag in flexible if not gone[tag]]
    if shuffle:
        draw.shuffle(flexible)
    return [*caption.keep, *flexible, *caption.suffix]
