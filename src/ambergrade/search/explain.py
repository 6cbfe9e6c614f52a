"""Why a point is new: what tells it from the finished one that is most like it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MISSING = "nothing"


def why_new(wanted: Mapping[str, Any], finished: Iterable[Mapping[str, Any]]) -> list[tuple[str, Any, Any]]:
    """(setting, its value now, its value then) against the finished document with the fewest differences.

    Documents are nested mappings of plain values; empty if one is equal, and every setting if none is there.

    >>> why_new({"sampler": {"steps": 8}, "a": 0.8}, [{"sampler": {"steps": 4}, "a": 0.8}, {"a": 0.1}])
    [('sampler.steps', 8, 4)]
    """
    ours = dict(leaves(wanted))
    found = [_apart(ours, dict(leaves(document))) for document in finished]
    return min(found, key=len, default=_apart(ours, {}))


def leaves(document: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything plain in nested mappings; lists are values."""
    if isinstance(document, Mapping):
        for key, value in document.items():
            yield from leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, document


def _apart(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    keys = dict.fromkeys([*ours, *theirs])
    pairs = [(key, ours.get(key, MISSING), theirs.get(key, MISSING)) for key in keys]
    return [(key, now, then) for key, now, then in pairs if now != then]
