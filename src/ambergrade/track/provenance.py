"""Finds what made a run: code with uncommitted changes, locked packages, hardware; tags of runs, files of parents."""

from __future__ import annotations

import functools
import getpass
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

CODE = Path(__file__).parents[3]
"""The checkout that runs, where `ambergrade` is not an installed copy."""
CODE_FOLDERS = ("src", "conf", "pipelines")
"""An untracked file here can change a result; it may hold a secret too, so only its name is kept."""
MOST_DIFF = 2_000_000
"""Bytes of diff.patch; what is longer is cut and says so, its sha256 is of the whole."""


@dataclass(frozen=True)
class Provenance:
    """What made a run."""

    tags: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    """Name to text."""


@functools.cache
def provenance(root: Path) -> Provenance:
    """Look, once a process, at its code and machine: three calls of git and a few files, about 0.1 s.

    Code that lies in no checkout of its own is looked for at `root`.
    """
    place = CODE if (CODE / "pyproject.toml").is_file() else root
    program = Path(sys.argv[0] or "python").resolve()
    tags = {
        "mlflow.user": getpass.getuser(),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": str(program.relative_to(place)) if program.is_relative_to(place) else program.name,
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
    }
    machine = hardware()
    files = {"hardware.json": json.dumps(machine, indent=1) + "\n"}
    tags |= {key: ", ".join(value) if isinstance(value, list) else str(value) for key, value in machine.items()}
    code_tags, code_files = code(place)
    tags |= code_tags
    files |= code_files
    lock = place / "requirements.lock"
    if lock.is_file():
        text = lock.read_text()
        tags["env.lock_sha"] = hashlib.sha256(text.encode()).hexdigest()
        files["requirements.lock"] = text
    return Provenance(tags, files)


def code(place: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Return tags that name the commit and its changes, and as files what differs from it.

    diff.patch: the changes of tracked files, for `git apply`. untracked.txt: names of other files of code.
    """
    sha = _git(place, "rev-parse", "HEAD").decode().strip()
    if not sha:
        return {"git.sha": "unknown", "git.dirty": "unknown"}, {}
    diff = _git(place, "diff", "HEAD", "--binary", "--no-color", "--no-ext-diff")
    untracked = _git(place, "ls-files", "-z", "--others", "--exclude-standard", "--", *CODE_FOLDERS)
    names = sorted(filter(None, untracked.decode(errors="replace").split("\0")))
    tags = {"mlflow.source.git.commit": sha, "git.sha": sha, "git.dirty": str(bool(diff or names)).lower()}
    files = {"untracked.txt": "\n".join(names) + "\n"} if names else {}
    if diff:
        tags["git.diff_sha"] = hashlib.sha256(diff).hexdigest()
        files["diff.patch"] = diff.decode(errors="replace")
    if len(diff) > MOST_DIFF:
        tags["git.diff"] = f"{len(diff)} bytes, cut to {MOST_DIFF}"
        files["diff.patch"] = (
            f"This patch is cut after {MOST_DIFF} of {len(diff)} bytes; git.diff_sha is of the whole.\n"
            + diff[:MOST_DIFF].decode(errors="replace").rpartition("\n")[0]
            + "\n"
        )
    return tags, files


def hardware() -> dict[str, Any]:
    """Return processor, cores that this process may use, memory, and NVIDIA's cards and driver if there are any."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: dict[str, Any] = {"cpu": _cpu(), "cpu.cores": cores}
    found["memory_gb"] = round(psutil.virtual_memory().total / 1e9, 1)
    cards, driver = _cards()
    if cards:
        found |= {"gpu": cards, "gpu.driver": driver}
    return found | kernels()


def kernels() -> dict[str, str]:
    """Return CUDA's version and the instruction set of torch's kernels, where that is imported: it takes seconds."""
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    return {"cpu.isa": torch.backends.cpu.get_cpu_capability()} | (
        {"cuda": torch.version.cuda} if torch.version.cuda else {}
    )


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    model = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", file.read_text(), re.MULTILINE) if file.exists() else None
    return model[1] if model else platform.processor() or platform.machine()


def _cards(proc: Path = Path("/proc/driver/nvidia")) -> tuple[list[str], str]:
    """Return the cards' names and the driver's version, from its own files, or by nvidia-smi where they are hidden."""
    told = [file.read_text() for file in sorted(proc.glob("gpus/*/information"))]
    cards = [found[1] for text in told if (found := re.search(r"^Model:\s*(.+)$", text, re.MULTILINE))]
    if cards:
        version = re.search(r"\s(\d+\.\d[\d.]*)\s", (proc / "version").read_text())
        return cards, version[1] if version else "unknown"
    if not shutil.which("nvidia-smi"):
        return [], ""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    rows = [row.rpartition(", ") for row in _said(asked).decode().splitlines() if ", " in row]
    return [name for name, _, _ in rows], rows[0][2] if rows else ""


def _git(place: Path, *arguments: str) -> bytes:
    return _said(["git", "-C", str(place), *arguments])


def _said(command: list[str]) -> bytes:
    """Return what a program prints; nothing where it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return b""
    return done.stdout if done.returncode == 0 else b""
