"""Keeps bytes by content in the store, and says by the ledger's records which stages are finished.

<root>/store/sha256/ab/cdef…           written aside, fsynced, renamed, read-only
<root>/store/digests.json              which objects were read and found sound, and as which file
<root>/records/<stage>/<identity>.json written last: the commit point of a stage
<root>/work/<stage>/<identity>/        a stage's scratch folder; survives a kill, removed at the end
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ambergrade.errors import MissingObject, UnknownName
from ambergrade.identity import canonical_json, digest, file_digest

log = logging.getLogger(__name__)
TICK_NS = 50_000_000  # more than the longest tick of a kernel that stamps files
MOST_REMEMBERED = 10_000

BUILTIN = Path(__file__).parent / "world" / "weights"


def find_file(source: str) -> Path:
    """Return the local path behind `builtin://name` (shipped with the package) or an ordinary path.

    Raises UnknownName for a builtin that is not shipped, MissingObject for a path that is not there.
    """
    if source.startswith("builtin://"):
        name = source.removeprefix("builtin://")
        path = BUILTIN / name
        if not path.exists():
            known = [p.relative_to(BUILTIN).as_posix() for p in BUILTIN.iterdir()] if BUILTIN.is_dir() else []
            raise UnknownName("builtin", name, known)
        return path
    if "://" in source:
        raise MissingObject(f"{source} is no path: only builtin://<name> is known.\nFetch the file, and name its path.")
    path = Path(source).expanduser()
    if not path.exists():
        raise MissingObject(f"No file or folder at {path}.\nName an existing path, or builtin://<name> for what ships.")
    return path


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success fsync it and rename it over `target`."""
    with _temporary(target.parent, f".{target.name}.") as aside:
        yield aside
        _put_in_place(aside, target)


@contextmanager
def _temporary(folder: Path, prefix: str) -> Iterator[Path]:
    """Yield an empty file of a new name in a folder, which is made; remove it where it still bears that name."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=folder, prefix=prefix)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _put_in_place(aside: Path, target: Path, mode: int = 0o644) -> None:
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.chmod(mode)
    aside.rename(target)


def write_json(target: Path, value: Any) -> None:
    """Write sorted, indented JSON under its final name in one step."""
    with written_aside(target) as aside:
        aside.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file under its final name in one step; a reflink where the file system makes them.

    The copy is a file of its own: writing to one of the two never changes the other.
    """
    with written_aside(target) as aside:
        _copy_bytes(source, aside)


def _copy_bytes(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("wb") as write:
        try:
            while os.copy_file_range(read.fileno(), write.fileno(), 1 << 30):  # shares the blocks where it can
                pass
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO):
                raise
            shutil.copyfile(source, target)  # between file systems, or one that cannot


def read_json(file: Path) -> Any:
    """Read a JSON file of ours; None where there is none, or where it is torn, which is told in the log."""
    try:
        return json.loads(file.read_bytes())
    except OSError:
        pass
    except (ValueError, RecursionError):
        log.warning("%s is torn and counts as not there.", file)
    return None


def link_or_copy(source: Path, target: Path) -> None:
    """Put `source` at `target` by hard link, or by copy across filesystems; replaces in one step.

    For MLflow's artifacts only: who writes into a link writes into the store. See `copy_file` for all else.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:
        shutil.copyfile(source, aside)
    os.replace(aside, target)
    aside.unlink(missing_ok=True)  # POSIX: renaming onto another link of the same file does nothing


class Digests:
    """Remembers the sha256 of files by device, inode, size, and the times of the last change of bytes and of inode."""

    def __init__(self, cache: Path | None = None) -> None:
        """`cache`: a JSON file that is read now and brought up to date by `save`; None remembers nothing."""
        self.cache = cache
        self._known = self._read()
        self._new: dict[str, str] = {}

    def known(self, file: Path) -> str | None:
        """Return the remembered sha256 of a file that did not change since."""
        return self._known.get(_fingerprint(os.stat(file)))

    def tell(self, before: os.stat_result, file: Path, sha256: str) -> None:
        """Remember a digest that was read after `before`, unless the file changed since then or just before.

        A change within a tick of the file system's clock leaves no trace, so a file that young is not remembered.
        """
        key = _fingerprint(before)
        if _fingerprint(os.stat(file)) == key and time.time_ns() - before.st_ctime_ns > TICK_NS:
            self._known[key] = self._new[key] = sha256

    def of_file(self, file: Path) -> str:
        """Return the sha256 of a file's bytes; read them where it is not remembered."""
        found = self.known(file)
        if found is None:
            before = os.stat(file)
            found = file_digest(file)
            self.tell(before, file, found)
        return found

    def derived(self, kind: str, sha256: str) -> str | None:
        """Return a digest of another kind, such as that of the weights, that belongs to a file of this sha256."""
        return self._known.get(f"{kind}:{sha256}")

    def tell_derived(self, kind: str, sha256: str, found: str) -> None:
        """Remember what `derived` gives."""
        self._known[f"{kind}:{sha256}"] = self._new[f"{kind}:{sha256}"] = found

    def save(self) -> None:
        """Write what is new to the cache file, beside what other processes wrote meanwhile.

        Where that cannot be, it is told in the log: the files will be read again.
        """
        if self.cache is None or not self._new:
            return
        both = {**self._read(), **self._new}
        try:
            write_json(self.cache, both if len(both) <= MOST_REMEMBERED else self._new)
        except OSError as error:
            log.warning("Digests of files are not remembered in %s: %s", self.cache, error.strerror)
        self._new.clear()

    def _read(self) -> dict[str, str]:
        """Read the cache file; one that is missing, torn or foreign is an empty one."""
        found = read_json(self.cache) if self.cache is not None else None
        known = found if isinstance(found, dict) else {}
        return {key: sha256 for key, sha256 in known.items() if isinstance(sha256, str) and len(sha256) == 64}


def _fingerprint(found: os.stat_result) -> str:
    return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}"


@dataclass(frozen=True)
class Store:
    """Holds bytes by content."""

    root: Path

    def path(self, sha256: str, size: int | None = None) -> Path:
        """Return where the bytes lie. Raises MissingObject if they do not, or have another size than `size`."""
        path = self._place(sha256)
        trouble = self._trouble(sha256, size)
        if trouble:
            raise MissingObject(f"{trouble}\nRun the stage again.")
        return path

    def verified(self, sha256: str, size: int | None = None) -> Path:
        """Return `path` after reading all bytes and finding them sound; they are read once, as long as nothing changes.

        Raises MissingObject for a damaged object, naming it: put the bytes again to replace it.
        """
        path = self.path(sha256, size)
        digests = Digests(self.root / "digests.json")
        if digests.of_file(path) != sha256:
            raise MissingObject(
                f"The object {sha256[:12]}… of the store {self.root} is damaged: its bytes are others.\n"
                "Run the stage again, which replaces it."
            )
        digests.save()
        return path

    def holds(self, sha256: str, size: int | None = None) -> bool:
        """Say whether there are bytes under this digest, of this size if one is given."""
        return self._trouble(sha256, size) == ""

    def put(self, source: Path) -> str:
        """Take a copy of a file and return its sha256. A damaged object of that digest is replaced."""
        with _temporary(self.root, ".incoming.") as aside:
            _copy_bytes(source, aside)
            sha256 = file_digest(aside)  # of the copy: the source may change meanwhile
            try:
                self.verified(sha256, aside.stat().st_size)
            except MissingObject:
                place = self._place(sha256)
                place.parent.mkdir(parents=True, exist_ok=True)
                _put_in_place(aside, place, 0o444)
        return sha256

    def _trouble(self, sha256: str, size: int | None) -> str:
        """Say what is wrong with an object, as far as its name and size tell; empty for nothing."""
        path = self._place(sha256)
        if not path.is_file():
            return f"The store {self.root} holds no object {sha256[:12]}…."
        found = path.stat().st_size
        if size is not None and found != size:
            return f"The object {sha256[:12]}… of the store {self.root} is damaged: {found:,} bytes of {size:,}."
        return ""

    def _place(self, sha256: str) -> Path:
        return self.root / "sha256" / sha256[:2] / sha256[2:]


@dataclass(frozen=True)
class Outputs:
    """Holds what a stage's work returns: files to keep, by name, and small JSON values."""

    files: Mapping[str, Path] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """Describes a finished stage, fresh or from its record."""

    stage: str
    identity: str
    files: Mapping[str, Path]
    """Name to path in the store."""
    digests: Mapping[str, str]
    """Name to sha256."""
    sizes: Mapping[str, int]
    """Name to bytes; empty for a record of an earlier version, which did not keep them."""
    values: Mapping[str, Any]
    fresh: bool
    """False: the record was there and nothing was run."""
    seconds: float
    """What the work took when it ran."""


@dataclass(frozen=True)
class Ledger:
    """Runs each stage once per identity."""

    root: Path

    @property
    def store(self) -> Store:
        return Store(self.root / "store")

    def once(
        self,
        stage: str,
        version: int,
        settings: Any,
        inputs: Mapping[str, str],
        work: Callable[[Path], Outputs],
        *,
        verify: bool = False,
    ) -> Finished:
        """Return the finished stage, running `work(scratch folder)` only if no record holds its identity.

        `version` is the stage's numerics version: raise it when its results change. `settings` holds
        *what*, never *where*. `inputs` maps names to digests. `verify` reads the outputs and runs the stage again
        where their bytes are damaged; without it only their sizes are looked at.
        """
        identity = self.identity(stage, version, settings, inputs)
        found = self.find(stage, identity, verify=verify)
        if found:
            return found
        record = self._record(stage, identity)
        with _locked(record.with_suffix(".lock")):
            other = self._read(stage, identity, verify)  # another process may have finished it while we waited
            if isinstance(other, Finished):
                return other
            scratch = self.root / "work" / stage / identity[:16]
            scratch.mkdir(parents=True, exist_ok=True)
            start = time.monotonic()
            outputs = work(scratch)
            sizes = {name: path.stat().st_size for name, path in sorted(outputs.files.items())}
            digests = {name: self.store.put(path) for name, path in sorted(outputs.files.items())}
            write_json(
                record,
                {
                    "stage": stage,
                    "version": version,
                    "identity": identity,
                    "settings": json.loads(canonical_json(settings)),
                    "inputs": dict(inputs),
                    "files": digests,
                    "sizes": sizes,
                    "values": dict(outputs.values),
                    "seconds": round(time.monotonic() - start, 3),
                },
            )
            shutil.rmtree(scratch, ignore_errors=True)
        done = self._read(stage, identity, verify=False)
        assert isinstance(done, Finished), (stage, identity, done)
        return replace(done, fresh=True)

    @staticmethod
    def identity(stage: str, version: int, settings: Any, inputs: Mapping[str, str]) -> str:
        """Return the digest that `once` files the stage under."""
        return digest({"stage": stage, "version": version, "settings": settings, "inputs": inputs})

    def find(self, stage: str, identity: str, *, verify: bool = False) -> Finished | None:
        """Return the finished stage, or None where it must run: no record, or one whose promise does not hold.

        Outputs must be there with their sizes; with `verify`, with all their bytes. A torn or foreign record, and an
        object that is missing or damaged, are told in the log.
        """
        found = self._read(stage, identity, verify)
        if isinstance(found, Finished) or found is None:
            return found
        log.warning("%s counts as not finished: %s", f"{stage} {identity[:12]}", found)
        return None

    def records(self, stage: str) -> Iterator[dict[str, Any]]:
        """Yield every whole record of a stage; whether its outputs are still there is not looked at."""
        for file in sorted((self.root / "records" / stage).glob("*.json")):
            record = read_json(file)
            if _is_record(record):
                yield record

    def finished_since(self, stage: str, identity: str, when: float) -> bool:
        """Say whether the record was written after `when` (seconds since the epoch), perhaps by another process."""
        record = self._record(stage, identity)
        return record.exists() and record.stat().st_mtime >= when

    def _record(self, stage: str, identity: str) -> Path:
        return self.root / "records" / stage / f"{identity}.json"

    def _read(self, stage: str, identity: str, verify: bool) -> Finished | str | None:
        """Return the finished stage; or None for no record; or what is wrong, as a text."""
        path = self._record(stage, identity)
        try:
            record = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            return f"its record {path.name} cannot be read ({str(error)[:80]})."
        if not _is_record(record) or record["identity"] != identity:
            return f"its record {path.name} is torn, or another program's."
        digests, sizes = record["files"], record.get("sizes", {})
        get = self.store.verified if verify else self.store.path
        try:
            files = {name: get(sha256, sizes.get(name)) for name, sha256 in digests.items()}
        except MissingObject as error:
            return str(error).splitlines()[0]
        return Finished(stage, identity, files, digests, sizes, record["values"], False, record["seconds"])


def _is_record(record: Any) -> bool:
    """Say whether a JSON value has a record's keys, with values of their kinds."""
    kinds = {"identity": str, "files": dict, "values": dict, "seconds": int | float}
    return (
        isinstance(record, dict)
        and all(isinstance(record.get(key), kind) for key, kind in kinds.items())
        and all(isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in record["files"].values())
        and isinstance(record.get("sizes", {}), dict)
        and all(isinstance(size, int) for size in record.get("sizes", {}).values())
    )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive advisory lock; the kernel drops it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
