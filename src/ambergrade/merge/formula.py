"""A merge formula, read from one line as a model card prints it.

    gamma rev1 = beta7 + a * (anxl3 - anxl2) + b * (base7 - beta7)

Names that are no model are coefficients. The line is read by a tokenizer and a recursive descent of our own (never
`eval`), and kept as written: expanding `a * (x - y)` would cost the exactness of the difference.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

from ambergrade.errors import BadSetting, nearest

OPERATORS: Mapping[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
_STRENGTH = {"+": 1, "-": 1, "*": 2, "/": 2}
_ALIAS = re.compile(r"\w+(?:[ .:-]\w+)*")
_NUMBER = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d\d?)?")
_NAME = re.compile(r"[^\W\d]\w*")


@dataclass(frozen=True)
class Number:
    """A number as written; exact, so that 0.1 + 0.2 + 0.7 is 1."""

    exact: Fraction
    column: int = field(default=0, compare=False)

    @property
    def value(self) -> float:
        return float(self.exact)


@dataclass(frozen=True)
class Model:
    """The weights of the model with this alias."""

    alias: str
    column: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Coefficient:
    """A free name: a number given when the merge is made."""

    name: str
    column: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Negative:
    operand: Node
    column: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Binary:
    """`left operator right`; the operator is one of + - * /."""

    operator: str
    left: Node
    right: Node
    column: int = field(default=0, compare=False)


Node = Number | Model | Coefficient | Negative | Binary


@dataclass(frozen=True)
class Formula:
    """A parsed merge. `models[0]`, the first model named, is the base: what is not merged is copied from it."""

    name: str
    """Left of the `=`; empty where the formula has no left side."""
    expression: Node

    @classmethod
    def parse(cls, text: str, models: Iterable[str]) -> Formula:
        """Read one line, given the aliases of the models; aliases may hold spaces, dots and hyphens.

        Where aliases overlap the longest wins, so with the models `x`, `y` and `x-y` the difference is `x - y`.
        Raises BadSetting, pointing at the column, for what cannot be read, for sums of numbers and models, and
        where the models' weights do not sum to 1 for every value of the coefficients.

        >>> formula = Formula.parse("gamma rev1 = beta7 + a*(anxl3 - anxl2)", ["beta7", "anxl2", "anxl3"])
        >>> formula.name, formula.models, formula.coefficients
        ('gamma rev1', ('beta7', 'anxl3', 'anxl2'), ('a',))
        >>> formula.text
        'gamma rev1 = beta7 + a * (anxl3 - anxl2)'
        """
        parser = _Parser(text, models)
        formula = parser.formula()
        total = _weight(formula.expression, parser)
        if total is None:
            raise parser.error("The formula names no model: nothing to merge.", _first_column(formula.expression))
        if not total.is_one():
            suspects = [name for name in formula.coefficients if nearest(name, parser.models)]
            column = _column(formula.expression, suspects[0]) if suspects else _first_column(formula.expression)
            raise parser.error(
                f"The weights of the models must sum to 1 (a difference sums to 0); here they sum to {total}.",
                column,
                suspects[0] if suspects else None,
            )
        return formula

    @cached_property
    def text(self) -> str:
        """The canonical line: one spacing, no needless parentheses, the order and structure as written."""
        written = _written(self.expression)
        return f"{self.name} = {written}" if self.name else written

    @cached_property
    def models(self) -> tuple[str, ...]:
        """Aliases in order of appearance."""
        return tuple(dict.fromkeys(node.alias for node in nodes(self.expression) if isinstance(node, Model)))

    @cached_property
    def coefficients(self) -> tuple[str, ...]:
        """Free names in order of appearance."""
        return tuple(dict.fromkeys(node.name for node in nodes(self.expression) if isinstance(node, Coefficient)))

    def check_coefficients(self, coefficients: Mapping[str, float]) -> None:
        """Raise BadSetting unless each free name has a finite number and nothing else is given."""
        complaints = [f"coefficient '{name}' has no value" for name in self.coefficients if name not in coefficients]
        for name, value in coefficients.items():
            if name not in self.coefficients:
                complaints.append(f"'{name}' is no coefficient of the formula")
            elif not math.isfinite(value):
                complaints.append(f"coefficient '{name}' is {value}")
        if complaints:
            known = ", ".join(self.coefficients) or "none"
            raise BadSetting(f"{self.text}\n{'; '.join(complaints)}.\nCoefficients of this formula: {known}.")


def nodes(node: Node) -> Iterator[Node]:
    """The node and all below it, as they stand from left to right."""
    if isinstance(node, Binary):
        yield from nodes(node.left)
        yield node
        yield from nodes(node.right)
    else:
        yield node
        if isinstance(node, Negative):
            yield from nodes(node.operand)


def number(node: Node, coefficients: Mapping[str, float]) -> float:
    """The value of a node that holds no model. Raises BadSetting for a division by zero."""
    match node:
        case Number():
            return node.value
        case Coefficient(name):
            return float(coefficients[name])
        case Negative(operand):
            return -number(operand, coefficients)
        case Binary(sign, left, right):
            first, second = number(left, coefficients), number(right, coefficients)
            if sign == "/" and second == 0:
                raise BadSetting(f"'{_written(node)}' divides by zero with {dict(coefficients)}.")
            return float(OPERATORS[sign](first, second))
        case Model(alias):
            raise AssertionError(f"{alias} is a model, not a number")


class _Parser:
    """Recursive descent over `sum: product (('+' | '-') product)*`, `product: factor (('*' | '/') factor)*`."""

    def __init__(self, text: str, models: Iterable[str]) -> None:
        self.source = text.strip()
        self.models = tuple(models)
        for alias in self.models:
            if not _ALIAS.fullmatch(alias) or _NUMBER.fullmatch(alias):
                raise BadSetting(
                    f"'{alias}' cannot be a model's alias. Use letters, digits, spaces and _ . : - (and not a number)."
                )
        # A space in an alias stands for any run of spaces; the longest alias is tried first.
        self.aliases = [
            (alias, re.compile(r"\s+".join(map(re.escape, alias.split())) + r"(?!\w)"))
            for alias in sorted(self.models, key=lambda alias: (-len(alias), alias))
        ]
        self.position = 0

    def formula(self) -> Formula:
        if "\n" in self.source:
            raise BadSetting(f"A formula is one line; found {len(self.source.splitlines())}:\n{self.source}")
        if not self.source:
            raise BadSetting("The formula is empty. Write one such as: merged = base + a * (tuned - base)")
        name, equals, _ = self.source.rpartition("=")
        if equals:
            self.position = len(name) + 1
            name = " ".join(name.split())
            if not _ALIAS.fullmatch(name):
                raise self.error("Left of the '=' stands one name, of letters, digits, spaces and _ . : -", 0)
        expression = self.sum()
        if self.position < len(self.source):
            raise self.error("Expected + - * / or the end.", self.position)
        return Formula(name, expression)

    def sum(self) -> Node:
        node = self.product()
        while sign := self.taken("+-"):
            column = self.last
            node = Binary(sign, node, self.product(), column)
        return node

    def product(self) -> Node:
        node = self.factor()
        while sign := self.taken("*/"):
            column = self.last
            node = Binary(sign, node, self.factor(), column)
        return node

    def factor(self) -> Node:
        if self.taken("-"):
            column = self.last
            return Negative(self.factor(), column)
        if self.taken("("):
            opened = self.last
            node = self.sum()
            if not self.taken(")"):
                raise self.error("This parenthesis is never closed.", opened)
            return node
        return self.atom()

    def atom(self) -> Node:
        self.skip_spaces()
        start = self.position
        for alias, pattern in self.aliases:
            if match := pattern.match(self.source, start):
                self.position = match.end()
                return Model(alias, start)
        if match := _NUMBER.match(self.source, start):
            self.position = match.end()
            return Number(Fraction(match.group()), start)
        if match := _NAME.match(self.source, start):
            self.position = match.end()
            return Coefficient(match.group(), start)
        raise self.error("Expected a number, a name or '('.", start)

    def taken(self, signs: str) -> str:
        """The next character if it is one of `signs`, stepped over; else ''."""
        self.skip_spaces()
        sign = self.source[self.position : self.position + 1]
        if not sign or sign not in signs:
            return ""
        self.last = self.position
        self.position += 1
        return sign

    def skip_spaces(self) -> None:
        while self.source[self.position : self.position + 1].isspace():
            self.position += 1

    def error(self, complaint: str, column: int, suspect: str | None = None) -> BadSetting:
        """A BadSetting with a caret under `column`; `suspect` is a free name that may be a misspelt model."""
        lines = [complaint, f"  {self.source}", "  " + " " * column + "^"]
        if suspect is not None:
            near = nearest(suspect, self.models)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            lines.append(f"'{suspect}' is no model, so it was read as a coefficient.{hint}")
        lines.append(f"Models: {', '.join(self.models) or 'none'}")
        return BadSetting("\n".join(lines))


Monomial = tuple[str, ...]


@dataclass(frozen=True)
class _Ratio:
    """A quotient of polynomials in the coefficients, exact: what a weight comes to before the numbers are known."""

    above: Mapping[Monomial, Fraction]
    below: Mapping[Monomial, Fraction]

    @classmethod
    def of(cls, value: Fraction, *names: str) -> _Ratio:
        return cls({names: value} if value else {}, {(): Fraction(1)})

    def __add__(self, other: _Ratio) -> _Ratio:
        if self.below == other.below:
            return _Ratio(_added(self.above, other.above), self.below)
        above = _added(_multiplied(self.above, other.below), _multiplied(other.above, self.below))
        return _Ratio(above, _multiplied(self.below, other.below))

    def __mul__(self, other: _Ratio) -> _Ratio:
        return _Ratio(_multiplied(self.above, other.above), _multiplied(self.below, other.below))

    def inverse(self) -> _Ratio:
        return _Ratio(self.below, self.above)

    def is_one(self) -> bool:
        return self.above == self.below

    def __str__(self) -> str:
        if set(self.below) == {()}:
            return _polynomial({names: value / self.below[()] for names, value in self.above.items()})
        return f"({_polynomial(self.above)}) / ({_polynomial(self.below)})"


_MINUS_ONE = _Ratio.of(Fraction(-1))


def _added(left: Mapping[Monomial, Fraction], right: Mapping[Monomial, Fraction]) -> dict[Monomial, Fraction]:
    total = {names: left.get(names, Fraction(0)) + right.get(names, Fraction(0)) for names in {**left, **right}}
    return {names: value for names, value in total.items() if value}


def _multiplied(left: Mapping[Monomial, Fraction], right: Mapping[Monomial, Fraction]) -> dict[Monomial, Fraction]:
    total: dict[Monomial, Fraction] = {}
    for names, value in left.items():
        for others, factor in right.items():
            total = _added(total, {tuple(sorted(names + others)): value * factor})
    return total


def _polynomial(terms: Mapping[Monomial, Fraction]) -> str:
    """`1 - a + 0.5 * b`, constants first, shorter products before longer ones."""
    text = ""
    for names, value in sorted(terms.items(), key=lambda term: (len(term[0]), term[0])):
        factors = list(names) if abs(value) == 1 and names else [f"{float(abs(value)):.6g}", *names]
        sign = ("-" if value < 0 else "") if not text else (" - " if value < 0 else " + ")
        text += sign + " * ".join(factors)
    return text or "0"


def _weight(node: Node, parser: _Parser) -> _Ratio | None:
    """The sum of the models' weights in `node`; None where it holds no model and so is a plain number.

    Fails where numbers and models are added, or models multiplied: neither is a merge of weights.
    """
    match node:
        case Model():
            return _Ratio.of(Fraction(1))
        case Number() | Coefficient():
            return None
        case Negative(operand):
            inner = _weight(operand, parser)
            return None if inner is None else inner * _MINUS_ONE
        case Binary(sign, left, right):
            first, second = _weight(left, parser), _weight(right, parser)
            if first is None and second is None:
                return None
            if first is not None and second is not None:
                if sign in "*/":
                    raise parser.error("Models are only added and subtracted.", node.column)
                return first + (second if sign == "+" else second * _MINUS_ONE)
            if sign in "+-":
                plain = left if first is None else right
                suspect = plain.name if isinstance(plain, Coefficient) else None
                raise parser.error(f"'{sign}' joins a number and a model's weights.", _first_column(plain), suspect)
            if first is not None:
                return first * (_value(right, parser) if sign == "*" else _inverse(right, parser))
            if sign == "/":
                raise parser.error("A model cannot stand below a '/'.", _first_column(right))
            assert second is not None
            return _value(left, parser) * second


def _value(node: Node, parser: _Parser) -> _Ratio:
    """A node without models as a quotient of polynomials."""
    match node:
        case Number(exact):
            return _Ratio.of(exact)
        case Coefficient(name):
            return _Ratio.of(Fraction(1), name)
        case Negative(operand):
            return _value(operand, parser) * _MINUS_ONE
        case Binary(sign, left, right):
            first = _value(left, parser)
            if sign == "/":
                return first * _inverse(right, parser)
            second = _value(right, parser)
            if sign == "*":
                return first * second
            return first + (second if sign == "+" else second * _MINUS_ONE)
        case Model(alias):
            raise AssertionError(f"{alias} is a model, not a number")


def _inverse(node: Node, parser: _Parser) -> _Ratio:
    value = _value(node, parser)
    if not value.above:
        raise parser.error("This divides by zero.", _first_column(node))
    return value.inverse()


def _first_column(node: Node) -> int:
    return min(part.column for part in nodes(node))


def _column(node: Node, name: str) -> int:
    return next(part.column for part in nodes(node) if isinstance(part, Coefficient) and part.name == name)


def _written(node: Node) -> str:
    match node:
        case Number():
            return repr(node.value).removesuffix(".0")
        case Model(alias):
            return alias
        case Coefficient(name):
            return name
        case Negative(operand):
            inner = _written(operand)
            return f"-({inner})" if isinstance(operand, Binary) else f"-{inner}"
        case Binary(sign, left, right):
            first, second = _written(left), _written(right)
            if isinstance(left, Binary) and _STRENGTH[left.operator] < _STRENGTH[sign]:
                first = f"({first})"
            # The structure is kept: `x - (y - z)` and even `x + (y + z)`, whose rounding differs from `x + y + z`.
            if isinstance(right, Binary) and _STRENGTH[right.operator] <= _STRENGTH[sign]:
                second = f"({second})"
            return f"{first} {sign} {second}"
