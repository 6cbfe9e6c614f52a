"""Runs the verbs that need no configuration beyond a file.

ambergrade merge RECIPE.yaml [a=0.9 …] [--models DIR] [--out FILE] [--overwrite] [--dry-run]
ambergrade verify RELEASE [--models DIR] [--rebuild] [--rescore] [--signature FILE --key FILE] [--skip LEVEL]
ambergrade verify MODEL.safetensors --models DIR
ambergrade compare RELEASE RELEASE [--out PICTURES.png]
ambergrade digest FILE …
"""

from __future__ import annotations

import argparse
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ambergrade.errors import AmbergradeError, BadSetting, MissingObject

if TYPE_CHECKING:
    from ambergrade.merge.files import RecipeFile

MOST_LINES = 20
"""A level prints at most so many lines of what it finds wrong."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0 for done, 1 for a user's mistake or a check that failed, told in a few lines."""
    for stream in (sys.stdout, sys.stderr):  # a file's name may be no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    given = _parser().parse_args(_coefficients_first(list(sys.argv[1:] if arguments is None else arguments)))
    try:
        return int(given.run(given))
    except AmbergradeError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:  # no right to read, too long a name, a full disk
        print(f"{str(error.filename)[:200]}: {error.strerror}" if error.filename else error, file=sys.stderr)
        return 1


def _coefficients_first(arguments: list[str]) -> list[str]:
    """The words with `a=0.9` beside the recipe, wherever among the options they were written."""
    numbers = [word for word in arguments[2:] if re.fullmatch(r"[\w.]+=[-+.\d][^/]*", word)]
    return [*arguments[:2], *numbers, *(word for word in arguments[2:] if word not in numbers)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ambergrade", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    merge = commands.add_parser("merge", help="run a recipe file")
    merge.add_argument("recipe", type=Path)
    merge.add_argument("coefficients", nargs="*", metavar="name=value", help="in place of the recipe's")
    merge.add_argument("--models", type=Path, help="folder that holds inputs which the recipe names by digest")
    merge.add_argument("--out", type=Path, help="in place of the recipe's")
    merge.add_argument("--overwrite", action="store_true", help="replace a model that is at the output's place")
    merge.add_argument("--dry-run", action="store_true", help="print the plan, its costs and its audit; write nothing")
    merge.add_argument("--device", default="cpu")
    merge.set_defaults(run=_merge)
    verify = commands.add_parser(
        "verify",
        help="check a release, level after level; or rebuild a merged file from its own header and compare the bytes",
        epilog=_levels(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verify.add_argument("subject", type=Path, metavar="RELEASE|MODEL.safetensors")
    verify.add_argument("--models", type=Path, help="folder that holds the inputs, under any names")
    verify.add_argument("--rebuild", action="store_true", help="merge again, and compare every byte")
    verify.add_argument("--rescore", action="store_true", help="draw and score again, and compare with the intervals")
    verify.add_argument("--signature", type=Path, help="OpenSSF model signature of the release's folder")
    verify.add_argument("--key", type=Path, help="the signer's public key (PEM)")
    verify.add_argument("--skip", action="append", default=[], metavar="LEVEL", help="leave a level out")
    verify.set_defaults(run=_verify)
    compare = commands.add_parser("compare", help="lay two releases side by side: recipe, parents, licence, scores")
    compare.add_argument("releases", nargs=2, type=Path, metavar="RELEASE")
    compare.add_argument("--out", type=Path, help="a .png for the pictures that both drew from the same prompts")
    compare.set_defaults(run=_compare)
    for command in (merge, verify):
        command.add_argument("--threads", type=_count, default=None)
    digest = commands.add_parser("digest", help="print a model file's digests, each under its name")
    digest.add_argument("files", nargs="+", type=Path, metavar="FILE", help="safetensors file or diffusers folder")
    digest.set_defaults(run=lambda given: print_digests(given.files))
    return parser


def _levels() -> str:
    from ambergrade.chain.verification import LEVELS

    rows = [f"  {level.code}  {level.name:<10}{level.says}" for level in LEVELS]
    return "\n".join(["exit codes: 0 all holds; 1 a mistake; else of the first level that does not hold:", *rows])


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"'{text[:40]}' is no count from 1 to 1024")
    return int(text)


def _merge(given: argparse.Namespace) -> int:
    from ambergrade.merge.files import read_recipe

    run_recipe(
        read_recipe(given.recipe, _numbers(given.coefficients)),
        out=given.out,
        dry_run=given.dry_run,
        threads=given.threads,
        device=given.device,
        models=given.models,
        overwrite=given.overwrite,
    )
    return 0


def run_recipe(
    written: RecipeFile,
    out: Path | None = None,
    dry_run: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    models: Path | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Plan and merge a recipe; print the audit and what was written.

    models: the folder for inputs that the recipe names by digest. Raises AmbergradeError for what cannot be merged,
    for an output that may not be replaced, and where a release's recipe does not give the release's bytes.
    """
    from ambergrade.door.outputs import refuse_overwrite
    from ambergrade.identity import file_digest
    from ambergrade.merge.engine import merge
    from ambergrade.merge.header import read_header
    from ambergrade.merge.inputs import Digests, default_cache

    target = out or written.out or (Path(written.result["name"]) if written.result else None)
    job = written.job(models)
    if target is not None:
        read = [file for opened in job.inputs.values() for file in opened.files]
        read += [written.source] if written.source else []
        may = overwrite or written.overwrite
        refuse_overwrite(target, [".safetensors"], overwrite=may or dry_run, inputs=read, check=read_header)
    print(job.told())
    if dry_run:
        return
    if target is None:
        raise BadSetting("Where shall the merge be written?\nGive out=FILE.safetensors, here or in the recipe.")
    report = merge(job, target, threads=threads, device=device, digests=Digests(default_cache()))
    sha256 = file_digest(target)
    print(f"read     {report.bytes_read:,} bytes in {report.seconds:.1f} s")
    print(f"written  {target}  {report.bytes_written:,} bytes, recipe {report.recipe.digest[:12]}")
    print(f"file     sha256 {sha256}")
    expected = written.result.get("file", sha256)
    if sha256 != expected:
        target.unlink()
        raise BadSetting(f"What was merged is NOT the released file, whose sha256 is {expected}; it was not kept.")
    if written.result:
        print("         the released file's bytes")


def _verify(given: argparse.Namespace) -> int:
    from ambergrade.chain.verification import Asked, verify_release

    if not given.subject.exists():
        raise MissingObject(f"Nothing at {given.subject}.\nGive a release's folder, or a merged file.")
    if not given.subject.is_dir():
        if given.models is None:
            raise BadSetting(f"{given.subject} is merged again from its inputs.\nName their folder: --models DIR")
        return 0 if verify_model(given.subject, given.models, threads=given.threads) else 1
    names = ("models", "signature", "key", "rebuild", "rescore", "threads")
    asked = Asked(skip=tuple(given.skip), **{name: getattr(given, name) for name in names})
    code = 0
    for found in verify_release(given.subject, asked):
        print(f"{found.level.name:<10} {found.told}", flush=True)
        for line in found.wrong[:MOST_LINES]:
            print(f"           {line}")
        if len(found.wrong) > MOST_LINES:
            print(f"           and {len(found.wrong) - MOST_LINES:,} lines more")
        code = code or (found.level.code if found.wrong else 0)
    return code


def _compare(given: argparse.Namespace) -> int:
    from ambergrade.chain.versions import compare_releases
    from ambergrade.door.outputs import refuse_overwrite

    if given.out is not None:
        refuse_overwrite(given.out, [".png"])
    one, other = given.releases
    print(compare_releases(one, other, given.out))
    return 0


def verify_model(model: Path, models: Path, *, threads: int | None = None) -> bool:
    """Rebuild a merged file and compare; prints what was found. Raises AmbergradeError where it cannot be rebuilt."""
    from ambergrade.merge.files import verify

    found = verify(model, models, threads=threads)
    print(found.recipe.formula.text)
    for alias, path in found.inputs.items():
        digests = ", ".join(f"{kind} {sha256[:12]}" for kind, sha256 in sorted(found.recipe.model(alias).items()))
        print(f"  {alias:<12} {digests}  {path}" + ("  (saved anew: equal weights)" if alias in found.resaved else ""))
    if found.same:
        print(f"verified: {found.bytes_compared:,} bytes are what the recipe in the header gives")
    else:
        print(f"NOT what its recipe gives: the first difference is at {found.first_difference}")
        print("".join(f"  {one}\n" for one in found.differing[:MOST_LINES]), end="")
    return found.same


def print_digests(files: Sequence[Path]) -> int:
    """Print every digest of model files, and remember none but the file's and the weights'."""
    from ambergrade.family.digests import listed_digests, model_digests
    from ambergrade.merge.inputs import Digests, default_cache

    known = Digests(default_cache())
    for path in files:
        digests = model_digests(path, known)
        rows = {"file": f"sha256 {digests.file}", "weights": f"sha256 {digests.weights}"}
        rows |= {} if path.is_dir() else listed_digests(path)
        print(path)
        for name, text in rows.items():
            print(f"  {name:<8} {text}")
    known.save()
    return 0


def _numbers(given: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in given:
        name, equals, text = one.partition("=")
        name = name.removeprefix("coefficients.")
        try:
            value = float(text)
        except ValueError:
            equals = ""
        if not equals:
            raise BadSetting(f"'{one}' is no coefficient.\nWrite name=number, as in a=0.9.")
        if name in found:
            raise BadSetting(f"The coefficient {name} is given twice.\nGive it once.")
        found[name] = value
    return found


if __name__ == "__main__":
    sys.exit(main())
