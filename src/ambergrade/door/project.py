"""Makes a user's project: a folder with a conf/ of its own, prompts, and a README with the next three commands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ambergrade.errors import BadSetting
from ambergrade.identity import random_seed
from ambergrade.places import PROJECT

FILES = {
    PROJECT: "# This folder is an Ambergrade project: its conf/ is searched for yamls, its mlruns/ gets the results.\n",
    ".gitignore": "mlruns/\n",
    "conf/experiment/mine.yaml": """\
# @package _global_
# Your experiment: ambergrade gamma experiment=mine. It begins as the embedded world's chain at its smallest; change
# what you like. `ambergrade gamma --help` lists the choices, with `experiment=mine --cfg job` every setting.
defaults:
  - gamma_smoke
  - _self_
name: mine
prompts:
  sweep: ${default_root:}/prompts/sweep.jsonl
  heldout: ${default_root:}/prompts/heldout.jsonl
release: {name: mine, version: v1}
""",
    "README.md": """\
# An Ambergrade project

Run these in this folder:

    ambergrade gamma experiment=mine        # train, sweep, evaluate, release: two minutes on the embedded world
    ambergrade evaluate model=builtin://beta7.safetensors prompts=prompts/sweep.jsonl      # score one model
    ambergrade ui                           # MLflow's pages on the results

`conf/experiment/mine.yaml` is yours; a yaml in `conf/<kind>/` adds a member of any kind (sampler, merge, gate …).
Prompts are JSON lines with `id`, `text` and, to score tags, `tags`. Results lie in `mlruns/`.
""",
}


def init(arguments: Sequence[str]) -> int:
    """Read the command's arguments and make the project."""
    parser = argparse.ArgumentParser(prog="ambergrade init", description=__doc__)
    parser.add_argument("folder", type=Path)
    make_project(parser.parse_args(arguments).folder)
    return 0


def make_project(folder: Path) -> None:
    """Write the project's files into a folder that is new or empty. Raises BadSetting for one that holds anything."""
    from ambergrade.world.booru import write_prompts

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BadSetting(f"{folder} is there and not empty.\nName a new folder: ambergrade init DIR.")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "prompts").mkdir()
    for which in ("sweep", "heldout"):
        write_prompts(folder / "prompts" / f"{which}.jsonl", seed=random_seed(0, "project", which), count=8)
    print(f"{folder / 'README.md'} has the next three commands.")
