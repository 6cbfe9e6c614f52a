"""Masks secrets in what is journaled or printed: settings, overrides, parameters, tags, notes, errors, addresses.

A setting is secret when it came from the environment (`oc.env`), or when its name has a word like `token`, `password`,
`secret`, `credential` or `key`. Its value is then replaced by `***`, also where it turns up in other text.

    secrets = Secrets.of(settings, environment_keys(unresolved settings))
    secrets.settings(settings), secrets.overrides(["hub.token=abc"]), secrets.text("https://kay:pw@host")
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MASK = "***"
SHORTEST = 6
"""Characters; a shorter secret value is masked where it is set, and not searched for in other text."""

STRONG = re.compile(r"passw|passphrase|secret|credential|bearer|ssh_?key|api_?key|auth_?token", re.IGNORECASE)
"""Marks a secret wherever it stands in a name."""
WORDS = {"token", "tokens", "key", "keys", "pwd", "pass", "auth"}
"""Mark a secret as a whole word of a name, as in `api_key`; `monkey` and `tokenizer` are none."""
NUMBER = re.compile(r"[-+.\d]{1,8}(e[-+]?\d+)?", re.IGNORECASE)
URI_PASSWORD = re.compile(
    r"(\b[a-z][a-z0-9+.-]*://)(?:([^/\s:@]*):[^/\s]+|(?:gh[a-z]|hf|glpat)[-_]\w{3,})@", re.IGNORECASE
)
"""`scheme://user:password@host`, and a token in the user's place."""
_SAID = r"passwords?|passphrase|bearer|--(?:password|token|api-key)"
FREE = re.compile(rf"((?:{_SAID})(?:\s*:\s*|\s+))(?!\*)(\S*\d\S*)", re.IGNORECASE)
"""`password: abc` and `Bearer abc` in the words of an error."""
_WORD = r"passw|secret|credential|(?:api|access|private|auth)[-_]?(?:key|token)|(?<![a-z])token(?![a-z])"
_NAME = rf"[\w./-]*(?:{_WORD})[\w./-]*"
ASSIGNED = re.compile(rf"({_NAME}\s*=\s*)(\"[^\"]*\"|'[^']*'|[^\s,;&'\"\]}})]+)", re.IGNORECASE)
"""`api_key=abc` within other text; `key=` alone is none there, as in the UI's links."""
ENTRY = re.compile(rf"({_NAME}\s*:\s*)(\"[^\"]*\"|'[^']*'|[^\s,;&'\"\]}})]+)", re.IGNORECASE)
"""`{token: abc}` within an override."""


def is_secret(name: str, value: Any = "") -> bool:
    """Tell whether a setting's value must not be shown, by its name; short numbers are shown unless the name is strong.

    >>> is_secret("hub.api_key"), is_secret("monkey"), is_secret("max_token_length", 225), is_secret("db.password", 7)
    (True, False, False, True)
    """
    if value is None or isinstance(value, bool | float | Mapping | list | tuple):
        return False
    if STRONG.search(name):
        return True
    words = re.split(r"[^A-Za-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))
    return bool(WORDS & {word.lower() for word in words}) and not NUMBER.fullmatch(str(value))


def environment_keys(unresolved: Mapping[str, Any]) -> frozenset[str]:
    """The dotted names of settings that take `oc.env`, themselves or by way of another setting.

    unresolved: the settings as nested mappings and lists with their interpolations still in them, for example
    `OmegaConf.to_container(cfg, resolve=False)`.
    """
    leaves = {name: value for name, value in _leaves(unresolved) if isinstance(value, str)}
    found = {name for name, value in leaves.items() if "${oc.env:" in value}
    while True:
        used = {
            name
            for name, value in leaves.items()
            if any(used in found for used in re.findall(r"\$\{\s*([\w.]+)\s*\}", value))
        }
        if used <= found:
            return frozenset(found)
        found |= used


@dataclass(frozen=True)
class Secrets:
    """What is masked: settings by their dotted names, and values wherever they stand."""

    keys: frozenset[str] = frozenset()
    values: frozenset[str] = field(default=frozenset(), repr=False)

    @classmethod
    def of(cls, settings: Mapping[str, Any], from_environment: Iterable[str] = ()) -> Secrets:
        """Collect the secrets of resolved settings; `from_environment` names those that came from the environment.

        A file or folder that is there is no secret, so `root: ${oc.env:AMBERGRADE_ROOT}` stays readable.
        """
        given = frozenset(from_environment)
        secret = {
            name: str(value)
            for name, value in _leaves(settings)
            if value is not None and (is_secret(name, value) or (name in given and not _is_path(str(value))))
        }
        found = frozenset(name for name in given if name in secret)
        return cls(found, frozenset(value for value in secret.values() if len(value) >= SHORTEST))

    def is_secret(self, name: str, value: Any = "") -> bool:
        """Tell whether a setting's value must not be shown."""
        return name in self.keys or is_secret(name, value)

    def value(self, name: str, value: Any) -> Any:
        """Mask one setting; what is not text or a secret comes back as it is."""
        if self.is_secret(name, value):
            return MASK
        if isinstance(value, Mapping):
            return {key: self.value(f"{name}.{key}" if name else str(key), item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(f"{name}.{number}", item) for number, item in enumerate(value)]
        return self.text(value) if isinstance(value, str) else value

    def shown(self, name: str, value: Any) -> str:
        """Return the text of a parameter or tag that may be journaled; tags of this house and MLflow are no secrets."""
        ours = name.startswith(("ag.", "mlflow."))
        return MASK if not ours and self.is_secret(name, value) else self.text(str(value))

    def settings(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Mask nested settings."""
        return dict(self.value("", settings))

    def overrides(self, overrides: Iterable[str]) -> list[str]:
        """Mask overrides as they were typed: `hub.token=abc` becomes `hub.token=***`."""
        return [self._override(text) for text in overrides]

    def text(self, text: str) -> str:
        """Mask known secrets, passwords in addresses, and `name=value` with a secret's name; the text stays UTF-8."""
        for value in sorted(self.values, key=len, reverse=True):
            text = text.replace(value, MASK)
        text = URI_PASSWORD.sub(_without_password, text)
        text = FREE.sub(rf"\1{MASK}", text)
        text = ASSIGNED.sub(_masked, text)
        return text.encode(errors="replace").decode()

    def _override(self, text: str) -> str:
        name, equals, value = text.partition("=")
        if equals and value and self.is_secret(name.lstrip("+~"), value):
            return f"{name}={MASK}"
        return ENTRY.sub(_masked, self.text(text))


def _without_password(found: re.Match[str]) -> str:
    user = "" if found[2] is None else f"{found[2]}:"
    return f"{found[1]}{user}{MASK}@"


def _masked(found: re.Match[str]) -> str:
    return found[1] + MASK if is_secret(found[1], found[2]) else found[0]


def _leaves(settings: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(settings, Mapping | list | tuple):
        items = settings.items() if isinstance(settings, Mapping) else enumerate(settings)
        for key, value in items:
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    else:
        yield name, settings


def _is_path(value: str) -> bool:
    try:
        return Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long for a name, no home folder, a null byte
        return False
