"""Puts a release where people find it: a repository on the Hugging Face hub, a folder, or a bucket.

`plan` reads the release and what is at its place and sends nothing, `Plan.run` sends what differs. A file counts as
there by its bytes' sha256, never by name and size alone (two versions' weights have equal sizes), so the same command
again goes on where it was stopped. MANIFEST.json and SHA256SUMS go last, or, on the hub, all in one commit: a half-sent
release never looks whole.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from tqdm import tqdm

from ambergrade.errors import AmbergradeError, BadInput, BadSetting
from ambergrade.identity import file_digest
from ambergrade.release.sums import MANIFEST, SUMS, check_sums, read_manifest
from ambergrade.store import copy_file

HUB = "hf://"
LAST = (MANIFEST, SUMS)
BLOCK = 1 << 22


class NotReached(AmbergradeError):
    """A place that cannot be read or written: no network, no right, no such bucket."""


@dataclass(frozen=True)
class File:
    """One file of the release."""

    name: str
    """Relative to the release, with slashes."""
    path: Path
    bytes: int
    sha256: str


class Place(Protocol):
    """Where a release is put."""

    @property
    def told(self) -> str:
        """What it is, in a few words."""
        ...

    @property
    def closed(self) -> bool:
        """Whether it is still to be opened to everybody, though all files may be there."""
        ...

    def differs(self, files: Sequence[File]) -> Mapping[str, bool | None]:
        """Name to whether other bytes are there; None where there is no such file."""
        ...

    def send(self, files: Sequence[File]) -> None:
        """Put files there, those of LAST at the end."""
        ...


@dataclass(frozen=True)
class Plan:
    """What would be sent where."""

    place: Place
    files: tuple[File, ...]
    differs: Mapping[str, bool | None]

    @property
    def sent(self) -> list[File]:
        """The files that are not there in these bytes."""
        return [file for file in self.files if self.differs[file.name] is not False]

    @property
    def replaced(self) -> list[str]:
        """Names of the files that are there in other bytes."""
        return [name for name, other in self.differs.items() if other]

    @property
    def text(self) -> str:
        """The table of files."""
        words = {None: "new", True: "replaces another", False: "is there"}
        rows = [f"  {words[self.differs[one.name]]:<18}{one.bytes:>15,}  {one.name}" for one in self.files]
        total = sum(file.bytes for file in self.sent)
        return "\n".join(
            [self.place.told, *rows, f"{len(self.sent)} of {len(self.files)} files, {total:,} bytes to send"]
        )

    def run(self, *, replace: bool = False) -> None:
        """Send. Raises BadSetting for a file that would replace another where that was not asked for."""
        if self.replaced and not replace:
            raise BadSetting(
                f"Other files are there under the names of this release: {', '.join(self.replaced[:5])}.\n"
                "Name another place, or replace them: --replace"
            )
        if self.sent or self.place.closed:
            self.place.send(self.sent)


def plan(folder: Path, target: str, *, public: bool = False, endpoint: str | None = None) -> Plan:
    """Compare a release with what is at `target`: `hf://owner/name`, a folder, or any address that fsspec knows.

    public: whether a repository of the hub may be seen by everybody; it is private otherwise. endpoint: of the hub.
    Raises BadInput for a release whose files are not what its manifest lists, NotReached for a place that does not
    answer.
    """
    wrong = check_sums(folder)
    if wrong:
        more = f"\n… and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise BadInput("The release is not whole, so it is not published:\n  " + "\n  ".join(wrong[:5]) + more)
    listed = {name: one.sha256 for name, one in read_manifest(folder).files.items()}
    listed |= {name: file_digest(folder / name) for name in LAST}
    files = tuple(File(name, folder / name, (folder / name).stat().st_size, listed[name]) for name in _in_order(listed))
    place = _Hub.at(target, public, endpoint) if target.startswith(HUB) else _FileSystem.at(target, folder)
    return Plan(place, files, place.differs(files))


def _in_order(names: Mapping[str, str]) -> list[str]:
    return sorted(names, key=lambda name: (name in LAST, name))


@dataclass(frozen=True)
class _FileSystem:
    """A folder, or whatever fsspec makes look like one.

    What its file systems raise has no class in common: a missing login of S3 is no OSError.
    """

    fs: fsspec.AbstractFileSystem
    root: str
    closed = False

    @classmethod
    def at(cls, target: str, folder: Path) -> _FileSystem:
        try:
            fs, root = fsspec.url_to_fs(target)
        except (ImportError, ValueError) as error:  # a protocol that nobody knows, or whose package is not installed
            raise BadSetting(f"{target.partition('://')[0]}:// cannot be written: {error}") from error
        except Exception as error:
            raise NotReached(f"{target} does not answer: {_short(error)}") from error
        if not target.strip() or not root.rstrip("/"):
            raise BadSetting(f"'{target}' names no place for a release.\nGive a folder, an address or hf://OWNER/NAME.")
        if isinstance(fs, LocalFileSystem) and folder.resolve() in Path(root).resolve().parents:
            raise BadSetting(f"{target} lies in the release itself.\nName a place outside of it.")
        return cls(fs, root.rstrip("/"))

    @property
    def told(self) -> str:
        return f"{self.fs.unstrip_protocol(self.root)}"

    def differs(self, files: Sequence[File]) -> dict[str, bool | None]:
        return {file.name: self._differs(file) for file in tqdm(files, "look", leave=False, disable=None)}

    def _differs(self, file: File) -> bool | None:
        place = f"{self.root}/{file.name}"
        try:
            found = self.fs.info(place)
            if found["type"] != "file":
                raise BadInput(f"{place} is a {found['type']}, where a file should go.\nName another place.")
            if found["size"] != file.bytes:
                return True
            with self.fs.open(place, "rb") as opened:
                return _sha256(opened) != file.sha256
        except FileNotFoundError:
            return None
        except AmbergradeError:
            raise
        except Exception as error:
            raise NotReached(f"{place} cannot be read: {_short(error)}") from error

    def send(self, files: Sequence[File]) -> None:
        for file in tqdm(files, "send", unit="file", disable=None):
            place = f"{self.root}/{file.name}"
            try:
                self.fs.makedirs(place.rpartition("/")[0], exist_ok=True)
                if isinstance(self.fs, LocalFileSystem):
                    copy_file(file.path, Path(place))  # aside, and renamed: half a file never bears the name
                else:
                    self.fs.put_file(str(file.path), place)
            except Exception as error:
                raise NotReached(
                    f"{place} cannot be written: {_short(error)}\nThe same command again goes on from here."
                ) from error


@dataclass(frozen=True)
class _Hub:
    """A model repository of the Hugging Face hub."""

    api: HfApi
    name: str
    public: bool
    exists: bool
    closed: bool = False

    @classmethod
    def at(cls, target: str, public: bool, endpoint: str | None) -> _Hub:
        name = target.removeprefix(HUB).strip("/")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise BadSetting(f"{target} is no repository.\nWrite hf://OWNER/NAME.")
        api = HfApi(endpoint=endpoint)
        try:
            private = api.model_info(name).private
        except RepositoryNotFoundError:
            return cls(api, name, public, False)
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise NotReached(f"The hub does not tell of {name}: {_short(error)}") from error
        if not private and not public:
            raise BadSetting(f"{name} is there and public.\nName a private one, or say that it may be seen: --public")
        return cls(api, name, public, True, closed=public and bool(private))

    @property
    def told(self) -> str:
        seen = "public" if self.public else "private"
        return f"{self.api.endpoint}/{self.name}, {seen}{'' if self.exists else ', new'}"

    def differs(self, files: Sequence[File]) -> dict[str, bool | None]:
        if not self.exists:
            return {file.name: None for file in files}
        try:
            listed = list(self.api.list_repo_tree(self.name, recursive=True))
        except (HfHubHTTPError, OSError) as error:
            raise NotReached(f"The hub does not list {self.name}: {_short(error)}") from error
        there = {one.path: one for one in listed if isinstance(one, RepoFile)}
        return {file.name: _other(there[file.name], file) if file.name in there else None for file in files}

    def send(self, files: Sequence[File]) -> None:
        operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.path) for file in files]
        try:
            if not self.exists:
                self.api.create_repo(self.name, private=True, exist_ok=True)
            if operations:
                self.api.create_commit(self.name, operations, commit_message=f"Release, {len(files)} files")
            if self.public:  # only now, when it is whole
                self.api.update_repo_settings(self.name, private=False)
        except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as error:  # ValueError: the card's head
            raise NotReached(
                f"The hub did not take {self.name}: {_short(error)}\n"
                "Log in with `hf auth login` where it asks for that; the same command again sends what is missing."
            ) from error


def _other(there: RepoFile, file: File) -> bool:
    """Say whether a file of the hub has other bytes: large ones are listed by sha256, small ones as git names them."""
    if there.size != file.bytes:
        return True
    if there.lfs is not None:
        return bool(there.lfs.sha256 != file.sha256)
    data = file.path.read_bytes()
    return bool(there.blob_id != hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())


def _sha256(opened: IO[bytes]) -> str:
    whole = hashlib.sha256()
    while block := opened.read(BLOCK):
        whole.update(block)
    return whole.hexdigest()


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:240] or type(error).__name__
