"""What a formula comes to for one tensor: rational weights of models and of what functions make of them."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from ambergrade.errors import BadSetting
from ambergrade.merge.blocks import component, mbw_weight
from ambergrade.merge.formula import Formula, exact
from ambergrade.merge.method import Method
from ambergrade.merge.nodes import (
    SCOPES,
    Binary,
    Call,
    Coefficient,
    Local,
    Model,
    Negative,
    Node,
    Number,
    Option,
    nodes,
)
from ambergrade.merge.weights import Weights

MOST_WEIGHT = Fraction(10) ** 30


@dataclass(frozen=True)
class Applied:
    """A method or a LoRA, of mixtures."""

    function: str
    arguments: tuple[Mixture, ...]
    options: tuple[tuple[str, float | str | bool], ...]


Atom: TypeAlias = "str | Applied"
"""A model's alias, or what a function makes."""


@dataclass(frozen=True)
class Mixture:
    """A weighted sum of atoms; no weight is zero."""

    terms: tuple[tuple[Atom, Fraction], ...]

    @functools.cached_property
    def linear(self) -> bool:
        """Made of models alone."""
        return all(isinstance(atom, str) for atom, _ in self.terms)

    @functools.cached_property
    def models(self) -> tuple[str, ...]:
        """Every alias inside, LoRAs left out."""
        found: dict[str, None] = {}
        for atom, _ in self.terms:
            for alias in (atom,) if isinstance(atom, str) else [a for m in atom.arguments for a in m.models]:
                found.setdefault(alias)
        return tuple(found)

    @functools.cached_property
    def weights(self) -> Weights:
        """The terms' factors, in their order."""
        return Weights(tuple(weight for _, weight in self.terms))

    def only(self, alias: str) -> bool:
        """Whether this is that model, unchanged."""
        return self.terms == ((alias, Fraction(1)),)

    def __str__(self) -> str:
        return " + ".join(f"{_shown(weight)} {_named(atom)}" for atom, weight in self.terms) or "0"


def mixer(formula: Formula, coefficients: Mapping[str, float]) -> Callable[[str], Mixture]:
    """A function from a tensor's single-file name to its mixture, the base's term first.

    Raises BadSetting for weights that are no fit numbers and for blocks that a list of weights does not cover.
    """
    formula.check_coefficients(coefficients)
    rank = {alias: place for place, alias in enumerate(formula.models)}
    where = _where(formula)
    known: dict[tuple[object, ...], Mixture] = {}

    def mix(name: str) -> Mixture:
        key = where(name)  # most tensors share their mixture with others
        if key not in known:
            known[key] = made(name)
        return known[key]

    def made(name: str) -> Mixture:
        lines: dict[str, _Terms] = {}
        for line, node in formula.lines:
            lines[line] = _terms(node, lines, name, coefficients)
        return _mixture(_terms(formula.expression, lines, name, coefficients), rank)

    return mix


def _where(formula: Formula) -> Callable[[str], tuple[object, ...]]:
    """What of a tensor's name the formula looks at."""
    expressions = [formula.expression, *(node for _, node in formula.lines)]
    calls = [part for node in expressions for part in nodes(node) if isinstance(part, Call)]
    globs = [str(call.option("glob")) for call in calls if call.function == "at"]
    blocks = [call for call in calls if call.function == "mbw"]

    def where(name: str) -> tuple[object, ...]:
        matches = [fnmatch.fnmatchcase(name, glob) for glob in globs]
        shares = [mbw_weight(name, str(call.option("values")), str(call.option("dialect"))) for call in blocks]
        return (component(name), *matches, *shares)

    return where


_Terms = dict[Atom, Fraction]


def _terms(node: Node, lines: Mapping[str, _Terms], name: str, numbers: Mapping[str, float]) -> _Terms:
    match node:
        case Model(alias):
            return {alias: Fraction(1)}
        case Local(line):
            return lines[line]
        case Negative(operand):
            return _scaled(_terms(operand, lines, name, numbers), Fraction(-1))
        case Call():
            return _call(node, lines, name, numbers)
        case Binary(sign, left, right):
            if sign == "*" and _is_number(left):
                return _scaled(_terms(right, lines, name, numbers), exact(left, numbers))
            first = _terms(left, lines, name, numbers)
            if sign in "*/":
                factor = exact(right, numbers)
                if sign == "/" and factor == 0:
                    raise BadSetting(f"The formula divides by zero with {dict(numbers)}.")
                return _scaled(first, factor if sign == "*" else 1 / factor)
            second = _terms(right, lines, name, numbers)
            return _added(first, second if sign == "+" else _scaled(second, Fraction(-1)))
        case Number() | Coefficient():
            raise AssertionError(f"{node} holds no model")


def _call(call: Call, lines: Mapping[str, _Terms], name: str, numbers: Mapping[str, float]) -> _Terms:
    if call.function in ("at", *SCOPES):
        if call.function == "at":
            inside = fnmatch.fnmatchcase(name, str(call.option("glob")))
        else:
            inside = component(name) == call.function
        if inside:
            return _terms(call.arguments[0], lines, name, numbers)
        return _terms(call.arguments[1], lines, name, numbers) if len(call.arguments) == 2 else {}
    arguments = [_terms(argument, lines, name, numbers) for argument in call.arguments]
    if call.function == "mbw":
        share = mbw_weight(name, str(call.option("values")), str(call.option("dialect")))
        return _added(_scaled(arguments[0], 1 - share), _scaled(arguments[1], share))
    options = tuple((key, _value(call.function, key, option, numbers)) for key, option in call.options)
    return {Applied(call.function, tuple(_mixture(terms, {}) for terms in arguments), options): Fraction(1)}


def _value(function: str, key: str, option: Option, numbers: Mapping[str, float]) -> float | str | bool:
    """An option's value. Raises BadSetting for a fraction where the method counts, as ranks and seeds do."""
    if isinstance(option, str | bool):
        return option
    value = exact(option, numbers)
    if value.denominator > 1 and type(Method.read(function).parameters[key]) is int:
        raise BadSetting(f"{function}({key}={float(value):g}): {key} is a whole number.")
    return float(value)


def _mixture(terms: _Terms, rank: Mapping[str, int]) -> Mixture:
    kept = [(atom, weight) for atom, weight in terms.items() if weight]
    for atom, weight in kept:
        if abs(weight) > MOST_WEIGHT or abs(weight) < 1 / MOST_WEIGHT:
            raise BadSetting(f"The weight of {_named(atom)} is beyond 1e30 or below 1e-30: it means nothing.")
    kept.sort(key=lambda term: rank.get(term[0], len(rank)) if isinstance(term[0], str) else len(rank) + 1)
    return Mixture(tuple(kept))


def _scaled(terms: _Terms, factor: Fraction) -> _Terms:
    return {atom: weight * factor for atom, weight in terms.items()} if factor else {}


def _added(first: _Terms, second: _Terms) -> _Terms:
    total = dict(first)
    for atom, weight in second.items():
        total[atom] = total.get(atom, Fraction(0)) + weight
    return {atom: weight for atom, weight in total.items() if weight}


def _is_number(node: Node) -> bool:
    match node:
        case Number() | Coefficient():
            return True
        case Negative(operand):
            return _is_number(operand)
        case Binary(_, left, right):
            return _is_number(left) and _is_number(right)
    return False


def _named(atom: Atom) -> str:
    if isinstance(atom, str):
        return atom
    parts = [f"({mixture})" for mixture in atom.arguments]
    parts += [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in atom.options]
    return f"{atom.function}({', '.join(parts)})"


def _shown(weight: Fraction) -> str:
    return f"{float(weight):.6g}"
