"""Hydra at the door: compose a pipeline's configuration, and tell every user mistake in a few lines.

A pipeline is a thin file; what it needs of torch is imported inside the function, so that `--help` and
configuration errors answer at once:

    \"\"\"Fine-tune a base on a caption set.

    Examples:
        python pipelines/train.py experiment=base7_tiny
    \"\"\"
    from ambergrade import config

    @config.main("train")                     # conf/train.yaml, found beside src/, not in the working folder
    def run(cfg):
        from ambergrade.captions.selection import Selection
        chosen = config.settings(Selection, config.plain(cfg.selection), where="selection")

    if __name__ == "__main__":
        run()

and its root yaml has at least

    root: ${oc.env:AMBERGRADE_ROOT,${repository:}}
    debug: false                              # true: show tracebacks of users' mistakes as well

All ordinary Hydra flags work (`--multirun`, `--cfg job`, …). No output folder and no log file is written;
a sweep's own files go to <root>/mlruns/hydra.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import re
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, cast

import hydra
import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ambergrade.errors import AmbergradeError, BadSetting, UnknownName, nearest, unknown_name
from ambergrade.typed import settings as settings  # pipelines reach it as config.settings

REPOSITORY = Path(__file__).parents[2]
CONF = REPOSITORY / "conf"
MOST_LINES = 10
# Hydra's own habits that we do not share: output folders, log files, a root logger of its own.
HOUSE_HABITS = {
    "hydra.output_subdir": "null",
    "hydra.run.dir": ".",
    "hydra/job_logging": "none",
    "hydra.sweep.dir": "${root}/mlruns/hydra/${hydra.job.config_name}",
    "hydra.sweep.subdir": "${hydra.job.num}",
}
VERSION_BASE: dict[str, str] = (
    {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}
)  # 1.4 warns of it

Task = Callable[[DictConfig], Any]

OmegaConf.register_new_resolver("repository", lambda: str(REPOSITORY), replace=True)


def main(config_name: str, *, conf: Path = CONF) -> Callable[[Task], Callable[[], None]]:
    """Decorate a pipeline's function of the composed configuration into a command.

    A mistake in keys, groups, options, types or syntax, a missing value, and any AmbergradeError of the
    pipeline end the command with exit code 1 and at most ten lines on stderr. A traceback means a bug of
    ours, or `debug=true`.
    """

    def decorate(task: Task) -> Callable[[], None]:
        @functools.wraps(task)
        def command() -> None:
            arguments = sys.argv[1:]
            try:
                arguments = _longhand(arguments, config_name, conf)
                flags = _flags(arguments)
                if flags.help:
                    print(_help(task, config_name, conf))
                    return
                name = flags.config_name or config_name
                elsewhere = flags.config_dir or flags.config_path or any("hydra.searchpath" in o for o in arguments)
                if not elsewhere:
                    _check_overrides(name, conf, flags.overrides)
                _hand_to_hydra(task, name, conf, arguments, flags.overrides)
            except Exception as error:
                told = _explained(error, conf)
                if told is None or _debugging(arguments):
                    raise
                _tell(told)

        return command

    return decorate


def compose(config_name: str, overrides: Sequence[str] = (), *, conf: Path = CONF) -> DictConfig:
    """The configuration that a pipeline would get, for tests and notebooks.

    Raises:
        AmbergradeError: any mistake that the command line would tell.
    """
    with _as_our_errors(conf):
        _check_overrides(config_name, conf, list(overrides))
        cfg = _composed(config_name, conf, list(overrides))
        plain(cfg)
        return cfg


def plain(cfg: DictConfig) -> dict[str, Any]:
    """A part of the configuration as plain dicts, lists and numbers, with all references resolved.

    Raises:
        BadSetting: values that are missing, or that refer to nothing.
    """
    with _as_our_errors():
        # not OmegaConf.missing_keys: it fails on a reference to a missing value
        missing = [key for key, value in _leaves(OmegaConf.to_container(cfg, resolve=False)) if value == "???"]
        if missing:
            given = " ".join(f"{key}=…" for key in missing[:3])
            raise BadSetting(f"No value for: {', '.join(missing)}.\nGive it on the command line: {given}")
        return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))


# --- running -------------------------------------------------------------------------------------------------


def _flags(arguments: list[str]) -> Namespace:
    """Hydra's own flags and the overrides among the arguments."""
    parser = get_args_parser()
    known = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]

    def refuse(message: str) -> NoReturn:
        asked = re.match(r"unrecognized arguments: (-\S+)", message)
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


def _longhand(arguments: list[str], name: str, conf: Path) -> list[str]:
    """What a pipeline's surface calls otherwise than its configuration can.

    `coefficients.a=…` is short for `merge.coefficients.a=…` wherever a pipeline has no coefficients of its own.
    `models=DIR` is `inputs=DIR` where the pipeline has inputs: Hydra would look for an option of the group `models`.
    """
    root = yaml.safe_load((conf / f"{name}.yaml").read_text()) or {}
    if "coefficients" not in root and any("merge" in entry for entry in root.get("defaults", [])):
        arguments = [re.sub(r"^(\+{0,2})coefficients\.", r"\1merge.coefficients.", argument) for argument in arguments]
    if root.get("coefficients") == {}:  # a recipe's file names them, so the configuration knows none
        arguments = [re.sub(r"^coefficients\.", "+coefficients.", argument) for argument in arguments]
    if "inputs" in root:
        arguments = [re.sub(r"^models=", "inputs=", argument) for argument in arguments]
    return arguments


def _hand_to_hydra(task: Task, name: str, conf: Path, arguments: list[str], overrides: list[str]) -> None:
    @functools.wraps(task)
    def job(cfg: DictConfig) -> Any:
        try:
            plain(cfg)
            # Hydra lets every library's INFO through under its own name; only its own lines are worth reading
            logging.getLogger().setLevel(logging.WARNING)
            logging.getLogger("hydra").setLevel(logging.INFO)
            limit_threads(cfg)
            return task(cfg)
        except AmbergradeError as error:
            # in a sweep the launcher keeps the error, runs the other jobs, and raises it at the end
            if _debugging(arguments) or HydraConfig.get().mode == RunMode.MULTIRUN:
                raise
            _tell(str(error))
        except (HydraException, OmegaConfBaseException) as error:
            raise RuntimeError(f"The pipeline uses its configuration wrongly: {error}") from error

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


def limit_threads(cfg: DictConfig) -> None:
    """`compute.threads` for numpy too, which asks the environment once, when it is imported: so before the task does.

    Two processes of two BLAS threads on two cores wait for each other: the demo's second run took three times as long.
    """
    threads = OmegaConf.select(cfg, "compute.threads")
    if threads:
        os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads)))


def _debugging(arguments: list[str]) -> bool:
    return any(argument.lstrip("+").lower() == "debug=true" for argument in arguments)


def _tell(text: str) -> NoReturn:
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], f"… and {len(lines) - MOST_LINES + 1} lines more (debug=true shows all)."]
    print("\n".join(lines), file=sys.stderr, flush=True)
    sys.exit(1)


# --- mistakes ------------------------------------------------------------------------------------------------


def _explained(error: Exception, conf: Path) -> str | None:
    """What to tell the user; None for a bug of ours."""
    if isinstance(error, AmbergradeError):
        return str(error)
    if isinstance(error, OverrideParseException):
        reason = error.message.removeprefix(f"Error parsing override '{error.override}'").strip()
        return (
            f"Cannot read '{error.override}': {_first_lines(reason, 1)}\n"
            "Write key=value; quote a value with spaces, commas or brackets twice: 'key=\"a, b\"'."
        )
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.removesuffix(".yaml").rpartition("/")
        place = re.match(r"In '([^']+)'", str(error))
        hint = f"It is named in {place[1]}.yaml." if place else ""
        options = sorted(path.stem for path in (conf / group).glob("*.yaml"))
        return unknown_name(f"Option of '{group}'" if group else "Config", option, options, hint)
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause = error.__cause__
        key = getattr(error, "full_key", None)
        if key:
            return f"{key}: {_first_lines(str(error), 3)}"
        return "\n".join(part for part in (_first_lines(str(error), 7), _first_lines(str(cause or ""), 1)) if part)
    if isinstance(error, yaml.YAMLError):
        return f"A yaml file cannot be read: {_first_lines(str(error), 7)}"
    return None


def _first_lines(text: str, count: int) -> str:
    noise = re.compile(r"\s*(full_key:|object_type=|reference_type=|See https?:|Search path|$)")
    return "\n".join([line for line in text.splitlines() if not noise.match(line)][:count])


@contextmanager
def _as_our_errors(conf: Path = CONF) -> Iterator[None]:
    try:
        yield
    except AmbergradeError:
        raise
    except Exception as error:
        told = _explained(error, conf)
        if told is None:
            raise
        raise BadSetting(told) from error


def _composed(config_name: str, conf: Path, overrides: list[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(conf.absolute()), job_name=config_name, **VERSION_BASE):
        return hydra.compose(config_name, overrides)


def _check_overrides(config_name: str, conf: Path, overrides: list[str]) -> None:
    """Raise BadSetting with everything that is wrong with the overrides, before any of them is applied."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    groups = [override for override in parsed if (conf / override.key_or_group).is_dir()]
    wrong = [complaint for override in groups for complaint in _wrong_options(override, conf)]
    if not wrong:
        chosen = [line for override in groups for line in _without_sweep(override)]
        base = OmegaConf.to_container(_composed(config_name, conf, chosen), resolve=False)
        assert isinstance(base, dict)
        known = sorted({*(key for key, _ in _leaves(base)), *_groups(conf)})
        for override in parsed:
            plainly = not (override.is_add() or override.is_force_add() or override.is_delete())
            if plainly and override not in groups and not override.key_or_group.startswith("hydra"):
                wrong += _wrong_value(override, base, known)
    if wrong:
        raise BadSetting("\n".join(wrong))


def _wrong_options(override: Override, conf: Path) -> list[str]:
    group = override.key_or_group
    options = sorted(path.stem for path in (conf / group).glob("*.yaml"))
    chosen = [option for value in _values(override) for option in (value if isinstance(value, list) else [value])]
    unknown = [
        str(option) for option in chosen if option is not None and not (conf / group / f"{option}.yaml").is_file()
    ]
    return [unknown_name(f"Option of '{group}'", option, options) for option in unknown]


def _without_sweep(override: Override) -> list[str]:
    line = override.input_line or ""
    if not override.is_sweep_override():
        return [line]
    first = next(iter(_values(override)), None)
    return [] if first is None else [f"{line.split('=')[0]}={first}"]


def _values(override: Override) -> list[Any]:
    """The value, or the values of a sweep (none where they are not known beforehand)."""
    if not override.is_sweep_override():
        return [override.value()]
    if not (override.is_choice_sweep() or override.is_range_sweep()):
        return []
    parser = OverridesParser.create()
    return [parser.parse_override(f"value={text}").value() for text in override.sweep_string_iterator()]


def _wrong_value(override: Override, base: dict[Any, Any], known: list[str]) -> list[str]:
    key = override.key_or_group
    default: Any = base
    for part in key.split("."):
        if not isinstance(default, dict):
            return []  # below a null, a reference or a list: Hydra judges
        if part not in default:
            return [_unknown_key(key, known)]
        default = default[part]
    needed = _needed_kind(default)
    misfits = [value for value in _values(override) if needed and not _is_kind(value, needed)]
    return [f"{key}={value}: {needed} is needed (the default is {default!r})." for value in misfits]


def _unknown_key(asked: str, known: list[str]) -> str:
    parent, _, leaf = asked.rpartition(".")
    siblings = [key for key in known if parent and key.rpartition(".")[0] == parent]
    elsewhere = [key for key in known if key.rpartition(".")[2] == leaf]
    pool = next((keys for keys in (siblings, elsewhere, known) if nearest(asked, keys)), None)
    pool = pool or elsewhere or siblings or [key for key in known if "." not in key]
    return unknown_name("Setting", asked, pool, "--help lists the main settings, --cfg job all of them.")


def _needed_kind(default: Any) -> str:
    if isinstance(default, str):
        return "" if default == "???" or "${" in default else "a text"
    for kind, types_ in {"true or false": bool, "a number": int | float, "a list": list, "a mapping": dict}.items():
        if isinstance(default, types_):
            return kind
    return ""


def _is_kind(value: Any, kind: str) -> bool:
    if value is None or (isinstance(value, str) and "${" in value):
        return True
    return not isinstance(value, list | dict) if kind == "a text" else _needed_kind(value) == kind


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in nested mappings, the mappings themselves included."""
    for key, value in values.items():
        yield f"{prefix}{key}", value
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")


def _groups(conf: Path) -> list[str]:
    return sorted(path.name for path in conf.iterdir() if path.is_dir() and any(path.glob("*.yaml")))


# --- help ----------------------------------------------------------------------------------------------------


def _help(task: Task, config_name: str, conf: Path) -> str:
    module = sys.modules[task.__module__]
    text = (conf / f"{config_name}.yaml").read_text()
    parts = [inspect.cleandoc(module.__doc__ or task.__doc__ or config_name)]
    options = _group_lines(yaml.safe_load(text) or {}, conf)
    if options:
        parts.append("Choices (group=option; the default in brackets; one file each in conf/<group>/):\n" + options)
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
        options = sorted(path.stem for path in (conf / group).glob("*.yaml"))
        if options:
            shown = " | ".join(f"[{option}]" if option == default else option for option in options)
            head = f"  {group:<14}"
            lines.append(textwrap.fill(shown, 110, initial_indent=head, subsequent_indent=" " * len(head)))
    return "\n".join(lines)
