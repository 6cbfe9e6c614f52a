"""Composes a pipeline's configuration by Hydra, and tells every mistake in it in a few lines."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import hydra
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ambergrade.errors import AmbergradeError, BadSetting, nearest, unknown_name
from ambergrade.identity import digest
from ambergrade.places import CONF, default_root, project
from ambergrade.track.secrets import environment_keys
from ambergrade.typed import open_keys, settings

T = TypeVar("T")

VERSION_BASE: dict[str, str] = (
    {"version_base": "1.3"} if hydra.__version__.startswith("1.3.") else {}
)  # 1.4 warns of it

DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENOTDIR, errno.ENOENT, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
}
"""What a disk or a path can refuse: told in a line, never as a traceback."""

OmegaConf.register_new_resolver("default_root", lambda: str(default_root()), replace=True)
OmegaConf.register_new_resolver("digest", lambda value: digest(_container(value))[:12], replace=True)


def compose(name: str, overrides: Sequence[str] = (), *, conf: Path = CONF, cls: type[Any] | None = None) -> DictConfig:
    """Compose the configuration that a pipeline would get, for tests and notebooks.

    Raises:
        AmbergradeError: any mistake that the command line would tell.
    """
    with as_our_errors(conf):
        cfg = _composed(name, conf, check_overrides(name, conf, list(overrides), cls))
        plain(cfg)
        return cfg


def plain(cfg: DictConfig) -> dict[str, Any]:
    """Turn a part of the configuration into plain dicts, lists and numbers, with all references resolved.

    Raises:
        BadSetting: values that are missing, or that refer to nothing.
    """
    with as_our_errors():
        # not OmegaConf.missing_keys: it fails on a reference to a missing value
        missing = [key for key, value in _leaves(_container(cfg, resolve=False)) if value == "???"]
        if missing:
            missing = [key.removesuffix("_path") for key in missing]  # as `as_written` lets them be given
            given = " ".join(f"{key}=…" for key in missing[:3])
            raise BadSetting(f"No value for: {', '.join(missing)}.\nGive it on the command line: {given}")
        return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))


def read(cls: type[T], cfg: DictConfig) -> T:
    """Read a pipeline's settings from its composed configuration. Raises BadSetting with every complaint at once."""
    return settings(cls, plain_settings(cfg))


def plain_settings(cfg: DictConfig) -> dict[str, Any]:
    """A pipeline's configuration as plain values, without Hydra's own part."""
    return plain(_without_hydra(cfg))


def secret_keys(cfg: DictConfig) -> tuple[str, ...]:
    """Dotted keys of the settings that came from environment variables."""
    return tuple(sorted(environment_keys(_container(_without_hydra(cfg), resolve=False))))


def search_path(conf: Path) -> list[str]:
    """The override that adds the user's project's conf/ to Hydra's search path; none outside of a project."""
    more = [f"file://{folder}" for folder in _folders(conf)[1:] if folder.is_dir()]
    return [f"hydra.searchpath=[{','.join(more)}]"] if more else []


def as_written(arguments: Sequence[str], name: str, conf: Path) -> list[str]:
    """Spell out what a pipeline's surface calls shorter than its configuration can.

    - `<group>=VALUE` is `<group>_path=VALUE` in a pipeline that has the key `<group>_path`: Hydra would look for an
      option of the group. Where the pipeline has the group too, that holds for a VALUE with a slash, or of a folder.
    - `coefficients.a=…` is `merge.coefficients.a=…` where a pipeline has no coefficients of its own.
    """
    root = yaml.safe_load((conf / f"{name}.yaml").read_text()) or {}
    used = {key.lstrip("/").split("@")[0] for entry in root.get("defaults", []) for key in _keys(entry)}
    for group in (key.removesuffix("_path") for key in root if key.endswith("_path")):
        arguments = [
            f"{group}_path={value}" if key == group and (group not in used or _is_place(value)) else argument
            for argument in arguments
            for key, _, value in [argument.partition("=")]
        ]
    if "coefficients" not in root and "merge" in used:
        arguments = [re.sub(r"^(\+{0,2})coefficients\.", r"\1merge.coefficients.", argument) for argument in arguments]
    return list(arguments)


def _is_place(value: str) -> bool:
    return "/" in value or Path(value).is_dir()


def _keys(entry: Any) -> list[str]:
    return (
        [str(key).removeprefix("optional ").removeprefix("override ") for key in entry]
        if isinstance(entry, Mapping)
        else []
    )


def _container(cfg: Any, resolve: bool = True) -> Any:
    return OmegaConf.to_container(cfg, resolve=resolve) if OmegaConf.is_config(cfg) else cfg


def _without_hydra(cfg: DictConfig) -> DictConfig:
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])


def explained(error: Exception, conf: Path) -> str | None:
    """What to tell the user; None for a bug of ours."""
    if isinstance(error, AmbergradeError):
        return str(error)
    if isinstance(error, OverrideParseException):
        key, equals, value = str(error.override).partition("=")
        quoted = value.strip("'\"").replace('"', '\\"')
        mend = f"a value with =, blanks, commas or brackets is quoted twice.\nWrite '{key}=\"{quoted}\"'."
        return f"Cannot read '{error.override}': {mend if equals else 'there is no =.' + chr(10) + 'Write key=value.'}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = error.missing_cfg_file.removesuffix(".yaml").rpartition("/")
        place = re.match(r"In '([^']+)'", str(error))
        hint = f"It is named in {place[1]}.yaml." if place else ""
        return unknown_name(f"Option of '{group}'" if group else "Config", option, options(group, conf), hint)
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause = error.__cause__
        where = getattr(error, "full_key", None)
        if where:
            return f"{where}: {_first_lines(str(error), 3)}"
        return "\n".join(part for part in (_first_lines(str(error), 7), _first_lines(str(cause or ""), 1)) if part)
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        named = f"{error.filename}: " if error.filename else ""
        return f"{named}{error.strerror}.\nName a folder that can be written, or make room: root=DIR."
    if isinstance(error, yaml.YAMLError):
        return f"A yaml file cannot be read: {_first_lines(str(error), 7)}"
    return None


def _first_lines(text: str, count: int) -> str:
    noise = re.compile(r"\s*(full_key:|object_type=|reference_type=|See https?:|Search path|$)")
    return "\n".join([line for line in text.splitlines() if not noise.match(line)][:count])


@contextmanager
def as_our_errors(conf: Path = CONF) -> Iterator[None]:
    try:
        yield
    except AmbergradeError:
        raise
    except Exception as error:
        told = explained(error, conf)
        if told is None:
            raise
        raise BadSetting(told) from error


def _composed(config_name: str, conf: Path, overrides: list[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(conf.absolute()), job_name=config_name, **VERSION_BASE):
        return hydra.compose(config_name, [*search_path(conf), *overrides])


def check_overrides(config_name: str, conf: Path, overrides: list[str], cls: type[Any] | None = None) -> list[str]:
    """Raise BadSetting with everything that is wrong with the overrides, before any of them is applied.

    Returns the overrides; those that name a new key of a mapping whose keys the settings `cls` leave open
    (`models.base8=FILE`) are made to add it.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    groups = [override for override in parsed if _is_group(override.key_or_group, conf)]
    wrong = [complaint for override in groups for complaint in _wrong_options(override, conf)]
    added: dict[str, str] = {}
    if not wrong:
        chosen = [line for override in groups for line in _without_sweep(override)]
        base = OmegaConf.to_container(_composed(config_name, conf, chosen), resolve=False)
        assert isinstance(base, dict)
        known = sorted({*(key for key, _ in _leaves(base)), *_groups(conf)})
        for override in parsed:
            plainly = not (override.is_add() or override.is_force_add() or override.is_delete())
            if not plainly or override in groups or override.key_or_group.startswith("hydra"):
                continue
            key, line = override.key_or_group, override.input_line or ""
            if key not in known and cls is not None and open_keys(cls, key):
                added[line] = f"+{line}"
            else:
                wrong += _wrong_value(override, base, known)
    if wrong:
        raise BadSetting("\n".join(wrong))
    return [added.get(line, line) for line in overrides]


def open_added(overrides: Sequence[str], cls: type[Any]) -> list[str]:
    """Let overrides of mappings whose keys the settings `cls` leave open add a key, where nothing else is checked."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    plain_ones = [not (one.is_add() or one.is_force_add() or one.is_delete()) for one in parsed]
    return [
        f"++{line}" if plainly and open_keys(cls, one.key_or_group) else line
        for line, one, plainly in zip(overrides, parsed, plain_ones, strict=True)
    ]


def options(group: str, conf: Path) -> list[str]:
    """The members of a group: those that ship, and those of the user's project."""
    return sorted({path.stem for folder in _folders(conf) for path in (folder / group).glob("*.yaml")})


def _folders(conf: Path) -> list[Path]:
    mine = project()
    return [conf, mine / "conf"] if mine and conf == CONF else [conf]


def _is_group(key: str, conf: Path) -> bool:
    return any((folder / key).is_dir() for folder in _folders(conf))


def _wrong_options(override: Override, conf: Path) -> list[str]:
    known = options(override.key_or_group, conf)
    chosen = [option for value in _values(override) for option in (value if isinstance(value, list) else [value])]
    unknown = [str(option) for option in chosen if option is not None and str(option) not in known]
    return [unknown_name(f"Option of '{override.key_or_group}'", option, known) for option in unknown]


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
    if not (override.is_choice_sweep() or override.is_range_sweep()) or isinstance(override.value(), Glob):
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
    return sorted(
        {
            path.name
            for folder in _folders(conf)
            for path in folder.iterdir()
            if path.is_dir() and any(path.glob("*.yaml"))
        }
    )
