"""Checks that a release folder holds the files that it lists, in the bytes that it lists, and nothing else."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ambergrade.errors import BadInput
from ambergrade.identity import file_digest
from ambergrade.release.facts import as_json

MANIFEST = "MANIFEST.json"
SUMS = "SHA256SUMS"
MOST_BYTES = 4 << 20
"""The longest manifest."""
MOST_FILES = 10_000
DEEPEST = 8
"""Folders within folders."""


@dataclass(frozen=True)
class Listed:
    """One file as the manifest lists it."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What MANIFEST.json says."""

    name: str
    version: str
    files: Mapping[str, Listed]
    """By name relative to the folder, with slashes; all files but the manifest and SHA256SUMS."""

    @property
    def text(self) -> str:
        """Return the file's text."""
        return as_json(self)


def sums_text(digests: Mapping[str, str]) -> str:
    """Return SHA256SUMS, for `sha256sum -c`; `digests`: of every file but itself."""
    return "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))


def read_manifest(folder: Path) -> Manifest:
    """Read a release's manifest. Raises BadInput where there is none, or one that no build has written."""
    text = read_text(folder / MANIFEST, MOST_BYTES)
    try:
        value = json.loads(text)
        files = {name: Listed(**row) for name, row in value["files"].items()}
        manifest = Manifest(value["name"], value["version"], files)
        sound = manifest.text == text and all(
            type(one.bytes) is int and re.fullmatch("[0-9a-f]{64}", one.sha256) for one in files.values()
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise BadInput(f"{MANIFEST} is no release's manifest.\nFetch the release again.")
    return manifest


def read_text(file: Path, most: int) -> str:
    """Read a text file of a folder that may be hostile. Raises BadInput naming it: no file, too long, no UTF-8."""
    try:
        if not stat.S_ISREG(file.lstat().st_mode):
            raise BadInput(f"{file.name} is no file of its own.")
        with file.open("rb") as opened:
            data = opened.read(most + 1)
        if len(data) > most:
            raise BadInput(f"{file.name} has more than {most:,} bytes.")
        return data.decode()
    except FileNotFoundError:
        raise BadInput(f"{file.name} is missing: {file.parent} is no whole release.") from None
    except UnicodeDecodeError:
        raise BadInput(f"{file.name} is no text in UTF-8.") from None


def check_sums(folder: Path) -> list[str]:
    """Compare a release folder with its manifest; return what is wrong, a line for each file, or nothing.

    No file is opened but those that are listed, and no link is followed. Raises BadInput where there is no manifest.
    """
    manifest = read_manifest(folder)
    found, wrong = {}, []
    for name, told in walk(folder):
        if told:
            wrong.append(f"{name} {told}")
        else:
            found[name] = (folder / name).stat().st_size
    digests = {name: one.sha256 for name, one in manifest.files.items()} | {MANIFEST: file_digest(folder / MANIFEST)}
    if read_text(folder / SUMS, MOST_BYTES) != sums_text(digests):
        wrong.append(f"{SUMS} does not say what {MANIFEST} says")
    listed = dict(manifest.files)
    wrong += [f"{name} is missing" for name in sorted(listed.keys() - found.keys())]
    wrong += [f"{name} is not listed" for name in sorted(found.keys() - listed.keys() - {MANIFEST, SUMS})]
    wrong += [f"{name} cannot be listed" for name in (MANIFEST, SUMS) if name in listed]
    for name in tqdm(sorted(listed.keys() & found.keys()), "read the files", leave=False, disable=None):
        if found[name] != listed[name].bytes:
            wrong.append(f"{name} has {found[name]:,} bytes, not {listed[name].bytes:,}")
        elif file_digest(folder / name) != listed[name].sha256:
            wrong.append(f"{name} is changed: its sha256 is another")
    return wrong


def walk(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield what lies below a folder by relative name, in order: each file, and with a complaint whatever else it is.

    Raises BadInput for more than MOST_FILES.
    """
    waiting, count = [""], 0
    while waiting:
        place = waiting.pop()
        entries = sorted(os.scandir(folder / place), key=lambda entry: entry.name)
        if not entries and place:
            yield place, "is an empty folder"
        for entry in entries:
            name = f"{place}/{entry.name}" if place else entry.name
            count += 1
            if count > MOST_FILES:
                raise BadInput(f"{folder} holds more than {MOST_FILES:,} files: it is no release.")
            if entry.is_symlink():
                yield shown(name), "is a link"
            elif entry.is_dir(follow_symlinks=False) and name.count("/") < DEEPEST:
                waiting.append(name)
            elif not entry.is_file(follow_symlinks=False):
                yield shown(name), "is neither a file nor a folder of a release"
            elif shown(name) != name:
                yield shown(name), "has a name that no release's file has"
            else:
                yield name, ""


def shown(name: str) -> str:
    """Return a file's name as it can be printed: what is no plain text stands escaped.

    >>> shown("README.md"), shown("a\\nb"), shown("a\\u202eb")
    ('README.md', 'a\\\\nb', 'a\\\\u202eb')
    """
    return "".join(c if c.isprintable() and c != "\\" else ascii(c)[1:-1] for c in name)


def inside(folder: Path, name: str) -> Path:
    """Return the file that a release's facts name. Raises BadInput for a name that leads elsewhere, or to no file."""
    file = folder / name
    clean = not Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name
    if not clean or any((folder / step).is_symlink() for step in [Path(name), *list(Path(name).parents)[:-1]]):
        raise BadInput(f"'{shown(name)[:120]}' is no name of a release's file.")
    if not file.is_file():
        raise BadInput(f"{shown(name)[:120]} is missing: {folder} is no whole release.")
    return file
