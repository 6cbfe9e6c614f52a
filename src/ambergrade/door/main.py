"""Makes a pipeline a command: composes its settings, reads them once, and tells every mistake in a few lines.

    \"\"\"Fine-tune a base on a caption set.

    Examples:
        python pipelines/train.py experiment=base7_tiny
    \"\"\"

    @pipeline("train")                        # conf/train.yaml
    def main(settings: TrainPipelineSettings, invocation: Invocation) -> None:
        from ambergrade.chain import fine_tune   # torch is imported here, so that --help and mistakes answer at once

        fine_tune.run(settings, invocation)

All ordinary Hydra flags work (`--multirun`, `--cfg job`, …). No output folder and no log file is written; a sweep's own
files go to <root>/mlruns/hydra.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import shlex
import sys
import typing
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ambergrade.chain.portable import THREADS, make_portable
from ambergrade.chain.settings import Invocation
from ambergrade.door.compose import (
    VERSION_BASE,
    as_written,
    check_overrides,
    explained,
    open_added,
    plain_settings,
    read,
    search_path,
    secret_keys,
)
from ambergrade.door.help import help_text
from ambergrade.errors import BadSetting, UnknownName
from ambergrade.places import CHECKOUT, CONF
from ambergrade.track.secrets import Secrets

MOST_LINES = 10
# Hydra's own habits that we do not share: output folders, log files, a root logger of its own.
HOUSE_HABITS = {
    "hydra.output_subdir": "null",
    "hydra.run.dir": ".",
    "hydra/job_logging": "none",
    "hydra.sweep.dir": "${root}/mlruns/hydra/${hydra.job.config_name}",
    "hydra.sweep.subdir": "${hydra.job.num}",
}

Task = Callable[[Any, Invocation], Any]
"""What a pipeline does with its settings."""


def pipeline(config_name: str, *, conf: Path = CONF) -> Callable[[Task], Callable[[], None]]:
    """Decorate a pipeline's function of its settings into a command.

    The settings are the dataclass that the function's first parameter is annotated with. A mistake in keys, groups,
    options, types or syntax, a missing value, and any AmbergradeError of the pipeline end the command with exit code 1
    and at most ten lines on stderr. A traceback means a bug of ours, or `debug=true`.
    """

    def decorate(task: Task) -> Callable[[], None]:
        @functools.wraps(task)
        def command() -> None:
            arguments = sys.argv[1:]
            try:
                cls = _settings_of(task)
                arguments = as_written(arguments, config_name, conf)
                flags = _flags(arguments)
                if flags.help:
                    about = sys.modules[task.__module__].__doc__ or config_name
                    print(help_text(about, config_name, conf))
                    return
                name = flags.config_name or config_name
                elsewhere = flags.config_dir or flags.config_path or any("hydra.searchpath" in o for o in arguments)
                own = [] if elsewhere else search_path(conf)
                checked = (
                    open_added(flags.overrides, cls) if elsewhere else check_overrides(name, conf, flags.overrides, cls)
                )
                added = dict(zip(flags.overrides, checked, strict=True))
                arguments = [*own, *(added.get(argument, argument) for argument in arguments)]
                flags.overrides = [*own, *checked]
                _hand_to_hydra(task, cls, name, conf, arguments, flags.overrides)
            except BrokenPipeError:  # the reader of our lines is gone, as `head` is
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                sys.exit(141)
            except KeyboardInterrupt:
                print("Interrupted. What was finished is kept; the same command goes on.", file=sys.stderr)
                sys.exit(130)
            except Exception as error:
                told = explained(error, conf)
                if told is None or _debugging(arguments):
                    raise
                tell(told)

        return command

    return decorate


def _settings_of(task: Task) -> type[Any]:
    """The dataclass of a pipeline's settings."""
    found = typing.get_type_hints(task)
    cls: type[Any] = found[next(iter(found))]
    return cls


def _hand_to_hydra(
    task: Task, cls: type[Any], name: str, conf: Path, arguments: list[str], overrides: list[str]
) -> None:
    @functools.wraps(task)
    def job(cfg: DictConfig) -> Any:
        try:
            plain_logs()
            prepare_compute(cfg)
            return task(read(cls, cfg), invocation(cfg))
        except (HydraException, OmegaConfBaseException) as error:
            raise RuntimeError(f"The pipeline uses its configuration wrongly: {error}") from error
        except Exception as error:
            told = explained(error, conf)
            # in a sweep the launcher keeps the error, runs the other jobs, and raises it at the end
            if told is None or _debugging(arguments) or HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            tell(told)

    given = {override.split("=")[0].lstrip("+~") for override in overrides}
    habits = [f"{key}={value}" for key, value in HOUSE_HABITS.items() if key not in given]
    before = sys.argv
    # all overrides in one block before the flags: argparse takes no other, and a bare --info would eat one
    sys.argv = [before[0], *habits, *overrides, *(argument for argument in arguments if argument not in overrides)]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises its errors to us instead of printing them
    try:
        hydra.main(config_path=str(conf.absolute()), config_name=name, **VERSION_BASE)(job)()
    finally:
        sys.argv = before


def invocation(cfg: DictConfig) -> Invocation:
    """Tell which command this is: its line, its overrides without Hydra's own, and which settings are secret."""
    given = [word for word in sys.argv[1:] if ("=" in word or word.startswith("~")) and not word.startswith("-")]
    overrides = tuple(word for word in given if not word.lstrip("+~").startswith("hydra"))
    words = sys.orig_argv[1:]  # sys.argv holds what was handed to Hydra
    inside = f"{CHECKOUT}/" if CHECKOUT else ""
    command = Path(words[0]).name if words else ""
    first = [command, *words[1:]] if command == "ambergrade" else ["python", *words]
    line = shlex.join(word.removeprefix(inside) for word in first)
    keys = secret_keys(cfg)
    secrets = Secrets.of(plain_settings(cfg), keys)
    return Invocation(secrets.text(line), tuple(secrets.overrides(overrides)), keys)


class Once(logging.Filter):
    """Lets each warning through once: what several stages find wrong with one file is one thing to know."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        new = record.levelno < logging.WARNING or text not in self._told
        self._told.add(text)
        return new


def plain_logs() -> None:
    """Show warnings as they are written, each once, and of what is less than a warning Hydra's own lines alone.

    Hydra lets every library's INFO through, with the time and its own name before it.
    """
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("hydra").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.addFilter(Once())


def prepare_compute(cfg: DictConfig) -> None:
    """Choose threads and kernels before torch and numpy are imported, which ask the environment once.

    Two processes of two BLAS threads on two cores wait for each other: the demo's second run took three times as long.
    """
    threads = OmegaConf.select(cfg, "compute.threads")
    if threads:
        os.environ.update(dict.fromkeys(THREADS, str(threads)))
    if OmegaConf.select(cfg, "compute.portable"):
        make_portable()


def tell(text: str) -> NoReturn:
    """Print a user's mistake in a few lines and end with exit code 1."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], f"… and {len(lines) - MOST_LINES + 1} lines more (debug=true shows all)."]
    print("\n".join(lines), file=sys.stderr, flush=True)
    sys.exit(1)


def _debugging(arguments: list[str]) -> bool:
    return any(argument.lstrip("+").lower() == "debug=true" for argument in arguments)


_SWITCHES = ("help", "hydra-help", "version", "resolve", "run", "multirun", "shell-completion")
_VALUES = ("cfg", "package", "config-path", "config-name", "config-dir", "experimental-rerun")
_SHORT = {"help": "-h", "resolve": "", "run": "-r", "multirun": "-m", "shell-completion": "-sc", "cfg": "-c"} | {
    "package": "-p",
    "config-path": "-cp",
    "config-name": "-cn",
    "config-dir": "-cd",
}


def _flags(arguments: list[str]) -> Namespace:
    """Read Hydra's flags (`python x.py --hydra-help` lists them) and the overrides among the arguments."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    names = {name: [f"--{name}", *filter(None, [_SHORT.get(name)])] for name in (*_SWITCHES, *_VALUES)}
    for name in _SWITCHES:
        parser.add_argument(*names[name], action="store_true")
    for name in _VALUES:
        parser.add_argument(*names[name], choices=("job", "hydra", "all") if name == "cfg" else None)
    parser.add_argument("--info", "-i", nargs="?", const="all")
    parser.add_argument("overrides", nargs="*")

    def refuse(message: str) -> NoReturn:
        asked = re.match(r"unrecognized arguments: (-\S+)", message)
        known = [*(f"--{name}" for name in names), "--info"]
        raise UnknownName("Flag", asked[1], known) if asked else BadSetting(message)

    parser.error = refuse  # type: ignore[method-assign]
    flags: Namespace = parser.parse_intermixed_args(arguments)
    modes = ("run", "multirun", "cfg", "info", "shell_completion")
    given = [f"--{mode.replace('_', '-')}" for mode in modes if getattr(flags, mode)]
    if len(given) > 1:
        raise BadSetting(f"{' and '.join(given)} exclude each other. Give one of them.")
    if flags.resolve and not flags.cfg:
        raise BadSetting("--resolve goes with --cfg: --cfg job --resolve.")
    return flags
