"""Runs the installed command `ambergrade`: every pipeline, and what needs no configuration.

ambergrade gamma experiment=gamma_tiny        a pipeline with Hydra's overrides; ambergrade gamma --help lists them
ambergrade merge RECIPE.yaml                  a recipe file, run without Hydra or torch
ambergrade init DIR                           a project of one's own
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version

from ambergrade.errors import AmbergradeError, unknown_name
from ambergrade.places import CONF, PIPELINES, project

OPTIONS = ("merge", "verify", "compare", "digest")
"""Verbs that take a file and ordinary options (door/files.py)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 when done, 1 for a user's mistake or a check that failed, told in a few lines."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    verb, rest = (given[0], given[1:]) if given else ("--help", [])
    if verb in ("-h", "--help"):
        print(_help())
        return 0
    if verb == "--version":
        print(f"ambergrade {version('ambergrade')}")
        return 0
    if verb == "--completion":
        print(_COMPLETION.get(rest[0] if rest else "bash", _COMPLETION["bash"]), end="")
        return 0
    if verb == "--complete":
        print("\n".join(complete(os.environ.get("COMP_LINE", ""))))
        return 0
    try:
        return _run(verb, rest)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except AmbergradeError as error:
        print(error, file=sys.stderr)
        return 1
    except SystemExit as end:
        if end.code != 2:
            raise
        return 1  # argparse has told what is wrong with the options
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        print(f"{error.filename}: {error.strerror}" if error.filename else error, file=sys.stderr)
        return 1


def _run(verb: str, rest: list[str]) -> int:
    known = pipelines()
    if verb in OPTIONS and not any(re.match(r"[+~]*[\w./]+=", word) for word in rest[:1]):
        from ambergrade.door import files

        return files.main([verb, *rest])
    if verb in known:
        file = PIPELINES / f"{verb}.py"
        before, sys.argv = sys.argv, [str(file), *rest]
        try:
            runpy.run_path(str(file), run_name="__main__")
        finally:
            sys.argv = before
        return 0
    others = _others()
    if verb not in others:
        print(unknown_name("Command", verb, [*known, *OPTIONS, *others]), file=sys.stderr)
        return 1
    return others[verb](rest)


def _others() -> Mapping[str, Callable[[list[str]], int]]:
    return {"init": _init, "publish": _publish, "ui": _ui, "vote": _vote}


def _init(rest: list[str]) -> int:
    from ambergrade.door.project import init

    return init(rest)


def _publish(rest: list[str]) -> int:
    from ambergrade.door import publish

    return publish.main(rest)


def _vote(rest: list[str]) -> int:
    from ambergrade.door import vote

    return vote.main(rest)


def _ui(rest: list[str]) -> int:
    from ambergrade.track import ui

    ui.main(rest)
    return 0


def pipelines() -> dict[str, str]:
    """Name of every pipeline to the first line of its docstring."""
    found = {}
    for file in sorted(PIPELINES.glob("*.py")):
        text = ast.get_docstring(ast.parse(file.read_text()))
        if text and (CONF / f"{file.stem}.yaml").is_file():
            found[file.stem] = text.splitlines()[0]
    return found


def _help() -> str:
    lines = ["usage: ambergrade COMMAND …", ""]
    told = {
        **pipelines(),
        "verify": "Check a release, level after level; or merge a file again from its own header and compare.",
        "compare": "Lay two releases side by side: what they are made of, paired scores, pictures.",
        "digest": "Print the digests of a model file, each by its name.",
        "init": "Make a project of your own: a folder with conf/, prompts and a README.",
        "publish": "Put a release on the Hugging Face hub, or in a folder or bucket.",
        "ui": "Open MLflow's pages on the results.",
        "vote": "Ask people, blindly, which pictures they prefer.",
    }
    lines += [f"  {name:<10} {line}" for name, line in told.items()]
    lines += ["", "ambergrade COMMAND --help tells more; --version; --completion bash|zsh prints a completion script."]
    return "\n".join(lines)


_COMPLETION = {
    "bash": "complete -o default -o nospace -C 'ambergrade --complete' ambergrade\n",
    "zsh": "autoload -U +X bashcompinit && bashcompinit\n"
    "complete -o default -o nospace -C 'ambergrade --complete' ambergrade\n",
}


def complete(line: str) -> list[str]:
    """The words that may stand at the end of a command line: verbs, `group=option`, keys of the pipeline's yaml."""
    words = line.split(" ")[1:]
    last = words[-1] if words else ""
    if len(words) < 2:
        return [f"{word} " for word in [*pipelines(), "compare", "digest", *_others()] if word.startswith(last)]
    file = CONF / f"{words[0]}.yaml"
    if not file.is_file():
        return []
    text = file.read_text()
    group, equals, _ = last.partition("=")
    if equals:
        last = last.rpartition("=")[2]  # bash begins a new word at each `=`
        mine = project()
        folders = [CONF, mine / "conf"] if mine else [CONF]
        known = sorted({f"{path.stem} " for folder in folders for path in (folder / group).glob("*.yaml")})
    else:
        groups = re.findall(r"(?m)^  - (?:optional )?(\w+): ", text)
        known = [
            f"{name}=" for name in [*groups, *re.findall(r"(?m)^(\w+):", text)] if name not in ("defaults", "hydra")
        ]
    return [word for word in known if word.startswith(last)]


if __name__ == "__main__":
    sys.exit(main())
