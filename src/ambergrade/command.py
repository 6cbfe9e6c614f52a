"""The installed command: what needs no configuration beyond a recipe file.

ambergrade merge RECIPE.yaml [a=0.9 …] [--out FILE] [--dry-run]
ambergrade verify MODEL.safetensors --models DIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from ambergrade.errors import AmbergradeError, BadSetting


def main(arguments: Sequence[str] | None = None) -> int:
    """0 done, 1 a user's mistake or a check that failed, told in a few lines."""
    parser = argparse.ArgumentParser(prog="ambergrade", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    merge = commands.add_parser("merge", help="run a recipe file")
    merge.add_argument("recipe", type=Path)
    merge.add_argument("coefficients", nargs="*", metavar="name=value", help="in place of the recipe's")
    merge.add_argument("--out", type=Path, help="in place of the recipe's")
    merge.add_argument("--dry-run", action="store_true", help="print the plan, its costs and its audit; write nothing")
    verify = commands.add_parser("verify", help="rebuild a merged file from its own header and compare the bytes")
    verify.add_argument("model", type=Path)
    verify.add_argument("--models", type=Path, required=True, help="folder that holds the inputs, under any names")
    for command in (merge, verify):
        command.add_argument("--threads", type=int, default=None)
        command.add_argument("--device", default="cpu") if command is merge else None
    given = parser.parse_args(arguments)
    try:
        if given.command == "merge":
            merge_recipe(
                given.recipe,
                coefficients=_numbers(given.coefficients),
                out=given.out,
                dry_run=given.dry_run,
                threads=given.threads,
                device=given.device,
            )
            return 0
        return 0 if verify_model(given.model, given.models, threads=given.threads) else 1
    except AmbergradeError as error:
        print(error, file=sys.stderr)
        return 1


def merge_recipe(
    recipe: Path,
    *,
    coefficients: Mapping[str, float] | None = None,
    out: Path | None = None,
    dry_run: bool = False,
    threads: int | None = None,
    device: str = "cpu",
) -> None:
    """Read, plan, merge and print the audit. Raises AmbergradeError for what cannot be merged."""
    from ambergrade.merge.files import read_recipe

    run_written(read_recipe(recipe, coefficients), out=out, dry_run=dry_run, threads=threads, device=device)


def run_written(
    written: object, *, out: Path | None = None, dry_run: bool = False, threads: int | None = None, device: str = "cpu"
) -> None:
    """Plan and merge a `merge.files.Written`; print the audit and what was written."""
    from ambergrade.merge.engine import merge
    from ambergrade.merge.files import Written
    from ambergrade.merge.inputs import Digests, default_cache

    assert isinstance(written, Written)
    job = written.job()
    print(job.told())
    target = out or written.out
    if dry_run:
        return
    if target is None:
        raise BadSetting("Where shall the merge be written?\nGive out=FILE.safetensors, here or in the recipe.")
    report = merge(job, target, threads=threads, device=device, digests=Digests(default_cache()))
    print(f"read     {report.bytes_read:,} bytes in {report.seconds:.1f} s")
    print(f"written  {target}  {report.bytes_written:,} bytes, recipe {report.recipe.digest[:12]}")


def verify_model(model: Path, models: Path, *, threads: int | None = None) -> bool:
    """Rebuild and compare; prints what was found. Raises AmbergradeError where that is not possible."""
    from ambergrade.merge.files import verify

    found = verify(model, models, threads=threads)
    print(found.recipe.formula.text)
    for alias, path in found.inputs.items():
        print(f"  {alias:<12} {found.recipe.inputs[alias][:12]}  {path}")
    if found.same:
        print(f"verified: {found.bytes_compared:,} bytes are what the recipe in the header gives")
    else:
        print(f"NOT what its recipe gives: the first difference is at {found.first_difference}")
    return found.same


def _numbers(given: Sequence[str]) -> dict[str, float]:
    found = {}
    for one in given:
        name, equals, text = one.partition("=")
        try:
            found[name.removeprefix("coefficients.")] = float(text)
        except ValueError:
            equals = ""
        if not equals:
            raise BadSetting(f"'{one}' is no coefficient.\nWrite name=number, as in a=0.9.")
    return found


if __name__ == "__main__":
    sys.exit(main())
