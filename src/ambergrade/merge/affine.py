"""What the models' weights sum to, exactly and for every value of the coefficients: 1 for a model, 0 for a difference.

The sums are quotients of polynomials in the coefficients over the rationals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NoReturn

from ambergrade.merge.method import Method
from ambergrade.merge.nodes import SCOPES, Binary, Call, Coefficient, Local, Model, Negative, Node, Number, nodes

Monomial = tuple[str, ...]
Fail = Callable[..., NoReturn]
"""`fail(complaint, column, suspect)`; `suspect` is a free name that may be a misspelt model."""
MOST_TERMS = 400


@dataclass(frozen=True)
class Ratio:
    """A quotient of polynomials in the coefficients."""

    above: Mapping[Monomial, Fraction]
    below: Mapping[Monomial, Fraction]

    @classmethod
    def of(cls, value: int | Fraction, *names: str) -> Ratio:
        return cls({names: Fraction(value)} if value else {}, {(): Fraction(1)})

    def __add__(self, other: Ratio) -> Ratio:
        if self.below == other.below:
            return Ratio(_added(self.above, other.above), self.below)
        above = _added(_multiplied(self.above, other.below), _multiplied(other.above, self.below))
        return Ratio(above, _multiplied(self.below, other.below))

    def __mul__(self, other: Ratio) -> Ratio:
        return Ratio(_multiplied(self.above, other.above), _multiplied(self.below, other.below))

    def inverse(self) -> Ratio:
        return Ratio(self.below, self.above)

    def equals(self, other: Ratio) -> bool:
        return _multiplied(self.above, other.below) == _multiplied(other.above, self.below)

    def __str__(self) -> str:
        if set(self.below) == {()}:
            return _polynomial({names: value / self.below[()] for names, value in self.above.items()})
        return f"({_polynomial(self.above)}) / ({_polynomial(self.below)})"


ONE, ZERO, _MINUS_ONE = Ratio.of(1), Ratio.of(0), Ratio.of(-1)
_WORDS = {"model": (ONE, "a model (its weights sum to 1)"), "difference": (ZERO, "a difference (its weights sum to 0)")}


class TooIntricate(Exception):
    """A polynomial with more than MOST_TERMS terms."""


def weight(node: Node, lines: Mapping[str, Ratio | None], fail: Fail) -> Ratio | None:
    """The sum of the models' weights in `node`; None where it holds no model and so is a plain number.

    `lines` gives the sums of earlier lines. Fails where numbers and models are added, models multiplied, or a
    function is given another kind than it takes.
    """
    match node:
        case Model():
            return ONE
        case Local(name):
            return lines[name]
        case Number() | Coefficient():
            return None
        case Negative(operand):
            inner = weight(operand, lines, fail)
            return None if inner is None else inner * _MINUS_ONE
        case Call():
            return _call_weight(node, lines, fail)
        case Binary(sign, left, right):
            first, second = weight(left, lines, fail), weight(right, lines, fail)
            if first is None and second is None:
                return None
            if first is not None and second is not None:
                if sign in "*/":
                    fail("Models are only added and subtracted.", node.column)
                return first + (second if sign == "+" else second * _MINUS_ONE)
            if sign in "+-":
                plain = left if first is None else right
                suspect = plain.name if isinstance(plain, Coefficient) else None
                fail(f"'{sign}' joins a number and a model's weights.", first_column(plain), suspect)
            if first is not None:
                return first * (_value(right, fail) if sign == "*" else _inverse(right, fail))
            if sign == "/":
                fail("A model cannot stand below a '/'.", first_column(right))
            assert second is not None
            return _value(left, fail) * second


def first_column(node: Node) -> int:
    return min(part.column for part in nodes(node))


def _call_weight(call: Call, lines: Mapping[str, Ratio | None], fail: Fail) -> Ratio:
    sums: list[Ratio] = []
    for argument in call.arguments:
        found = weight(argument, lines, fail)
        if found is None:
            suspect = argument.name if isinstance(argument, Coefficient) else None
            fail(f"{call.function}() takes models here, not a number.", first_column(argument), suspect)
        sums.append(found)
    if call.function == "lora":
        return ZERO
    if call.function in ("at", *SCOPES):
        if len(sums) == 1:
            if not sums[0].equals(ZERO):
                fail(
                    f"The weights inside sum to {sums[0]}, so {call.function}() must say what stands elsewhere: "
                    "add else=… (only a difference may be left out elsewhere).",
                    call.column,
                )
        elif not sums[0].equals(sums[1]):
            fail(f"The two sides of {call.function}() sum to {sums[0]} and {sums[1]}.", call.column)
        return sums[0]
    kinds, gives = ["model", "model"], "model"
    if call.function != "mbw":
        method = Method.read(call.function)
        kinds, gives = method.kinds(len(sums)), method.gives
    for argument, found, kind in zip(call.arguments, sums, kinds, strict=True):
        wanted, words = _WORDS[kind]
        if not found.equals(wanted):
            fail(f"{call.function}() takes {words} here; this sums to {found}.", first_column(argument))
    return _WORDS[gives][0]


def _value(node: Node, fail: Fail) -> Ratio:
    """A node without models as a quotient of polynomials."""
    match node:
        case Number(exact):
            return Ratio.of(exact)
        case Coefficient(name):
            return Ratio.of(1, name)
        case Negative(operand):
            return _value(operand, fail) * _MINUS_ONE
        case Binary(sign, left, right):
            first = _value(left, fail)
            if sign == "/":
                return first * _inverse(right, fail)
            second = _value(right, fail)
            if sign == "*":
                return first * second
            return first + (second if sign == "+" else second * _MINUS_ONE)
        case Model() | Local() | Call():
            raise AssertionError(f"{node} is no number")


def _inverse(node: Node, fail: Fail) -> Ratio:
    value = _value(node, fail)
    if not value.above:
        fail("This divides by zero.", first_column(node))
    return value.inverse()


def _added(left: Mapping[Monomial, Fraction], right: Mapping[Monomial, Fraction]) -> dict[Monomial, Fraction]:
    total = dict(left)
    for names, value in right.items():
        total[names] = total.get(names, Fraction(0)) + value
    return _bounded({names: value for names, value in total.items() if value})


def _multiplied(left: Mapping[Monomial, Fraction], right: Mapping[Monomial, Fraction]) -> dict[Monomial, Fraction]:
    if len(left) * len(right) > MOST_TERMS**2:
        raise TooIntricate
    total: dict[Monomial, Fraction] = {}
    for names, value in left.items():
        for others, factor in right.items():
            product = tuple(sorted(names + others))
            total[product] = total.get(product, Fraction(0)) + value * factor
    return _bounded({names: value for names, value in total.items() if value})


def _bounded(terms: dict[Monomial, Fraction]) -> dict[Monomial, Fraction]:
    if len(terms) > MOST_TERMS:
        raise TooIntricate
    return terms


def _polynomial(terms: Mapping[Monomial, Fraction]) -> str:
    """`1 - a + 0.5 * b`, constants first, shorter products before longer ones."""
    text = ""
    for names, value in sorted(terms.items(), key=lambda term: (len(term[0]), term[0])):
        size = abs(value)
        shown = f"{float(size):.6g}" if size < 10**300 else "more than 1e300"
        factors = list(names) if size == 1 and names else [shown, *names]
        sign = ("-" if value < 0 else "") if not text else (" - " if value < 0 else " + ")
        text += sign + " * ".join(factors)
    return text or "0"
