"""Reads settings: builds dataclasses from plain mappings and checks every type. The only reader of settings here."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, cast

from ambergrade.errors import AmbergradeError, BadSetting, unknown_name

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Plugin:
    """A member of a kind, as a yaml of conf/<kind>/ chooses it: the name of its module, and its parameters.

    The member itself checks its parameters; nothing but its module knows them.
    """

    name: str
    parameters: Mapping[str, Any]

    @property
    def as_mapping(self) -> dict[str, Any]:
        """Name and parameters side by side, as the yaml has them."""
        return {"name": self.name, **self.parameters}


def settings(cls: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """Build a dataclass from a mapping, with types checked and lists made tuples where the class says so.

    `where` names the mapping in complaints. Nested dataclasses are built from nested mappings; an int is
    taken for a float. A null passes only where the class allows None, and NaN and infinity pass nowhere.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Size:
    ...     side: int
    ...     scale: float = 1.0
    >>> settings(Size, {"side": 8, "scale": 2})
    Size(side=8, scale=2.0)

    Raises:
        BadSetting: all complaints at once: unknown keys with the nearest known, missing keys, wrong types.
    """
    wrong: list[str] = []
    built = _build(cls, values, where, wrong)
    if wrong:
        raise BadSetting("\n".join(wrong))
    return cast(T, built)


def plain(value: Any) -> Any:
    """Return a value as JSON holds it and `settings` reads it: the keys of mappings stay in their order, NaN is null.

    >>> plain({"metric": Plugin("fid", {"few": True}), "sides": (8, 16), "root": Path("mlruns")})
    {'metric': {'name': 'fid', 'few': True}, 'sides': [8, 16], 'root': 'mlruns'}
    """
    if isinstance(value, Plugin):
        return plain(value.as_mapping)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and value != value else value


def open_keys(cls: Any, key: str) -> bool:
    """Whether a dotted key lies in a mapping whose keys the dataclass leaves open, as `models.base8` does.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Merge:
    ...     models: Mapping[str, str]
    ...     out: str = ""
    >>> open_keys(Merge, "models.base8"), open_keys(Merge, "models"), open_keys(Merge, "out")
    (True, False, False)
    """
    hint: Any = cls
    for place, part in enumerate(key.split(".")):
        hint = next((one for one in _members(hint) if one is not type(None)), hint)
        if typing.get_origin(hint) in (dict, Mapping):
            return place > 0
        if not dataclasses.is_dataclass(hint) or hint is Plugin:
            return False
        hint = typing.get_type_hints(hint).get(part)
    return False


def _members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (Union, types.UnionType) else ()


def _build(cls: Any, values: Any, where: str, wrong: list[str]) -> Any:
    prefix = f"{where}." if where else ""
    if not isinstance(values, Mapping):
        wrong.append(f"{where or cls.__name__}: a mapping is needed, found {values!r}.")
        return None
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    hints = typing.get_type_hints(cls)
    wrong += [
        unknown_name("Setting", f"{prefix}{key}", [prefix + f for f in fields]) for key in values if key not in fields
    ]
    before = len(wrong)
    built = {}
    for name, field in fields.items():
        if name in values:
            built[name] = _converted(hints[name], values[name], prefix + name, wrong)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            wrong.append(f"{prefix}{name}: no value given.")
    if len(wrong) > before:
        return None
    try:
        return cls(**built)
    except AmbergradeError as error:  # of the class's own __post_init__
        wrong.append(f"{where}: {error}" if where else str(error))
        return None


def _converted(hint: Any, value: Any, where: str, wrong: list[str]) -> Any:
    """`value` as the type `hint` wants it; a complaint is appended if it cannot be."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, float) and not math.isfinite(value):
        wrong.append(f"{where}: a finite number is needed, found {value}.")
        return None
    if hint is Any:
        _check_numbers(value, where, wrong)
        return value
    if origin in (Union, types.UnionType):
        return _converted_union(arguments, value, where, wrong, hint)
    if hint is Plugin:
        return _plugin(value, where, wrong)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where, wrong)
    if origin is Literal:
        if value not in arguments:
            wrong.append(unknown_name(where, str(value), map(str, arguments)))
        return value
    if origin in (tuple, list, Sequence) and isinstance(value, list | tuple):
        one = origin is not tuple or (len(arguments) == 2 and arguments[1] is Ellipsis)
        if not one and len(arguments) != len(value):
            wrong.append(f"{where}: {len(arguments)} values are needed, found {list(value)}.")
            return None
        wanted = [arguments[0]] * len(value) if one else arguments
        items = [_converted(w, v, f"{where}[{i}]", wrong) for i, (w, v) in enumerate(zip(wanted, value, strict=True))]
        return items if origin is list else tuple(items)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {k: _converted(arguments[1], v, f"{where}.{k}", wrong) for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if isinstance(hint, type) and isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    wrong.append(f"{where}: {_type_name(hint)} is needed, found {value!r}.")
    return None


def _plugin(value: Any, where: str, wrong: list[str]) -> Plugin | None:
    if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
        wrong.append(f"{where}: a mapping with a name is needed, found {value!r}.")
        return None
    _check_numbers(value, where, wrong)
    return Plugin(value["name"], {key: item for key, item in value.items() if key != "name"})


def _check_numbers(value: Any, where: str, wrong: list[str]) -> None:
    """Complain of NaN and infinity anywhere in a value whose type is left open."""
    if isinstance(value, float) and not math.isfinite(value):
        wrong.append(f"{where}: a finite number is needed, found {value}.")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_numbers(item, f"{where}.{key}", wrong)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            _check_numbers(item, f"{where}[{number}]", wrong)


def _converted_union(arguments: tuple[Any, ...], value: Any, where: str, wrong: list[str], hint: Any) -> Any:
    complaints: list[str] = []
    words = next((one for one in arguments if typing.get_origin(one) is Literal), None)
    if words is not None and isinstance(value, str):
        return _converted(words, value, where, wrong)
    # the exact type first, so that an int given for int | float stays one
    for member in sorted(arguments, key=lambda a: type(value) is not a):
        attempt: list[str] = []
        converted = _converted(member, value, where, attempt)
        if not attempt:
            return converted
        complaints += attempt if dataclasses.is_dataclass(member) and isinstance(value, Mapping) else []
    wrong += complaints or [f"{where}: {_type_name(hint)} is needed, found {value!r}."]
    return None


def _type_name(hint: Any) -> str:
    names = {
        Path: "a path",
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }
    if hint in names:
        return names[hint]
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in typing.get_args(hint))
    if typing.get_origin(hint) in (tuple, list, Sequence):
        return "a list"
    if typing.get_origin(hint) in (dict, Mapping):
        return "a mapping"
    return getattr(hint, "__name__", str(hint))
