"""Finds a merge's inputs in a folder by their digests, whatever their names: by their files, else by their weights."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ambergrade.errors import BadInput, MissingObject
from ambergrade.family.digests import files_digest, model_digests, model_files
from ambergrade.family.files import PASSIVE_FILE
from ambergrade.merge.lora import with_config
from ambergrade.store import Digests


@dataclass(frozen=True)
class Found:
    """Says where the inputs lie."""

    paths: Mapping[str, Path]
    """By alias."""
    resaved: tuple[str, ...]
    """Aliases of files that hold the same weights as the one that is named, in other bytes."""


def find_inputs(
    inputs: Mapping[str, Mapping[str, str]],
    folder: Path,
    known: Digests,
    *,
    names: Collection[str] = (),
    skip: Collection[Path] = (),
) -> Found:
    """Find the files and diffusers folders under `folder` that have the digests of `inputs`.

    `inputs` gives for each alias its `file` digest, its `weights` digest, or both. Files called as in `names` are read
    first, those of `skip` never. Raises MissingObject with the digests of inputs that are not there.
    """
    if not folder.is_dir():
        raise MissingObject(f"{folder} is no folder.\nName the folder that holds the inputs.")
    passed_over: list[str] = []
    candidates = sorted(_candidates(folder, skip, passed_over), key=lambda path: path.name not in names)
    wanted = {kind: {alias: d[kind] for alias, d in inputs.items() if kind in d} for kind in ("file", "weights")}
    try:
        by_file = _matches(wanted["file"], candidates, lambda path: _file(path, known), passed_over)
        left = {alias: sha256 for alias, sha256 in wanted["weights"].items() if alias not in by_file}
        by_weights = _matches(left, candidates, lambda path: _weights(path, known), passed_over)
    finally:
        known.save()
    paths = {**by_weights, **by_file}
    missing = [f"{alias}: {_told(digests)}" for alias, digests in inputs.items() if alias not in paths]
    if missing:
        notes = [f"Passed over: {note}" for note in dict.fromkeys(passed_over)][:8]
        raise MissingObject(
            "\n  ".join([f"{folder} does not hold every input. Missing:", *missing]) + "".join(f"\n{n}" for n in notes)
        )
    return Found({alias: paths[alias] for alias in inputs}, tuple(alias for alias in by_weights if alias in inputs))


def _told(digests: Mapping[str, str]) -> str:
    return ", ".join(f"sha256 {sha256} ({kind})" for kind, sha256 in sorted(digests.items()))


def _file(path: Path, known: Digests) -> str:
    return with_config(path, files_digest(path, {part: known.of_file(part) for part in model_files(path)}), known)


def _weights(path: Path, known: Digests) -> str:
    return with_config(path, model_digests(path, known).weights, known)


def _matches(
    wanted: Mapping[str, str], candidates: Iterable[Path], digest_of: Callable[[Path], str], passed_over: list[str]
) -> dict[str, Path]:
    """Return the first candidate with each digest, by alias; no more candidates are read than that takes."""
    where: dict[str, Path] = {}
    missing = set(wanted.values())
    for path in tqdm(candidates, "look for the inputs", leave=False, disable=None):
        if not missing:
            break
        try:
            sha256 = digest_of(path)
        except (BadInput, MissingObject, OSError) as error:
            passed_over.append(f"{path.name} ({str(error).splitlines()[0][:120]})")
            continue
        if sha256 in missing:
            missing.remove(sha256)
            where[sha256] = path
    return {alias: where[sha256] for alias, sha256 in wanted.items() if sha256 in where}


def _candidates(folder: Path, skip: Collection[Path], passed_over: list[str]) -> Iterator[Path]:
    for path in sorted(folder.rglob("model_index.json")):
        yield path.parent
    for path in sorted(folder.rglob("*.safetensors")):
        if not path.exists():
            passed_over.append(f"{path.name} (a broken link)")
        elif path.is_file() and path.name != PASSIVE_FILE and not any(path.samefile(other) for other in skip):
            yield path
