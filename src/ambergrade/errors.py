"""Errors a user can mend: what was asked, what was found, what to do.

AmbergradeError                 told in a few lines, exit code 1, never a traceback
├── UnknownName                 a name that no folder, file or table holds; carries the nearest
├── BadSetting                  a value that cannot be meant
├── BadInput                    a file or database that is not what it should be
└── MissingObject               the store or the disk does not hold what a record promises
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AmbergradeError(Exception):
    """Base of everything a user can mend."""


class UnknownName(AmbergradeError):
    """`what` named `asked` is not among `known`."""

    def __init__(self, what: str, asked: str, known: Iterable[str], hint: str = "") -> None:
        self.asked = asked
        super().__init__(unknown_name(what, asked, known, hint))


class BadSetting(AmbergradeError):
    """A setting whose value cannot be used."""


class BadInput(AmbergradeError):
    """An input file that is damaged or of another kind than asked for."""


class MissingObject(AmbergradeError):
    """Bytes that a record promises and the store does not hold."""


def nearest(asked: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The names most like `asked`, best first.

    >>> nearest("beta8", ["anxl3", "beta7", "base7"])[0]
    'beta7'
    """
    names = sorted(set(known))
    return difflib.get_close_matches(asked, names, n=count, cutoff=0.5)


def unknown_name(what: str, asked: str, known: Iterable[str], hint: str = "") -> str:
    """The sentence for an unknown name: the nearest known ones first, else all of a short list."""
    names = sorted(set(known))
    near = nearest(asked, names)
    lines = [f"{what} '{asked}' is not known."]
    if near:
        lines.append(f"Did you mean {' or '.join(repr(n) for n in near)}?")
    if names and (len(names) <= 12 or not near):
        lines.append("Known: " + ", ".join(names[:24]) + (", …" if len(names) > 24 else ""))
    if hint:
        lines.append(hint)
    return "\n".join(lines)
