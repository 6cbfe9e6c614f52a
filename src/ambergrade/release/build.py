"""Builds a release folder: the same facts give the same bytes, wherever and whenever it is built.

<folder>/
  <name>-<version>.safetensors   the weights
  README.md                      the model card
  recipe.yaml                    formula, coefficients, inputs by digest
  evaluation.json                scores with intervals, scorers, winner set
  contact_sheet.png  heat_map.png
  lineage.json                   what was made from what, by digest
  MANIFEST.json                  sha256 and bytes of all of the above
  SHA256SUMS                     for `sha256sum -c`; MANIFEST.json is in it
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from ambergrade.errors import BadInput
from ambergrade.identity import file_digest
from ambergrade.nouns import Release
from ambergrade.release.card import card
from ambergrade.store import link_or_copy

MANIFEST = "MANIFEST.json"
SUMS = "SHA256SUMS"


def build(
    folder: Path,
    *,
    name: str,
    version: str,
    license: str,
    config: str,
    checkpoint: Path,
    recipe: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    training: Mapping[str, Any] | None = None,
    captions: Mapping[str, Any] | None = None,
    contact_sheet: Path,
    heat_map: Path | None = None,
    lineage: Mapping[str, Any] | None = None,
    summary: str = "",
) -> Release:
    """Build the release in `folder`, aside first and then put in place as a whole.

    An equal release that is already there is left alone; a different one is replaced in one step.

    checkpoint: one safetensors file; linked where the filesystem allows, else copied.
    config: what diffusers' `from_single_file(config=…)` needs: a hub id or `builtin://<family>`.
    recipe: `formula` (`name = expression`), `coefficients` {name: number}, `models` {name: {`sha256`, …}}, `family`,
        `dtype`; more keys are kept.
    evaluation: `prompts` {`name`, `count`}, `sampler` {`name`, `steps`, `guidance`, `width`, `height`}, `objective`,
        `scores` {metric: {model: Measurement}}, `winner_set` [point], `scorers` {name: {`fingerprint`, `tiny`}};
        optionally `differences` {metric: {model: Measurement}}, paired. Measurements may be nouns or their mappings.
    training, captions: facts for the card, shown in the order given.
    lineage: anything that names inputs by digest.

    Raises BadInput for missing keys, for a checkpoint that is not a safetensors file, and for an absolute path among
    the facts: it would differ from machine to machine.
    """
    if checkpoint.suffix != ".safetensors":
        raise BadInput(f"A release holds safetensors only, found {checkpoint.name}.\nWrite the weights as safetensors.")
    if folder.exists() and not (folder / MANIFEST).is_file() and any(folder.iterdir()):
        raise BadInput(f"{folder} holds other things than a release.\nName a new folder; a build replaces it.")
    facts = _plain(
        {"recipe": recipe, "evaluation": evaluation, "lineage": lineage, "training": training, "captions": captions}
    )
    _refuse_paths(facts)
    readme = card(
        name=name,
        version=version,
        license=license,
        config=config,
        recipe=facts["recipe"],
        evaluation=facts["evaluation"],
        training=facts["training"],
        captions=facts["captions"],
        summary=summary,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep_up(folder)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        link_or_copy(checkpoint, aside / f"{name}-{version}.safetensors")
        (aside / "README.md").write_text(readme, "utf-8")
        (aside / "recipe.yaml").write_text(recipe_yaml(facts["recipe"]), "utf-8")
        (aside / "evaluation.json").write_text(_json(facts["evaluation"]), "utf-8")
        shutil.copyfile(contact_sheet, aside / "contact_sheet.png")
        if heat_map is not None:
            shutil.copyfile(heat_map, aside / "heat_map.png")
        if lineage is not None:
            (aside / "lineage.json").write_text(_json(facts["lineage"]), "utf-8")
        release = _seal(aside, folder, {"name": name, "version": version})
        if not _equal(aside, folder):
            _put_in_place(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return release


def recipe_yaml(recipe: Mapping[str, Any]) -> str:
    """The recipe as YAML: the formula verbatim on top, then the other keys sorted."""
    head = "formula: |\n  " + str(recipe["formula"]).strip().replace("\n", "\n  ") + "\n"
    rest = {key: value for key, value in recipe.items() if key != "formula"}
    return head + str(yaml.safe_dump(rest, sort_keys=True, allow_unicode=True, width=120))


def _seal(aside: Path, folder: Path, head: Mapping[str, str]) -> Release:
    """Write MANIFEST.json and SHA256SUMS over everything in `aside`, and make it durable."""
    files = {path.name: path for path in sorted(aside.iterdir())}
    digests = {name: file_digest(path) for name, path in files.items()}
    listed = {name: {"sha256": digests[name], "bytes": path.stat().st_size} for name, path in files.items()}
    (aside / MANIFEST).write_text(_json({**head, "files": listed}), "utf-8")
    digests[MANIFEST] = file_digest(aside / MANIFEST)
    (aside / SUMS).write_text("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)), "utf-8")
    for path in aside.iterdir():
        if path.stat().st_nlink == 1:  # a linked checkpoint keeps the store's own mode
            path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    aside.chmod(0o755)
    return Release(folder, digests[MANIFEST], dict(sorted(digests.items())))


def _equal(aside: Path, folder: Path) -> bool:
    if not folder.is_dir() or {p.name for p in aside.iterdir()} != {p.name for p in folder.iterdir()}:
        return False
    return all(
        (folder / path.name).is_file()
        and (os.path.samefile(path, folder / path.name) or file_digest(path) == file_digest(folder / path.name))
        for path in aside.iterdir()
    )


def _put_in_place(aside: Path, folder: Path) -> None:
    """Rename `aside` to `folder`; what was there is at `aside` afterwards, for the caller to remove."""
    if not folder.exists():
        aside.rename(folder)
    elif not _exchange(aside, folder):  # no exchange on this filesystem: two renames, a moment without a release
        old = folder.with_name(f".{folder.name}.old.{os.getpid()}")
        folder.rename(old)
        aside.rename(folder)
        old.rename(aside)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step by Linux' renameat2(RENAME_EXCHANGE); False where that cannot be."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def _sweep_up(folder: Path) -> None:
    """Remove what builds that were killed left beside `folder`."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        pid = left.name.rsplit(".", 1)[-1]
        if pid.isdigit() and not _alive(int(pid)) and stat.S_ISDIR(left.lstat().st_mode):
            if ".old." in left.name and not folder.exists():
                left.rename(folder)
            else:
                shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _refuse_paths(facts: Any) -> None:
    found = [f"{key} = {text}" for key, text in _texts(facts) if PurePath(text).is_absolute() or "file:/" in text]
    if found:
        raise BadInput(
            "A release must not name places on this machine, found\n  " + "\n  ".join(found[:5]) + "\nName inputs by "
            "their digest, or by where a stranger finds them (builtin://…, a hub id)."
        )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a JSON value with the dotted key that leads to it."""
    if isinstance(value, dict):
        for inner, item in value.items():
            yield from _texts(item, f"{key}.{inner}" if key else inner)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _texts(item, f"{key}.{number}")
    elif isinstance(value, str):
        yield key, value


def _plain(value: Any) -> Any:
    """As JSON holds it: nouns as objects, what was not scored (NaN) as null; the order of keys stays."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    return None if isinstance(value, float) and value != value else value


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
