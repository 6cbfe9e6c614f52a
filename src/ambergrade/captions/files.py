"""Where a post's picture lies: a file in a folder, or a member of a danbooru2023 tar (`data-0123.tar`, id mod 1000)."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tarfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ambergrade.errors import BadInput
from ambergrade.identity import digest
from ambergrade.store import TICK_NS, written_aside

PER_LAYOUT = 1000
"""Tars, and folders, of the danbooru datasets: a post lies in the one numbered id mod 1000."""
NUMBER = re.compile("[0-9]{1,18}")


class OutsideFolder(BadInput):
    """A picture's name leads out of the picture folder: absolute, by `..`, or through a link."""


class _Members(NamedTuple):
    """Members of one tar that are named by a post's id."""

    ids: npt.NDArray[np.int64]
    """(N,) rising"""
    offsets: npt.NDArray[np.int64]
    """Bytes from the tar's beginning."""
    sizes: npt.NDArray[np.int64]
    names: npt.NDArray[np.str_]


class _Located(NamedTuple):
    """Where a post's picture lies."""

    name: str
    size: int | None
    """Bytes; None where there is no picture."""
    changed: tuple[int, ...]
    """What tells that the file, or the tar it lies in, was changed."""


@dataclass(frozen=True, eq=False)
class _Index:
    """A tar's members, and what tells that the tar was changed."""

    members: _Members
    changed: tuple[int, ...]

    def place(self, post_id: int) -> int | None:
        place = int(np.searchsorted(self.members.ids, post_id))
        return place if place < len(self.members.ids) and self.members.ids[place] == post_id else None


class PictureFiles:
    """The pictures below a folder, loose or in tars, on a local or a mounted disk.

    A picture's name is relative to the folder; `data-0123.tar/5000123.webp` is a member of a tar. A tar is read from
    end to end once for its members, and with `index` that is kept in a folder for the next time. Names come from
    databases and manifests that others wrote: whatever leads out of the folder is refused, links included (the folder
    itself may be one).
    """

    def __init__(self, folder: Path, index: Path | None = None) -> None:
        self.folder = folder
        self.index = index
        self._indices: dict[str, _Index] = {}
        self._parents: dict[str, str] = {}

    @cached_property
    def tars(self) -> dict[int, list[str]]:
        """Number (id mod 1000) to the tars of that number, below the folder at any depth (`updates/` has more)."""
        found: dict[int, list[str]] = {}
        for path in sorted(self.folder.glob("**/data-*.tar")) if self.folder.is_dir() else ():
            number = path.stem.removeprefix("data-")
            if NUMBER.fullmatch(number):
                found.setdefault(int(number), []).append(path.relative_to(self.folder).as_posix())
        return found

    def find(self, post_id: int, file_name: str) -> str | None:
        """Return the name of a post's picture: as the database says, in the folder of its number, or in a tar.

        In a tar it is found by its id: the 4-megapixel release holds .webp where the database says .jpg. None if there
        is none. Raises OutsideFolder, or BadInput where the disk refuses to look.
        """
        found = self._located(post_id, file_name)
        return found.name if found else None

    def fingerprint(self, posts: Iterable[tuple[int, str]]) -> str:
        """Return a digest of the pictures that are there for posts of (id, file name): of their names and bytes.

        They are read only where a size, a time or an inode is another than when `index` last heard of them; a file that
        was touched or copied and holds the same bytes changes nothing.
        """
        found = [(post_id, *self._located_or_reason(post_id, file_name)) for post_id, file_name in posts]
        newest = max((max(times) for *_, times in found), default=0)
        kept = self.index / f"{digest(found)}.sha256" if self.index else None
        if kept and kept.is_file():
            return kept.read_text()
        hasher = hashlib.sha256()
        for post_id, name, size, _ in tqdm(found, desc="pictures", unit="file", disable=None, leave=False):
            read = hashlib.sha256(self.read(name)).hexdigest() if size is not None else ""
            hasher.update(repr((post_id, name, read)).encode())
        made = hasher.hexdigest()
        if kept and time.time_ns() - newest > TICK_NS:  # a change within a tick of the disk's clock leaves no trace
            kept.parent.mkdir(parents=True, exist_ok=True)
            with written_aside(kept) as aside:
                aside.write_text(made)
        return made

    def _located_or_reason(self, post_id: int, file_name: str) -> _Located:
        """Where a post's picture lies; without a size, why there is none."""
        try:
            return self._located(post_id, file_name) or _Located("", None, (0,))
        except BadInput as error:
            return _Located(str(error), None, (0,))

    def read(self, name: str) -> bytes:
        """Return the bytes of a picture by its name. Raises BadInput where there is none, and OutsideFolder."""
        tar, inside, _ = name.rpartition(".tar/")
        try:
            if inside and self._stat(f"{tar}.tar"):
                return self._member(f"{tar}.tar", name)
            if self._stat(name):
                return (self.folder / name).read_bytes()
        except OSError as error:
            raise BadInput(f"{self.folder / name} cannot be read: {error.strerror}.") from error
        raise BadInput(f"No picture at {self.folder / name}.")

    def _located(self, post_id: int, file_name: str) -> _Located | None:
        for name in (file_name, f"{post_id % PER_LAYOUT:04d}/{file_name}"):
            about = self._stat(name)
            if about:
                return _Located(name, about.st_size, _changed(about))
        for tar in self.tars.get(post_id % PER_LAYOUT, ()):
            index = self._opened(tar)
            place = index.place(post_id)
            if place is not None:
                name = f"{tar}/{index.members.names[place]}"
                return _Located(name, int(index.members.sizes[place]), index.changed)
        return None

    def _stat(self, name: str) -> os.stat_result | None:
        """What the disk says of a regular file inside the folder; None where there is none."""
        if name.startswith("/") or "\0" in name or ".." in name.replace("\\", "/").split("/"):
            raise OutsideFolder(f"The picture name {name!r:.200} leads out of {self.folder}; it is not opened.")
        path = f"{self.folder}/{name}"
        try:
            about = os.lstat(path)
            linked = stat.S_ISLNK(about.st_mode)
            if linked:
                about = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise BadInput(f"The disk does not let {path:.300} be looked at: {error.strerror}.") from error
        if not stat.S_ISREG(about.st_mode):
            return None
        parent = os.path.dirname(path)
        if parent not in self._parents:  # few of them for millions of files
            self._parents[parent] = os.path.realpath(parent)
        real = os.path.realpath(path) if linked else self._parents[parent] + "/"
        if not real.startswith(self._root + "/"):
            raise OutsideFolder(f"The picture name {name!r:.200} leads out of {self.folder} through a link.")
        return about

    @cached_property
    def _root(self) -> str:
        return os.path.realpath(self.folder).rstrip("/")

    def _member(self, tar: str, name: str) -> bytes:
        index = self._opened(tar)
        member = name.removeprefix(f"{tar}/")
        stem = Path(member).stem
        place = index.place(int(stem)) if NUMBER.fullmatch(stem) else None
        if place is None or index.members.names[place] != member:
            raise BadInput(f"{self.folder / tar} has no member {member}.")
        with (self.folder / tar).open("rb") as file:
            file.seek(int(index.members.offsets[place]))
            found = file.read(int(index.members.sizes[place]))
        if len(found) < index.members.sizes[place]:
            raise BadInput(f"{self.folder / tar} ends within {member}: the tar is cut short.")
        return found

    def _opened(self, tar: str) -> _Index:
        if tar not in self._indices:
            about = self._stat(tar)
            if not about:
                raise BadInput(f"No tar at {self.folder / tar}.")
            state = [tar, about.st_size, about.st_ino, about.st_mtime_ns, about.st_ctime_ns]
            kept = self.index and self.index / f"{digest(state)[:24]}.npz"
            if kept and kept.is_file():
                with np.load(kept) as arrays:
                    members = _Members(*(arrays[name] for name in _Members._fields))
            else:
                members = _members(self.folder / tar)
                if kept:
                    with written_aside(kept) as aside, aside.open("wb") as file:
                        np.savez(file, allow_pickle=False, **members._asdict())
            self._indices[tar] = _Index(members, _changed(about))
        return self._indices[tar]


def _changed(about: os.stat_result) -> tuple[int, ...]:
    return about.st_ino, about.st_mtime_ns, about.st_ctime_ns


def _members(path: Path) -> _Members:
    rows: dict[int, tuple[int, int, str]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stem = Path(member.name).stem
                if member.isfile() and NUMBER.fullmatch(stem):
                    rows[int(stem)] = (member.offset_data, member.size, member.name)  # the last of a name counts
    except (tarfile.TarError, OSError) as error:
        raise BadInput(f"{path} cannot be read as an uncompressed tar: {error}.") from error
    ids = sorted(rows)
    offsets, sizes = (np.array([rows[post][place] for post in ids], np.int64) for place in (0, 1))
    return _Members(np.array(ids, np.int64), offsets, sizes, np.array([rows[post][2] for post in ids], np.str_))
