"""Reads text files as people save them: UTF-8 with or without a byte order mark, any line ending, blank lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from ambergrade.errors import BadInput, MissingObject
from ambergrade.identity import canonical_json

MARK = b"\xef\xbb\xbf"
"""UTF-8's byte order mark, which Windows editors write; it is no part of the text."""
WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff")
"""UTF-16's byte order marks (UTF-32's begin with the same bytes)."""


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Yield (number from 1, text) of each line that is not blank, blanks at both ends taken away.

    A line ends at `\n` or `\r\n` and nowhere else: U+2028, U+2029 and U+0085 are ordinary characters inside it, which
    `str.splitlines` would take for ends. The file is read piece by piece.

    Raises:
        MissingObject: there is no such file.
        BadInput: it is no UTF-8 text (UTF-16 and Latin-1 are named as what they are), or cannot be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = _decoded(line, path, number).strip(" \t\r\n")
                if text:
                    yield number, text
    except FileNotFoundError:
        raise MissingObject(f"No file at {path}.") from None
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}.") from error


def read_text(path: Path) -> str:
    """Return a text file's lines that are not blank, joined by line feeds. Raises as `read_lines` does."""
    return "\n".join(text for _, text in read_lines(path))


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a file of JSON objects, one a line. Raises BadInput naming file and line."""
    for number, line in read_lines(path):
        try:
            row = json.loads(line, parse_constant=_refuse, object_pairs_hook=_unique)
            if "\\ud" in line.lower():
                canonical_json(row).encode()  # half of a surrogate pair is no character and could never be written
        except (ValueError, RecursionError) as error:
            told = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise BadInput(f"{path}, line {number}: not a JSON object ({told}): {_shortened(line)}") from error
        if not isinstance(row, dict):
            raise BadInput(f"{path}, line {number}: a JSON object is needed on each line, found {_shortened(line)}")
        yield number, row


def write_rows(path: Path, rows: Iterable[Any]) -> None:
    """Write canonical JSON, one row a line, as `read_rows` reads it on every machine."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(canonical_json(row) + "\n" for row in rows)


def _decoded(line: bytes, path: Path, number: int) -> str:
    if number == 1:
        line = line.removeprefix(MARK)
        if line.startswith(WIDE_MARKS):
            raise BadInput(f"{path} is written in UTF-16. Save it as UTF-8.")
    if b"\0" in line:
        raise BadInput(f"{path}, line {number} holds zero bytes: it is UTF-16, or no text. Save it as UTF-8.")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise BadInput(
            f"{path}, line {number} is not UTF-8: byte 0x{line[error.start]:02x} after {error.start} others, "
            "as Latin-1 and Windows-1252 write accents. Save it as UTF-8."
        ) from None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key is there twice")
    return made


def _shortened(line: str) -> str:
    return repr(line if len(line) <= 60 else line[:60] + "…")
