"""Finds gates by name and lets them judge a candidate: one file in `gates/`, one gate.

A gate `floor` is the module `gates/floor.py` with one pure function:

    def gate(evidence: Evidence, *, metric: str, bound: float) -> Judgement:

`conf/gate/<name>.yaml` holds its settings; `name` is the module, so two yamls may configure one. What a gate needs and
does not find (a metric that was not scored, a NaN) fails it: a release is stopped by doubt, never let through by it.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from ambergrade.errors import AmbergradeError, BadSetting, UnknownName
from ambergrade.nouns import Measurement
from ambergrade.release import gates as plugs


@dataclass(frozen=True)
class Evidence:
    """Holds what is known of a candidate when it is judged."""

    family: str
    """Name of the yaml in conf/family."""
    scores: Mapping[str, Measurement]
    """Metric to the candidate's number on held-out prompts."""
    differences: Mapping[str, Mapping[str, Measurement]] = field(default_factory=dict)
    """Whom it was compared with (`base`, `champion`) to metric to candidate minus them, paired."""
    scorers: Mapping[str, bool] = field(default_factory=dict)
    """Scorer to whether it is one of the embedded world's tiny ones."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """What people wrote on the candidate's version in the registry."""
    pairing: Mapping[str, str] = field(default_factory=dict)
    """Whom it was compared with to what is unlike in prompts, seeds or sampler; empty for a pair."""
    votes: Mapping[str, Measurement] = field(default_factory=dict)
    """Whom people compared it with, blindly, to the share of decided prompts that it won; n counts those."""
    licence: Judgement | None = None
    """Whether the parents' licences allow the release's; None where that was not looked at."""


@dataclass(frozen=True)
class Judgement:
    """Says whether one gate lets a candidate pass, and why."""

    passed: bool
    told: str
    """The number or the reason, in one line."""


class Refused(AmbergradeError):
    """Tells that a candidate did not pass some gates. What was made of it is kept."""


class Gate(Protocol):
    """Judges a candidate; its settings are filled in."""

    def __call__(self, evidence: Evidence) -> Judgement: ...


def load_gate(name: str, **settings: Any) -> Gate:
    """Return the gate `gates/<name>.py` with its settings.

    Raises UnknownName, or BadSetting for settings that it does not take.
    """
    known = [module.name for module in pkgutil.iter_modules(plugs.__path__)]
    if name not in known:
        raise UnknownName("gate", name, known)
    function = importlib.import_module(f"{plugs.__name__}.{name}").gate
    try:
        inspect.signature(function).bind(None, **settings)
    except TypeError as error:
        raise BadSetting(f"gate {name}: {error}.\nconf/gate/{name}.yaml lists its settings.") from error
    return partial(function, **settings)


def load_gates(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Gate]:
    """Return every gate of a pipeline's `gates`, by the name that the pipeline gives it."""
    return {label: load_gate(**chosen) for label, chosen in settings.items()}


def judge(gates: Mapping[str, Gate], evidence: Evidence) -> dict[str, Judgement]:
    """Ask every gate, so that all reasons are known at once."""
    return {label: gate(evidence) for label, gate in gates.items()}


def insist(candidate: str, said: Mapping[str, Judgement]) -> None:
    """Raise Refused with every gate that did not pass, and why."""
    failed = {label: one.told for label, one in said.items() if not one.passed}
    if failed:
        reasons = "\n".join(f"  {label}: {reason}" for label, reason in failed.items())
        raise Refused(
            f"{candidate} stays a candidate: {len(failed)} of {len(said)} gates did not pass.\n{reasons}\n"
            "All that was made is kept."
        )


def told(metric: str, found: Measurement, sign: str = "") -> str:
    """Write a number as `tag_prob 0.912 [0.881, 0.940], n 40`; `sign="+"` for differences."""
    form = f"{sign}.3f"
    if math.isnan(found.low):
        return f"{metric} {found.value:{form}}, n {found.n}: too few prompts for an interval"
    return f"{metric} {found.value:{form}} [{found.low:{form}}, {found.high:{form}}], n {found.n}"
