"""The values of a booru database as dumps really spell them, brought to one form or refused by column and row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ambergrade.errors import BadInput, unknown_name
from ambergrade.nouns import RATINGS, TAG_TYPES

Array = npt.NDArray[Any]
RATING_CODES = {word: code for code, rating in enumerate(RATINGS) for word in (rating, rating[0])}
"""The words and letters that danbooru writes since 2022: g, s (sensitive), q, e."""
SITE_TYPES = {"general": 0, "artist": 1, "copyright": 3, "character": 4, "meta": 5}
"""danbooru's own numbers of tag types; the danbooru2023 dumps number them in the order of TAG_TYPES."""
WHOLE = re.compile(r"[+-]?[0-9]{1,18}(\.0+)?")


def whole_numbers(
    values: Sequence[Any], column: str, ids: Sequence[int] | Array | None = None, absent: int | None = None
) -> Array:
    """Return (N,) int64 of a column whose numbers may be stored as text (`"12"`) or as floats (`12.0`).

    `column` and the rows' `ids` are told in complaints. NULL, an empty text and NaN count as `absent`. Raises BadInput
    for anything else, and for those where `absent` is None.
    """
    made = np.array(values)
    if made.dtype.kind == "i" or not len(values):
        return made.astype(np.int64)
    found = np.empty(len(values), np.int64)
    for place, value in enumerate(values):
        number = _whole(value)
        if value is None or value == "" or value != value:
            number = absent
        if number is None:
            raise BadInput(f"{column}{_of_row(ids, place)} is {value!r:.80}; a whole number is needed.")
        found[place] = number
    return found


def rating_codes(values: Sequence[Any], column: str, ids: Sequence[int] | Array) -> Array:
    """Return (N,) int64 places in RATINGS of numbers, letters (`g`) or words (`general`); -1 where there is none.

    Numbers that are no place in RATINGS are kept as they are: such posts have an unknown rating. Raises BadInput for
    other letters and words.
    """
    if np.array(values).dtype.kind == "i":
        return whole_numbers(values, column, ids)
    numbers = []
    for place, value in enumerate(values):
        word = value.strip().lower() if isinstance(value, str) else ""
        if word and word not in RATING_CODES and not WHOLE.fullmatch(word):
            raise BadInput(f"{column}{_of_row(ids, place)}: " + unknown_name("rating", value[:80], RATING_CODES))
        numbers.append(RATING_CODES.get(word, value))
    return whole_numbers(numbers, column, ids, absent=-1)


def tag_table(rows: Iterable[tuple[Any, Any, Any]], database: object) -> tuple[Array, list[str], list[int], int]:
    """Return ids, names, types (places in TAG_TYPES) of the tags that have a name, and how many have none.

    A type is a place in TAG_TYPES, as number or as text, or its word. Where the number 5 is among them and 2 is not,
    the numbers are danbooru's own. Raises BadInput for other types, naming the tag.
    """
    listed = list(rows)
    named = [row for row in listed if row[1] is not None and str(row[1]).strip()]
    ids = whole_numbers([row[0] for row in named], f"{database}: tag.id")
    spelled = [_type(row[2]) for row in named]
    site = 5 in spelled
    known: dict[int | str | None, int] = {}
    for place, word in enumerate(TAG_TYPES):
        known[word] = known[SITE_TYPES[word] if site else place] = place
    for (tag, name, kind), value in zip(named, spelled, strict=True):
        if value not in known:
            right = "0, 1, 3, 4, 5 (danbooru's own, since 5 is among them)" if site else "0 to 4"
            raise BadInput(
                f"{database}: tag.type of '{name}' (id {tag}) is {kind!r:.80}; {right}, or one of "
                f"{', '.join(TAG_TYPES)}, is needed."
            )
        if not isinstance(name, str | int):
            raise BadInput(f"{database}: tag.name of the tag {tag} is {name!r:.80}; a text is needed.")
    return ids, [str(row[1]) for row in named], [known[value] for value in spelled], len(listed) - len(named)


def _type(value: Any) -> int | str | None:
    """A tag type as a number or as a word in lower case; None for what is neither."""
    number = _whole(value)
    return number if number is not None else value.strip().lower() if isinstance(value, str) else None


def _whole(value: Any) -> int | None:
    if isinstance(value, str) and WHOLE.fullmatch(value.strip()):
        return int(value.strip().partition(".")[0])
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 62:
        return int(value)
    return value if type(value) is int and abs(value) < 1 << 62 else None


def _of_row(ids: Sequence[int] | Array | None, place: int) -> str:
    return f" of post {ids[place]}" if ids is not None else ""
