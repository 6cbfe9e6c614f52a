"""Where a post's picture lies: a file in a folder, or a member of a danbooru2023 tar (`data-0123.tar`, id mod 1000)."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ambergrade.errors import BadInput
from ambergrade.identity import digest
from ambergrade.store import written_aside

PER_LAYOUT = 1000
"""Tars, and folders, of the danbooru datasets: a post lies in the one numbered id mod 1000."""


@dataclass(frozen=True, eq=False)
class _Index:
    """Members of one tar that are named by a post's id."""

    ids: npt.NDArray[np.int64]
    """(N,) rising"""
    offsets: npt.NDArray[np.int64]
    """Bytes from the tar's beginning."""
    sizes: npt.NDArray[np.int64]
    names: npt.NDArray[np.str_]

    def place(self, post_id: int) -> int | None:
        place = int(np.searchsorted(self.ids, post_id))
        return place if place < len(self.ids) and self.ids[place] == post_id else None


class PictureFiles:
    """The pictures below a folder, loose or in tars, on a local or a mounted disk.

    A picture's name is relative to the folder; `data-0123.tar/5000123.webp` is a member of a tar. A tar is read from
    end to end once for its members, and with `index` that is kept in a folder for the next time.
    """

    def __init__(self, folder: Path, index: Path | None = None) -> None:
        self.folder = folder
        self.index = index
        self._indices: dict[str, _Index] = {}

    @cached_property
    def tars(self) -> dict[int, list[str]]:
        """Number (id mod 1000) to the tars of that number, below the folder at any depth (`updates/` has more)."""
        found: dict[int, list[str]] = {}
        for path in sorted(self.folder.glob("**/data-*.tar")) if self.folder.is_dir() else ():
            number = path.stem.removeprefix("data-")
            if number.isdigit():
                found.setdefault(int(number), []).append(path.relative_to(self.folder).as_posix())
        return found

    def find(self, post_id: int, file_name: str) -> str | None:
        """The name of a post's picture, or None: as the database says, in the folder of its number, or in a tar.

        In a tar it is found by its id: the 4-megapixel release holds .webp where the database says .jpg.
        """
        for name in (file_name, f"{post_id % PER_LAYOUT:04d}/{file_name}"):
            if (self.folder / name).is_file():
                return name
        for tar in self.tars.get(post_id % PER_LAYOUT, ()):
            index = self._opened(tar)
            place = index.place(post_id)
            if place is not None:
                return f"{tar}/{index.names[place]}"
        return None

    def read(self, name: str) -> bytes:
        """The bytes of a picture by its name. Raises BadInput where there is none, or its tar is cut short."""
        tar, inside, _ = name.rpartition(".tar/")
        if inside and (self.folder / f"{tar}.tar").is_file():
            return self._member(f"{tar}.tar", name)
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise BadInput(f"No picture at {self.folder / name}: {error.strerror}.") from error

    def _member(self, tar: str, name: str) -> bytes:
        index = self._opened(tar)
        member = name.removeprefix(f"{tar}/")
        stem = Path(member).stem
        place = index.place(int(stem)) if stem.isdigit() else None
        if place is None or index.names[place] != member:
            raise BadInput(f"{self.folder / tar} has no member {member}.")
        with (self.folder / tar).open("rb") as file:
            file.seek(int(index.offsets[place]))
            found = file.read(int(index.sizes[place]))
        if len(found) < index.sizes[place]:
            raise BadInput(f"{self.folder / tar} ends within {member}: the tar is cut short.")
        return found

    def _opened(self, tar: str) -> _Index:
        if tar not in self._indices:
            path = self.folder / tar
            about = path.stat()
            kept = self.index and self.index / f"{digest([tar, about.st_size, about.st_mtime_ns])[:24]}.npz"
            if kept and kept.is_file():
                with np.load(kept) as arrays:
                    self._indices[tar] = _Index(*(arrays[name] for name in ("ids", "offsets", "sizes", "names")))
            else:
                self._indices[tar] = _indexed(path)
                if kept:
                    with written_aside(kept) as aside, aside.open("wb") as file:
                        np.savez(file, **vars(self._indices[tar]))
        return self._indices[tar]


def _indexed(path: Path) -> _Index:
    rows: dict[int, tuple[int, int, str]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stem = Path(member.name).stem
                if member.isfile() and stem.isdigit():
                    rows[int(stem)] = (member.offset_data, member.size, member.name)  # the last of a name counts
    except (tarfile.TarError, OSError) as error:
        raise BadInput(f"{path} cannot be read as an uncompressed tar: {error}.") from error
    ids = sorted(rows)
    offsets, sizes = (np.array([rows[post][place] for post in ids], np.int64) for place in (0, 1))
    names = np.array([rows[post][2] for post in ids], np.str_)
    return _Index(np.array(ids, np.int64), offsets, sizes, names)
