"""The store holds bytes by content; the ledger's records alone say which stages are finished.

<root>/store/sha256/ab/cdef…           written aside, fsynced, renamed, read-only
<root>/records/<stage>/<identity>.json written last: the commit point of a stage
<root>/work/<stage>/<identity>/        a stage's scratch folder; survives a kill, removed at the end
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ambergrade.errors import MissingObject, UnknownName
from ambergrade.identity import digest, file_digest

BUILTIN = Path(__file__).parent / "world" / "weights"


def find_file(source: str) -> Path:
    """The local path behind `builtin://name` (shipped with the package) or an ordinary path.

    Raises UnknownName for a builtin that is not shipped, MissingObject for a path that is not there.
    """
    if source.startswith("builtin://"):
        name = source.removeprefix("builtin://")
        path = BUILTIN / name
        if not path.exists():
            known = [p.relative_to(BUILTIN).as_posix() for p in BUILTIN.iterdir()] if BUILTIN.is_dir() else []
            raise UnknownName("builtin", name, known)
        return path
    path = Path(source).expanduser()
    if not path.exists():
        raise MissingObject(f"No file or folder at {path}.\nName an existing path, or builtin://<name> for what ships.")
    return path


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success fsync it and rename it over `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    aside = Path(name)
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.chmod(0o644)
        aside.rename(target)
    finally:
        aside.unlink(missing_ok=True)


def write_json(target: Path, value: Any) -> None:
    """Write sorted, indented JSON under its final name in one step."""
    with written_aside(target) as aside:
        aside.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def copy_file(source: Path, target: Path) -> None:
    """Copy a file to `target` in one step: whole or not at all."""
    with written_aside(target) as aside:
        shutil.copyfile(source, aside)


def link_or_copy(source: Path, target: Path) -> None:
    """Put `source` at `target` by hard link, or by copy across filesystems; replaces in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    try:
        os.link(source, aside)
    except OSError:
        shutil.copyfile(source, aside)
    os.replace(aside, target)
    aside.unlink(missing_ok=True)  # POSIX: renaming onto another link of the same file does nothing


@dataclass(frozen=True)
class Store:
    """Bytes by content."""

    root: Path

    def path(self, sha256: str) -> Path:
        """Where the bytes lie. Raises MissingObject if they do not."""
        path = self._place(sha256)
        if not path.exists():
            raise MissingObject(f"The store {self.root} holds no object {sha256[:12]}….\nRun the stage again.")
        return path

    def holds(self, sha256: str) -> bool:
        return self._place(sha256).exists()

    def put(self, source: Path) -> str:
        """Take a copy of a file and return its sha256."""
        sha256 = file_digest(source)
        place = self._place(sha256)
        if not place.exists():
            with written_aside(place) as aside:
                shutil.copyfile(source, aside)
            place.chmod(0o444)
        return sha256

    def _place(self, sha256: str) -> Path:
        return self.root / "sha256" / sha256[:2] / sha256[2:]


@dataclass(frozen=True)
class Outputs:
    """What a stage's work returns: files to keep, by name, and small JSON values."""

    files: Mapping[str, Path] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Finished:
    """A finished stage, fresh or from its record."""

    stage: str
    identity: str
    files: Mapping[str, Path]
    """Name to path in the store."""
    digests: Mapping[str, str]
    """Name to sha256."""
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
    ) -> Finished:
        """Return the finished stage, running `work(scratch folder)` only if no record holds its identity.

        `version` is the stage's numerics version: raise it when its results change. `settings` holds
        *what*, never *where*. `inputs` maps names to digests.
        """
        identity = self.identity(stage, version, settings, inputs)
        found = self.find(stage, identity)
        if found:
            return found
        record = self._record(stage, identity)
        with _locked(record.with_suffix(".lock")):
            found = self.find(stage, identity)  # another process may have finished it while we waited
            if found:
                return found
            scratch = self.root / "work" / stage / identity[:16]
            scratch.mkdir(parents=True, exist_ok=True)
            start = time.monotonic()
            outputs = work(scratch)
            digests = {name: self.store.put(path) for name, path in sorted(outputs.files.items())}
            write_json(
                record,
                {
                    "stage": stage,
                    "version": version,
                    "identity": identity,
                    "settings": json.loads(json.dumps(settings, default=_as_json)),
                    "inputs": dict(inputs),
                    "files": digests,
                    "values": dict(outputs.values),
                    "seconds": round(time.monotonic() - start, 3),
                },
            )
            shutil.rmtree(scratch, ignore_errors=True)
        done = self.find(stage, identity)
        assert done is not None, (stage, identity)
        return Finished(done.stage, done.identity, done.files, done.digests, done.values, True, done.seconds)

    @staticmethod
    def identity(stage: str, version: int, settings: Any, inputs: Mapping[str, str]) -> str:
        """What `once` files the stage under."""
        return digest({"stage": stage, "version": version, "settings": settings, "inputs": inputs})

    def find(self, stage: str, identity: str) -> Finished | None:
        """The finished stage, or None. A record whose bytes were deleted counts as not finished."""
        path = self._record(stage, identity)
        if not path.exists():
            return None
        record = json.loads(path.read_text())
        digests: dict[str, str] = record["files"]
        if not all(self.store.holds(sha256) for sha256 in digests.values()):
            return None
        files = {name: self.store.path(sha256) for name, sha256 in digests.items()}
        return Finished(stage, identity, files, digests, record["values"], False, record["seconds"])

    def finished_since(self, stage: str, identity: str, when: float) -> bool:
        """Whether the record was written after `when` (seconds since the epoch), perhaps by another process."""
        record = self._record(stage, identity)
        return record.exists() and record.stat().st_mtime >= when

    def _record(self, stage: str, identity: str) -> Path:
        return self.root / "records" / stage / f"{identity}.json"


def _as_json(value: Any) -> Any:
    from ambergrade.identity import canonical_json

    return json.loads(canonical_json(value))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive advisory lock; the kernel drops it when the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
