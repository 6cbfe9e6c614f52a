"""Writes the help of a pipeline: its docstring, its choices, and its settings as their yaml explains them."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ambergrade.door.compose import options


def help_text(about: str, config_name: str, conf: Path) -> str:
    """The help of one pipeline. about: its docstring, with examples."""
    text = (conf / f"{config_name}.yaml").read_text()
    parts = [inspect.cleandoc(about)]
    choices = _group_lines(yaml.safe_load(text) or {}, conf)
    if choices:
        parts.append("Choices (group=option; the default in brackets; one file each in conf/<group>/):\n" + choices)
    blocks = re.split(r"(?m)^(?=(?:#.*\n)*[^\s#])", text)
    keys = "".join(block for block in blocks if not re.match(r"(defaults|hydra):", block)).strip()
    parts.append(f"Settings (key=value), from conf/{config_name}.yaml:\n" + textwrap.indent(keys, "  "))
    parts.append(
        "Flags: --multirun runs key=1,2,3 as three runs; --cfg job prints the whole configuration; debug=true shows\n"
        "tracebacks; --hydra-help tells the rest."
    )
    return "\n\n".join(parts)


def _group_lines(root: Mapping[str, Any], conf: Path) -> str:
    lines = []
    for entry in root.get("defaults", []):
        if not isinstance(entry, Mapping):
            continue
        ((key, default),) = entry.items()
        group = key.removeprefix("optional ").removeprefix("override ").lstrip("/").split("@")[0]
        known = options(group, conf)
        if known:
            shown = " | ".join(f"[{option}]" if option == default else option for option in known)
            head = f"  {group:<14}"
            lines.append(textwrap.fill(shown, 110, initial_indent=head, subsequent_indent=" " * len(head)))
    return "\n".join(lines)
