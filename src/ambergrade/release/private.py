"""Refuses what ties a release to the machine that made it: paths, host, user and clock, wherever in a text."""

from __future__ import annotations

import getpass
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ambergrade.errors import BadInput

_PATHS = re.compile(
    r"""
      (?<![\w.:/*<>-])/(?=[A-Za-z0-9._~-])[^\s"'`<>|/]+(?:/[^\s"'`<>|]*)   # a path; not https://…, and/or, 1/2
    | (?<![\w.:/])/(?:home|root|tmp|Users|mnt|var|opt|data)\b              # /root
    | (?<![\w/])~[\w.-]*/                                                  # ~/models, ~kim/models
    | \bfile:/+
    | (?<![A-Za-z])[A-Za-z]:[\\/](?![/])\w                                 # C:\Users
    | \\\\[\w.-]+\\\w                                                      # \\host\share
    """,
    re.VERBOSE,
)
_CLOCK = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d")
_COMMON = {"localhost", "root", "user", "admin", "ubuntu", "debian", "runner", "build", "main", "base", "model"}
"""Names of machines and users that are words as well."""


def refuse_private(facts: Any, what: str = "A release") -> None:
    """Raise BadInput where a text among the facts (JSON values) names a place, a host, a user or a time of day.

    A web address is no place on this machine. The user's and the machine's own names are looked for as whole words,
    unless they are common words.
    """
    own = _own_names()
    found = [f"{key} = {text[:200]!r}: {reason}" for key, text in _texts(facts) if (reason := _private(text, own))]
    if found:
        raise BadInput(
            f"{what} must be the same wherever it is made, found\n  " + "\n  ".join(found[:5]) + "\nName inputs by "
            "their digest, or by where a stranger finds them (builtin://…, a hub id)."
        )


def _private(text: str, own: dict[str, str]) -> str:
    """Say what in a text belongs to this machine; nothing where nothing does."""
    if path := _PATHS.search(text):
        return f"{path[0][:60]!r} is a path"
    if clock := _CLOCK.search(text):
        return f"{clock[0]!r} is a time of day"
    for name, kind in own.items():
        if re.search(rf"(?<![\w.-]){re.escape(name)}(?![\w-])", text, re.IGNORECASE):
            return f"{name!r} is {kind}"
    return ""


def _own_names() -> dict[str, str]:
    """This machine's and this user's names and home; common words are none."""
    names = {str(Path.home()): "the home folder"} if len(str(Path.home())) > 1 else {}
    names[socket.gethostname()] = "this machine's name"
    with suppress(OSError, KeyError):  # a number without a name, as in some containers
        names[getpass.getuser()] = "this user's name"
    return {name: kind for name, kind in names.items() if len(name) > 3 and name.lower() not in _COMMON}


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in a JSON value, keys too, with the dotted key that leads to it."""
    if isinstance(value, dict):
        for inner, item in value.items():
            yield f"{key or 'key'}", str(inner)
            yield from _texts(item, f"{key}.{inner}" if key else str(inner))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _texts(item, f"{key}.{number}")
    elif isinstance(value, str):
        yield key, value
