"""Builds a release folder: the same facts give the same bytes, wherever and whenever it is built.

<folder>/
  <name>-<version>.safetensors   the weights, a copy
  README.md                      the model card
  recipe.yaml                    formula, coefficients, inputs by digest: `ambergrade merge recipe.yaml --models DIR`
  evaluation.json                scores with intervals, scorers, winner set
  contact_sheet.png  heat_map.png
  lineage.json                   what was made from what, by digest
  MANIFEST.json                  sha256 and bytes of all of the above
  SHA256SUMS                     for `sha256sum -c`; MANIFEST.json is in it
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import yaml

from ambergrade.errors import BadInput
from ambergrade.family.digests import weights_sha256
from ambergrade.identity import file_digest
from ambergrade.nouns import Release, SamplerSettings
from ambergrade.release.card import card
from ambergrade.release.contents import Evaluation, Prompts, ReleaseContents, Scorer
from ambergrade.store import copy_file

MANIFEST = "MANIFEST.json"
SUMS = "SHA256SUMS"


def build_release(folder: Path, contents: ReleaseContents) -> Release:
    """Build the release in `folder`: aside first, as `.<folder>.partial`, then put in place as a whole.

    An equal release that is already there is left alone; another release is replaced, and nothing else ever is.

    Raises BadInput for a checkpoint that is damaged or no safetensors file, for a folder that holds anything but a
    release, and for an absolute path among the facts: it would differ from machine to machine.
    """
    about = {"recipe": {**contents.recipe, "ancestors": None}, "evaluation": contents.evaluation}
    facts = _plain({**about, **{key: getattr(contents, key) for key in ("lineage", "training", "captions")}})
    _refuse_paths(facts)
    _refuse_foreign(folder)
    readme = card(contents)
    with _partial(folder) as aside:
        checkpoint = aside / contents.file
        copy_file(contents.checkpoint, checkpoint)
        sha256 = file_digest(checkpoint)
        if contents.checkpoint_sha256 not in (None, sha256):
            raise BadInput(f"{contents.checkpoint} is damaged: its sha256 is not {contents.checkpoint_sha256}.")
        result = {"name": contents.file, "bytes": checkpoint.stat().st_size, "file": sha256}
        recipe = _plain({**contents.recipe, "result": {**result, "weights": weights_sha256(checkpoint)}})
        (aside / "README.md").write_text(readme, "utf-8")
        (aside / "recipe.yaml").write_text(recipe_yaml(recipe), "utf-8")
        (aside / "evaluation.json").write_text(_json(facts["evaluation"]), "utf-8")
        copy_file(contents.contact_sheet, aside / "contact_sheet.png")
        if contents.heat_map is not None:
            copy_file(contents.heat_map, aside / "heat_map.png")
        if contents.lineage is not None:
            (aside / "lineage.json").write_text(_json(facts["lineage"]), "utf-8")
        digests = _seal(aside, {"name": contents.name, "version": contents.version})
        if not _equal(digests, folder):
            _put_in_place(aside, folder)
    return Release(folder, digests[MANIFEST], dict(sorted(digests.items())))


def build(folder: Path, *, recipe: Mapping[str, Any], evaluation: Mapping[str, Any], **about: Any) -> Release:
    """Build a release from mappings, as earlier versions did; `build_release` takes its place."""
    models = {alias: {"weights": row["sha256"]} for alias, row in recipe["models"].items()}
    document = {key: recipe[key] for key in ("formula", "coefficients")} | {"models": models}
    document |= {"policies": recipe.get("policies", {})}
    document["dtype"] = recipe["dtype"] if recipe["dtype"] in ("fp32", "fp16", "bf16") else None
    given = Evaluation(
        **{
            **evaluation,
            "prompts": Prompts(**evaluation["prompts"]),
            "sampler": SamplerSettings(**evaluation["sampler"]),
            "scorers": {name: Scorer(**row) for name, row in evaluation["scorers"].items()},
        }
    )
    contents = ReleaseContents(recipe=document, evaluation=given, family=recipe["family"], **about)
    return build_release(folder, contents)


def recipe_yaml(recipe: Mapping[str, Any]) -> str:
    """Write the recipe as YAML: the formula verbatim on top, then the other keys sorted."""
    formula = str(recipe["formula"]).strip()
    if all(line.isprintable() for line in formula.split("\n")):
        head = "formula: |\n  " + formula.replace("\n", "\n  ") + "\n"
    else:  # odd line breaks, which a block of text does not keep
        head = str(yaml.safe_dump({"formula": formula}, allow_unicode=True, width=120))
    rest = {key: value for key, value in recipe.items() if key != "formula"}
    return head + str(yaml.safe_dump(rest, sort_keys=True, allow_unicode=True, width=120))


def _seal(aside: Path, head: Mapping[str, str]) -> dict[str, str]:
    """Write MANIFEST.json and SHA256SUMS over everything in `aside`, make it durable, and return every sha256."""
    files = {path.name: path for path in sorted(aside.iterdir())}
    digests = {name: file_digest(path) for name, path in files.items()}
    listed = {name: {"sha256": digests[name], "bytes": path.stat().st_size} for name, path in files.items()}
    (aside / MANIFEST).write_text(_json({**head, "files": listed}), "utf-8")
    digests[MANIFEST] = file_digest(aside / MANIFEST)
    (aside / SUMS).write_text("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)), "utf-8")
    for path in aside.iterdir():
        path.chmod(0o644)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    aside.chmod(0o755)
    _sync(aside)
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
    if not folder.is_dir() or {path.name for path in folder.iterdir()} != {*digests, SUMS}:
        return False
    sums = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
    return (folder / SUMS).read_bytes() == sums.encode() and all(
        file_digest(folder / name) == sha256 for name, sha256 in digests.items()
    )


def _refuse_foreign(folder: Path) -> None:
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
    foreign = sorted(path.name for path in folder.iterdir() if path.name not in ours or not path.is_file())
    if foreign:
        raise BadInput(
            f"{folder} holds other things than a release: {', '.join(foreign[:5])}.\n"
            "Name a new folder, or move them away; a build replaces the whole folder."
        )


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


def _refuse_paths(facts: Any) -> None:
    found = [f"{key} = {text}" for key, text in _texts(facts) if PurePath(text).is_absolute() or "file:/" in text]
    if found:
        raise BadInput(
            "A release must not name places on this machine, found\n  " + "\n  ".join(found[:5]) + "\nName inputs by "
            "their digest, or by where a stranger finds them (builtin://…, a hub id)."
        )


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every text in a JSON value with the dotted key that leads to it."""
    if isinstance(value, dict):
        for inner, item in value.items():
            yield from _texts(item, f"{key}.{inner}" if key else inner)
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _texts(item, f"{key}.{number}")
    elif isinstance(value, str):
        yield key, value


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it: nouns as objects, what was not scored (NaN) as null; the order of keys stays."""
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
