"""Checks a release that a stranger holds: level after level, each with an exit code of its own.

The levels that neither draw nor read score sheets need no torch, no pyarrow and nothing but the folder. The folder is
hostile until it is proven otherwise: no level raises anything but an AmbergradeError for what lies in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ambergrade import __version__
from ambergrade.errors import AmbergradeError, BadInput, BadSetting, UnknownName
from ambergrade.family.digests import listed_digests, weights_sha256
from ambergrade.family.header import read_header
from ambergrade.merge.files import read_recipe, recipe_of, verify
from ambergrade.merge.find import find_inputs
from ambergrade.merge.inputs import Digests, default_cache
from ambergrade.merge.recipe import Recipe
from ambergrade.release.facts import FACTS, ReleaseFacts, read_facts, write_facts
from ambergrade.release.papers import papers
from ambergrade.release.signature import check_signature
from ambergrade.release.sums import MANIFEST, MOST_BYTES, check_sums, inside, read_manifest, read_text

MOST_TENSORS = 20
"""Lines that tell of tensors."""
MOST_LETTERS = 600
"""A line that tells what does not hold is cut after so many letters."""
PARENTS = "parents"
"""The folder of a release that holds what it was merged from, where it is bundled."""


@dataclass(frozen=True)
class Level:
    """One thing that is checked of a release."""

    name: str
    code: int
    """Exit code of the command where this level is the first that does not hold."""
    says: str
    """What holds where it does."""


LEVELS = tuple(
    Level(*row)
    for row in [
        ("sums", 11, "every listed file is there in its bytes, and no other file, link or folder"),
        ("headers", 12, "the weights have the digests that the release names, and their header holds recipe.yaml"),
        ("papers", 13, "every text follows from release.json"),
        ("scores", 14, "every number follows from the score sheets"),
        ("signature", 15, "the folder is signed by the key"),
        ("inputs", 16, "the parents are there, equal by their weights"),
        ("rebuild", 17, "merging again gives the released bytes"),
        ("rescore", 18, "drawing and scoring again gives scores within their intervals"),
    ]
)


@dataclass(frozen=True)
class Asked:
    """What of a release shall be checked; sums, headers, papers and scores always are, unless they are skipped."""

    models: Path | None = None
    """Folder that holds the parents under any names; None: the release's own, where it bundles them."""
    signature: Path | None = None
    key: Path | None = None
    """The signer's public key (PEM)."""
    rebuild: bool = False
    rescore: bool = False
    skip: tuple[str, ...] = ()
    """Names of levels."""
    threads: int | None = None

    def __post_init__(self) -> None:
        names = [level.name for level in LEVELS]
        for name in self.skip:
            if name not in names:
                raise UnknownName("level", name, names)
        if (self.signature is None) != (self.key is None):
            raise BadSetting(
                "A signature is checked by the signer's public key.\nGive both: --signature FILE --key FILE"
            )


@dataclass(frozen=True)
class Finding:
    """What a level found."""

    level: Level
    told: str
    """In a few words."""
    wrong: tuple[str, ...] = ()
    """What does not hold, a line each, files named."""


def verify_release(folder: Path, asked: Asked) -> Iterator[Finding]:
    """Check a release; yield what each level found, cheap ones first.

    A level after one that does not hold is still checked, but for merging and drawing again: what that would run is not
    to be trusted then. Raises BadInput where `folder` holds no release at all.
    """
    if not any((folder / name).is_file() for name in (FACTS, MANIFEST)):
        raise BadInput(f"{folder} is no release: it has no {FACTS}.\nGive a release's folder, or a merged file.")
    models = asked.models or (folder / PARENTS if (folder / PARENTS).is_dir() else None)
    release = _Opened(folder, asked, models)
    checks: Mapping[str, Callable[[_Opened], str] | None] = {
        "sums": _sums,
        "headers": _headers,
        "papers": _papers,
        "scores": _scores,
        "signature": _signature if asked.signature else None,
        "inputs": _inputs if models or asked.rebuild else None,
        "rebuild": _rebuild if asked.rebuild else None,
        "rescore": _rescore if asked.rescore else None,
    }
    if not any(check and name not in asked.skip for name, check in checks.items()):
        raise BadSetting("Every level is skipped: nothing would be checked.\nLeave one level in.")
    holds = True
    for level in LEVELS:
        check = checks[level.name]
        if check is None or level.name in asked.skip:
            continue
        if level.name in ("rebuild", "rescore") and not holds:
            yield Finding(level, "not tried, since what it would run does not hold", ("see above",))
            continue
        try:
            yield Finding(level, check(release))
        except _Wrong as wrong:
            holds = False
            yield Finding(level, "does not hold", tuple(map(_printable, wrong.lines)))
        except AmbergradeError as error:
            holds = False
            yield Finding(level, "does not hold", tuple(map(_printable, str(error).splitlines())))


_CONTRADICTED = (
    *(LookupError, TypeError, ValueError, ArithmeticError),
    *(AttributeError, RuntimeError, AssertionError, StopIteration),
)
"""What deriving papers raises where facts that are sound one by one do not fit each other."""


class _Wrong(Exception):
    """A level does not hold."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = tuple(lines)
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class _Opened:
    folder: Path
    asked: Asked
    models: Path | None

    @property
    def facts(self) -> ReleaseFacts:
        return read_facts(self.folder)

    @property
    def weights(self) -> Path:
        """The released file."""
        return inside(self.folder, self.facts.file)


def _sums(release: _Opened) -> str:
    if wrong := check_sums(release.folder):
        raise _Wrong(wrong)
    files = read_manifest(release.folder).files
    return f"{len(files) + 2:,} files, {sum(one.bytes for one in files.values()):,} bytes; none is missing or added"


def _headers(release: _Opened) -> str:
    facts, file = release.facts, release.weights
    header = read_header(file)
    found = {"bytes": header.size, "weights": weights_sha256(file), "listed": listed_digests(file)}
    said = {"bytes": facts.weights.bytes, "weights": facts.weights.weights, "listed": dict(facts.weights.listed)}
    wrong = [f"{file.name}: {path} is {found}, {FACTS} says {wanted}" for path, found, wanted in _apart(found, said)]
    for name in sorted(facts.files):
        if name.endswith(".safetensors") and name != file.name:
            read_header(inside(release.folder, name))
    if facts.recipe is not None:
        written = read_recipe(release.folder / "recipe.yaml").recipe
        if written is None:
            raise BadInput("recipe.yaml does not name every input by its weights.")
        pairs = _apart(_header_of(recipe_of(file)), _header_of(written))
        wrong += [f"{file.name}: the header's {path} is {one}, recipe.yaml says {other}" for path, one, other in pairs]
    if wrong:
        raise _Wrong(wrong)
    told = "of unknown origin" if facts.recipe is None else "the header's recipe is recipe.yaml"
    return f"{len(header.entries):,} tensors, {told}; weights {facts.weights.weights[:12]}"


def _header_of(recipe: Recipe) -> dict[str, Any]:
    """Return all that a header says because of a recipe."""
    return {**recipe.full, "ancestors": dict(recipe.ancestors), "header": dict(recipe.released)}


def _papers(release: _Opened) -> str:
    facts, manifest = release.facts, read_manifest(release.folder)
    text = read_text(release.folder / FACTS, MOST_BYTES * 4)
    wrong = [] if write_facts(facts) == text else [f"{FACTS} is not written as a release writes it"]
    try:
        wanted = papers(facts)
    except _CONTRADICTED as error:
        raise BadInput(f"{FACTS} contradicts itself: {type(error).__name__} {str(error)[:120]}.") from None
    for name, paper in sorted(wanted.items()):
        wrong += _paper_wrong(name, read_text(release.folder / name, MOST_BYTES * 4), paper)
    if (manifest.name, manifest.version) != (facts.name, facts.version):
        wrong.append(f"{MANIFEST} is of {manifest.name} {manifest.version}, {FACTS} of {facts.name} {facts.version}")
    listed = {name: (one.sha256, one.bytes) for name, one in manifest.files.items()}
    known = {name: (one.sha256, one.bytes) for name, one in facts.files.items()}
    known[facts.file] = (facts.weights.file, facts.weights.bytes)
    for name in sorted(known.keys() | listed.keys() - wanted.keys() - {FACTS}):
        if known.get(name) != listed.get(name):
            wrong.append(f"{name} is not the file that {FACTS} names" if name in known else f"{name} is not in {FACTS}")
    if wrong and facts.environment.ambergrade != __version__:
        made = facts.environment.ambergrade
        wrong.append(
            f"The release was made with ambergrade {made}, and this is {__version__}: that one may write otherwise"
        )
    if wrong:
        raise _Wrong(wrong)
    return f"{', '.join(sorted(wanted))} follow from {FACTS}"


def _paper_wrong(name: str, found: str, wanted: str) -> list[str]:
    """Name what is changed in a paper: by keys in JSON, else the first line."""
    if found == wanted:
        return []
    if name.endswith(".json"):
        try:
            pairs = _apart(json.loads(found), json.loads(wanted))
        except (ValueError, RecursionError):
            return [f"{name} is no JSON any more"]
        return [f"{name}: {path} is {one}, {FACTS} gives {other}" for path, one, other in pairs] or [
            f"{name} is not written as a release writes it"
        ]
    lines = zip(found.split("\n"), [*wanted.split("\n"), *[""] * found.count("\n")], strict=False)
    for number, (one, other) in enumerate(lines, 1):
        if one != other:
            return [f"{name}, line {number}: {_short(one)} is not what {FACTS} gives: {_short(other)}"]
    return [f"{name} ends before its last line"]


def _apart(found: Any, wanted: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield the dotted keys at which two JSON values differ, with both values."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in [*wanted, *(key for key in found if key not in wanted)]:
            yield from _apart(found.get(key), wanted.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(found, list | tuple) and isinstance(wanted, list | tuple) and len(found) == len(wanted):
        for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
            yield from _apart(one, other, f"{path}[{number}]")
    elif found != wanted or isinstance(found, bool) != isinstance(wanted, bool):
        yield path, _short(found), _short(wanted)


def _printable(line: str) -> str:
    """Escape what a hostile name could do to a terminal, and cut what is endless."""
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line[:MOST_LETTERS])
    return text if len(line) <= MOST_LETTERS else text + " …"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, default=str)
    return text if len(text) <= 160 else text[:156] + " …"


def _scores(release: _Opened) -> str:
    from ambergrade.chain.numbers import unequal  # pyarrow and scipy
    from ambergrade.score.sheet import suspected

    evaluation = release.facts.evaluation
    for name in evaluation.sheets.values():
        inside(release.folder, name)
    with suspected("The score sheets"):
        wrong = unequal(evaluation, release.folder)
    if wrong:
        raise _Wrong([f"{FACTS}: {line}" for line in wrong])
    numbers = sum(len(row) for row in [*evaluation.scores.values(), *evaluation.differences.values()])
    return f"{numbers:,} numbers with their intervals follow from {len(evaluation.sheets)} score sheets"


def _signature(release: _Opened) -> str:
    signature, key = release.asked.signature, release.asked.key
    assert signature is not None
    assert key is not None
    check_signature(release.folder, signature, key)
    return f"signed by {key.name}"


def _inputs(release: _Opened) -> str:
    parents = release.facts.parents
    if not parents:
        return "none: nobody knows what the weights were made of"
    if release.models is None:
        raise BadSetting("The release bundles no parents.\nGive the folder that holds them: --models DIR")
    wanted = {
        alias: {kind: sha256 for kind, sha256 in parent.digests.items() if kind != "name"}
        for alias, parent in parents.items()
    }
    names = {parent.name for parent in parents.values() if parent.name}
    found = find_inputs(wanted, release.models, Digests(default_cache()), names=names, skip=[release.weights])
    told = ", ".join(f"{alias} {path.name}" for alias, path in found.paths.items())
    return told + (f"; saved anew, of equal weights: {', '.join(found.resaved)}" if found.resaved else "")


def _rebuild(release: _Opened) -> str:
    facts = release.facts
    if facts.recipe is None:
        raise BadInput("Nobody knows how the weights were made, so they cannot be merged again.")
    if release.models is None:
        raise BadSetting("The release bundles no parents.\nGive the folder that holds them: --models DIR")
    found = verify(release.weights, release.models, threads=release.asked.threads)
    if found.same:
        return f"{found.bytes_compared:,} bytes are what the recipe gives"
    lines = [f"{facts.file}: the first difference is at {found.first_difference}"]
    lines += [f"  {one}" for one in found.differing[:MOST_TENSORS]]
    if len(found.differing) > MOST_TENSORS:
        lines.append(f"  and {len(found.differing) - MOST_TENSORS:,} tensors more")
    from ambergrade.chain.environment import packages

    here = packages("ambergrade")
    lines += [
        f"made with {name} {said}, here {one}" for name, one, said in _apart(here, dict(facts.environment.packages))
    ]
    raise _Wrong(lines)


def _rescore(release: _Opened) -> str:
    from ambergrade.chain.rescoring import rescored  # torch

    try:
        outside, told = rescored(release.folder, release.facts)
    except (*_CONTRADICTED, OSError) as error:  # scorers, configs and tokenizers are loaded by libraries
        raise BadInput(
            f"What the release says of its scorers, or a file in config/, cannot be loaded: {type(error).__name__} "
            f"{str(error)[:160]}"
        ) from None
    if outside:
        raise _Wrong(outside)
    return told
