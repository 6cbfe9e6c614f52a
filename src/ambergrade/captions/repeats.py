"""Pictures that look alike: candidates by hashed thumbnails, so that millions need no comparison of all with all."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

THUMBNAIL = 16
"""Pixels a side; three channels of 8 bits."""
TABLES = 8
BITS = 32
MOST = 64
"""Neighbours of one hash that a picture is compared with."""
ASPECT = 1.03
"""Two pictures of more different shape are not looked at as one."""


def nearly_alike(
    thumbnails: npt.NDArray[np.uint8], shapes: npt.NDArray[np.float64], limit: float
) -> list[tuple[int, int, float]]:
    """(first, later, mean absolute difference) for each picture that looks like an earlier one, the nearest named.

    `thumbnails` are (N, 16·16·3), `shapes` (N, 2) widths and heights, `limit` grey levels. Candidates share 32 signs
    of random projections (Charikar 2002) in one of 8 tables: a pair at an angle of 0.03, as a stored-again copy is, is
    missed once in 10⁴ at most, and unlike pictures rarely meet.
    """
    found: dict[int, tuple[int, float]] = {}
    aspects = shapes[:, 0] / shapes[:, 1] if len(shapes) else np.zeros(0)
    for order, edges in _tables(thumbnails):
        for start, end in edges:
            group = np.sort(order[start:end])
            for place in range(1, len(group)):
                later = int(group[place])
                earlier = group[max(0, place - MOST) : place]
                ratio = aspects[earlier] / aspects[later]
                earlier = earlier[(ratio < ASPECT) & (ratio > 1 / ASPECT)]
                if not len(earlier):
                    continue
                apart = np.abs(thumbnails[earlier].astype(np.int16) - thumbnails[later]).mean(axis=1)
                best = int(apart.argmin())
                if apart[best] <= limit and apart[best] < found.get(later, (0, np.inf))[1]:
                    found[later] = (int(earlier[best]), float(apart[best]))
    return [(earlier, later, apart) for later, (earlier, apart) in sorted(found.items())]


def _tables(thumbnails: npt.NDArray[np.uint8]) -> Iterator[tuple[npt.NDArray[np.int64], list[tuple[int, int]]]]:
    """For each table: the pictures in the order of their hash, and the stretches (start, end) of equal ones."""
    draw = np.random.default_rng(20240127)
    for _ in range(TABLES):
        planes = draw.standard_normal((thumbnails.shape[1], BITS)).astype(np.float32)
        planes -= planes.mean(axis=0)  # brightness does not turn a picture
        hashes = np.empty(len(thumbnails), np.uint32)
        for start in range(0, len(thumbnails), 65536):
            signs = thumbnails[start : start + 65536].astype(np.float32) @ planes > 0
            hashes[start : start + 65536] = np.packbits(signs, axis=1).view(">u4")[:, 0]
        order = np.argsort(hashes, kind="stable")
        edges = np.flatnonzero(np.diff(hashes[order], prepend=np.uint32(0)))
        starts = np.unique(np.concatenate([[0], edges])) if len(order) else np.zeros(0, np.int64)
        ends = np.append(starts[1:], len(order))
        yield order, [(int(a), int(b)) for a, b in zip(starts, ends, strict=True) if b - a > 1]
