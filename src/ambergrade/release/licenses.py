"""Says under which licence a model may be given on, from the licences of the models that it was made of.

A licence is a yaml of conf/license (a project's own conf/license is looked at first). What it says there is a summary
for machines, which the licence's own text overrules. `unknown` stands for a model whose licence nobody named: what is
made of it is under no known licence either.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import yaml

from ambergrade.errors import AmbergradeError, BadInput, UnknownName
from ambergrade.places import CONF, project
from ambergrade.typed import settings

UNKNOWN = "unknown"


@dataclass(frozen=True)
class License:
    """What a licence asks of who gives on a model that was made of another."""

    title: str
    url: str
    hub: str
    """Its id on the Hugging Face hub; `other` for one that the hub does not list."""
    spdx: str | None
    commercial: bool | None
    """Whether the model may be used commercially; None: not known."""
    share_alike: bool
    """Whether what is made of the model bears this licence too."""
    passes_to: Literal["any", "none"] | tuple[str, ...]
    """Licences that what is made of the model may bear beside this one; none: it may not be given on."""
    notices: tuple[str, ...]
    """What goes with the model to whoever gets it."""


@dataclass(frozen=True)
class Derived:
    """The licence of a model, and why it is that one."""

    name: str
    why: str

    @property
    def passed(self) -> bool:
        """Whether the licence is known, so that a gate may let the model pass."""
        return self.name != UNKNOWN


class Incompatible(AmbergradeError):
    """Tells that no licence, or not the one asked for, satisfies all the models that a merge is made of."""


def _files() -> dict[str, Path]:
    mine = project()
    folders = [CONF / "license", *([mine / "conf" / "license"] if mine else [])]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


@cache
def load_license(name: str) -> License:
    """Read conf/license/<name>.yaml. Raises UnknownName with the nearest, BadSetting or BadInput for a broken file."""
    files = _files()
    if name not in files:
        raise UnknownName("license", name, files, f"Describe it in conf/license/{name[:40]}.yaml, as its siblings do.")
    try:
        values = yaml.safe_load(files[name].read_text("utf-8"))
    except yaml.YAMLError as error:
        raise BadInput(f"{files[name].name} cannot be read as yaml: {str(error).splitlines()[0]}") from None
    return settings(License, values, f"license {name}")


def derive(parents: Mapping[str, str], asked: str | None = None) -> Derived:
    """Return the licence that a model made of `parents` (alias to licence) bears; `asked` is the one that is wanted.

    Raises UnknownName for a licence without a yaml, Incompatible with the reason where the parents leave none, not the
    one that is asked for, or several of which nobody chose.
    """
    if asked is not None:
        load_license(asked)
    if not parents:
        named = asked not in (None, UNKNOWN)
        return Derived(asked or UNKNOWN, "named by who released it" if named else "nobody named it")
    known = {alias: load_license(name) for alias, name in parents.items()}
    if lost := [alias for alias, name in parents.items() if name == UNKNOWN]:
        if asked not in (None, UNKNOWN):
            raise Incompatible(
                f"The release cannot be under {asked}: nobody says what {', '.join(lost)} is under.\nName it: "
                f"origins.{lost[0]}.license=…, one of conf/license."
            )
        return Derived(UNKNOWN, f"nobody says what {', '.join(lost)} is under")
    allowed = {alias: _allowed(parents[alias], found) for alias, found in known.items()}
    left = set.intersection(*allowed.values())
    if asked is not None:
        if asked not in left:
            against = [alias for alias, names in allowed.items() if asked not in names]
            raise Incompatible(f"The release cannot be under {asked}.\n{_told(parents, allowed, against)}")
        return Derived(asked, "chosen among those that its parents allow")
    own = left & {*parents.values()}
    if len(own) == 1:
        name = own.pop()
        bearers = ", ".join(alias for alias, one in parents.items() if one == name)
        return Derived(name, f"it is the licence of {bearers}, and all other parents allow it")
    if not left:
        raise Incompatible(
            f"These models cannot be given on as one: no licence satisfies all.\n{_told(parents, allowed, [*parents])}"
        )
    raise Incompatible(
        f"Several licences satisfy the parents: {', '.join(sorted(own or left))}.\nName one: release.license=…"
    )


def _allowed(name: str, found: License) -> set[str]:
    if found.passes_to == "any":
        return {*_files()} - {UNKNOWN}
    return set() if found.passes_to == "none" else {name, *found.passes_to}


def _told(parents: Mapping[str, str], allowed: Mapping[str, set[str]], against: list[str]) -> str:
    lines = []
    for alias in against:
        title, names = load_license(parents[alias]).title, sorted(allowed[alias])
        told = f"only {' or '.join(names)}" if names else "nothing that is made of it"
        if len(names) < 8:  # one that allows any forbids nothing
            lines.append(f"  {alias} is under the {title}, which allows {told}.")
    return "\n".join(lines)
