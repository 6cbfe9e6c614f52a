"""Builds a release folder: the same facts give the same bytes, wherever and whenever it is built.

<folder>/
  release.json                   the facts, from which every paper below follows (`papers.papers`)
  README.md  recipe.yaml  evaluation.json  training.json  provenance.intoto.json  bom.cdx.json  civitai.html  …
  <name>-<version>.safetensors   the weights
  scores/  prompts.jsonl         score sheets, and the prompts with their seeds
  contact_sheet.png  heat_map.png  samples/
  config/                        what diffusers needs beside the weights: configs and tokenizers
  diffusers/  parents/           only where they were asked for: the weights as a folder, the models it was merged from
  MANIFEST.json                  sha256 and bytes of all of the above
  SHA256SUMS                     for `sha256sum -c`; MANIFEST.json is in it
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ambergrade.errors import BadInput
from ambergrade.family.convert import to_folder, write_config
from ambergrade.family.header import read_header
from ambergrade.identity import file_digest
from ambergrade.nouns import PromptSet, Release
from ambergrade.release.facts import FACTS, Draft, File, ReleaseFacts, parse_facts, write_facts
from ambergrade.release.papers import papers
from ambergrade.release.pictures import parameters, thumbnail, write_sample
from ambergrade.release.private import refuse_private
from ambergrade.release.sums import MANIFEST, SUMS, Listed, Manifest, sums_text
from ambergrade.release.weights import about, describe, write_weights
from ambergrade.store import copy_file
from ambergrade.typed import plain


@dataclass(frozen=True)
class Payload:
    """Holds what goes into a release and is no paper."""

    checkpoint: Path
    """One safetensors file."""
    config: Path
    """The family's diffusers-layout folder; of its weights none are taken."""
    prompts: PromptSet
    checkpoint_sha256: str | None = None
    """The file's sha256, as a record says it; other bytes are refused. None: it is not known."""
    as_it_is: bool = False
    """Keep the file's header, as of a file that was made elsewhere and is known by its digest."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Relative name to the file that is copied there: score sheets, pictures, parents."""
    samples: Sequence[npt.NDArray[np.uint8]] = ()
    """Pixels (height, width, 3) of the draft's samples, in their order."""
    diffusers: bool = False
    """Write the weights as a diffusers folder too."""

    def __post_init__(self) -> None:
        if self.checkpoint.suffix != ".safetensors":
            raise BadInput(
                f"A release holds safetensors only, found {self.checkpoint.name}.\nWrite the weights as safetensors."
            )


def build_release(folder: Path, draft: Draft, payload: Payload) -> Release:
    """Build the release in `folder`: aside first, as `.<folder>.partial`, then put in place as a whole.

    An equal release that is already there is left alone; another release is replaced, and nothing else ever is.

    Raises BadInput for a checkpoint or parent that is damaged, for a folder that holds anything but a release, and for
    what belongs to this machine among the facts: it would differ from machine to machine.
    """
    refuse_private(_public(draft))
    refuse_private(plain(payload.prompts), "prompts.jsonl")
    refuse_foreign(folder)
    read_header(payload.checkpoint)
    if payload.checkpoint_sha256 not in (None, file_digest(payload.checkpoint)):
        raise BadInput(f"{payload.checkpoint} is damaged: its sha256 is not {payload.checkpoint_sha256}.")
    with _partial(folder) as aside:
        facts = _fill(aside, draft, payload)
        for name, text in {FACTS: write_facts(facts), **papers(facts)}.items():
            (aside / name).write_text(text, "utf-8")
        digests = _seal(aside, draft)
        if not _equal(digests, folder):
            _put_in_place(aside, folder)
    return Release(folder, digests[MANIFEST], dict(sorted(digests.items())))


def _fill(aside: Path, draft: Draft, payload: Payload) -> ReleaseFacts:
    """Put every file that is no paper into the folder; return the facts as a reader of release.json will have them."""
    file = aside / draft.file
    header: dict[str, str] = {}
    if payload.as_it_is:
        copy_file(payload.checkpoint, file)
    else:
        told = about(
            title=f"{draft.name} {draft.version}",
            author=draft.author,
            license=draft.licenses[draft.license].title,
            resolution=draft.resolution,
            clip_skip=draft.evaluation.sampler.clip_skip,
            thumbnail=thumbnail(payload.samples[0]) if payload.samples else None,
        )
        header = write_weights(payload.checkpoint, file, told)
    weights = describe(file, draft.file, header)
    write_config(payload.config, aside / "config", read_header(file).entries)
    for name, source in payload.files.items():
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(source, aside / name)
    for alias, parent in draft.parents.items():
        there = aside / "parents" / (parent.name or alias)
        if there.is_file() and parent.file not in (None, file_digest(there)):
            raise BadInput(f"{there.name} is not the {alias} that was merged: its sha256 is not {parent.file}.")
    for sample, pixels in zip(draft.samples, payload.samples, strict=True):
        (aside / sample.file).parent.mkdir(exist_ok=True)
        write_sample(aside / sample.file, pixels, parameters(sample, draft.evaluation.sampler, weights))
    payload.prompts.write(aside / "prompts.jsonl")
    if payload.diffusers:
        to_folder(file, aside / "diffusers", payload.config)
    found = {name: File(file_digest(path), path.stat().st_size) for name, path in _files(aside) if path != file}
    for name in found:
        if name.endswith(("config.json", "model_index.json")):
            refuse_private(json.loads((aside / name).read_text("utf-8")), name)
    facts = ReleaseFacts(**{**vars(draft), "weights": weights, "files": found})
    return parse_facts(write_facts(facts).encode())


def _public(draft: Draft) -> object:
    """The facts but for what others' headers say, which cannot be changed: it is in the merged file too."""
    recipe = draft.recipe
    return plain(replace(draft, recipe=replace(recipe, ancestors={}) if recipe else None))


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Every file below a folder, by its relative name, sorted."""
    found = ((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if not path.is_dir())
    return sorted(found)


def _seal(aside: Path, draft: Draft) -> dict[str, str]:
    """Write MANIFEST.json and SHA256SUMS over everything in `aside`, make it durable, and return every sha256."""
    files = {name: Listed(file_digest(path), path.stat().st_size) for name, path in _files(aside)}
    manifest = Manifest(draft.name, draft.version, files)
    (aside / MANIFEST).write_text(manifest.text, "utf-8")
    digests = {name: one.sha256 for name, one in files.items()} | {MANIFEST: file_digest(aside / MANIFEST)}
    (aside / SUMS).write_text(sums_text(digests), "utf-8")
    for _, path in _files(aside):
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for folder in [*(path for path in aside.rglob("*") if path.is_dir()), aside]:
        folder.chmod(0o755)
        _sync(folder)
    return digests


def _sync(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _equal(digests: Mapping[str, str], folder: Path) -> bool:
    """Say whether a folder holds exactly these files."""
    if not folder.is_dir() or {name for name, _ in _files(folder)} != {*digests, SUMS}:
        return False
    return (folder / SUMS).read_bytes() == sums_text(digests).encode() and all(
        file_digest(folder / name) == sha256 for name, sha256 in digests.items()
    )


def refuse_foreign(folder: Path) -> None:
    """Raise BadInput where a folder holds anything that a build would not have put there."""
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise BadInput(f"{folder} is no folder of its own.\nName a new folder; a build replaces it.")
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        ours = {*manifest["files"], MANIFEST, SUMS}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        ours = set()
    folders = {parent.as_posix() for name in ours for parent in Path(name).parents}
    foreign = sorted(
        name
        for path in folder.rglob("*")
        if (name := path.relative_to(folder).as_posix()) not in (folders if _is_folder(path) else ours)
        or path.is_symlink()
        or not (path.is_file() or _is_folder(path))
    )
    if foreign:
        raise BadInput(
            f"{folder} holds other things than a release: {', '.join(foreign[:5])}.\n"
            "Name a new folder, or move them away; a build replaces the whole folder."
        )


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


@contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside `folder`, for one process at a time; what a killed build left there is cleared."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside, old = _beside(folder, "partial"), _beside(folder, "old")
    lock = os.open(folder.parent, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed, by whatever ends the process
        _clear(folder, aside, old)
        aside.mkdir()
        yield aside
    finally:
        _clear(folder, aside, old)
        os.close(lock)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def _clear(folder: Path, aside: Path, old: Path) -> None:
    """Remove what is half built, and the release before this one once this one is there."""
    shutil.rmtree(aside, ignore_errors=True)
    if not folder.exists() and old.is_dir():  # ended between the two renames
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _put_in_place(aside: Path, folder: Path) -> None:
    """Rename what is there away and `aside` to its place; between the two there is a moment without a release."""
    if folder.exists():
        folder.rename(_beside(folder, "old"))
    aside.rename(folder)
    _sync(folder.parent)
