"""Says whether a command may write its output where the user asks for it."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable
from pathlib import Path

from ambergrade.errors import AmbergradeError, BadSetting


def refuse_overwrite(
    out: Path,
    suffixes: Iterable[str],
    *,
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
    check: Callable[[Path], object] | None = None,
) -> None:
    """Raise BadSetting unless an output may be written at `out`.

    Its name must end in one of `suffixes`, such as `.safetensors`. What lies there already is replaced only with
    `overwrite`, and only if it is a regular file: never a folder, a link, a device, or one of `inputs` (the recipe and
    whatever else is read). `check` opens the file that would be replaced and raises an AmbergradeError where it is of
    another kind than its name says.
    """
    suffixes = tuple(suffixes)
    if out.suffix not in suffixes:
        raise BadSetting(f"{out} is no name for this output.\nIt must end in {' or '.join(suffixes)}.")
    try:
        found = out.lstat()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:  # too long a name, a file where a folder should be, a zero byte
        raise BadSetting(f"{str(out)[:200]} cannot be written: {str(error)[:80]}.\nName another file.") from None
    if not stat.S_ISREG(found.st_mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISLNK, "a link to another place"))
        kind = next((word for is_kind, word in kinds if is_kind(found.st_mode)), "a device")
        raise BadSetting(f"{out} is {kind}, which is never replaced.\nName a file.")
    if any(path.exists() and path.samefile(out) for path in inputs):
        raise BadSetting(f"{out} is read by this very command.\nName another output.")
    if check is not None:
        try:
            check(out)
        except AmbergradeError as error:
            raise BadSetting(f"{out} is there, and not of this command's making: {error}\nName another file.") from None
    if not overwrite:
        raise BadSetting(f"{out} is there already.\nName another file, or replace it with overwrite.")
