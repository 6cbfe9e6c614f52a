"""What a formula is made of. Nodes add, subtract and scale like numbers, so a card's line is also valid Python:

>>> beta7, anxl2, anxl3 = Model("beta7"), Model("anxl2"), Model("anxl3")
>>> written(beta7 + 0.8 * (anxl3 - anxl2))
'beta7 + 0.8 * (anxl3 - anxl2)'
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from typing import TypeAlias

SCOPES = ("unet", "te1", "te2", "vae")
"""Functions that restrict an expression to one component."""
_STRENGTH = {"+": 1, "-": 1, "*": 2, "/": 2}


class Operators:
    """Python's operators on nodes; numbers are taken as they print (0.1 is one tenth)."""

    def __add__(self, other: Node | float) -> Binary:
        return Binary("+", _node(self), _node(other))

    def __radd__(self, other: Node | float) -> Binary:
        return Binary("+", _node(other), _node(self))

    def __sub__(self, other: Node | float) -> Binary:
        return Binary("-", _node(self), _node(other))

    def __rsub__(self, other: Node | float) -> Binary:
        return Binary("-", _node(other), _node(self))

    def __mul__(self, other: Node | float) -> Binary:
        return Binary("*", _node(self), _node(other))

    def __rmul__(self, other: Node | float) -> Binary:
        return Binary("*", _node(other), _node(self))

    def __truediv__(self, other: Node | float) -> Binary:
        return Binary("/", _node(self), _node(other))

    def __neg__(self) -> Negative:
        return Negative(_node(self))


@dataclass(frozen=True)
class Number(Operators):
    """A number as written; exact, so that 0.1 + 0.2 + 0.7 is 1."""

    exact: Fraction
    column: int = field(default=0, compare=False)

    @property
    def value(self) -> float:
        return float(self.exact)


@dataclass(frozen=True)
class Model(Operators):
    """The weights of the model with this alias."""

    alias: str
    column: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Coefficient(Operators):
    """A free name: a number given when the merge is made."""

    name: str
    column: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Local(Operators):
    """The value of an earlier line."""

    name: str
    column: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Negative(Operators):
    operand: Node
    column: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Binary(Operators):
    """`left operator right`; the operator is one of + - * /."""

    operator: str
    left: Node
    right: Node
    column: int = field(default=0, compare=False)


Option: TypeAlias = "Node | str | bool"


@dataclass(frozen=True)
class Call(Operators):
    """`function(arguments, name=option, …)`: a scope, a block merge, a LoRA or a method of conf/method."""

    function: str
    arguments: tuple[Node, ...]
    """Expressions of weights; a scope's second is its `else`."""
    options: tuple[tuple[str, Option], ...] = ()
    """Everything else, defaults filled in: numbers (nodes without models), texts, true or false."""
    column: int = field(default=0, compare=False)

    def option(self, name: str) -> Option:
        return dict(self.options)[name]


Node: TypeAlias = Number | Model | Coefficient | Local | Negative | Binary | Call


def _node(value: object) -> Node:
    if isinstance(value, Number | Model | Coefficient | Local | Negative | Binary | Call):
        return value
    if isinstance(value, int | float | Fraction | Decimal):
        return Number(value if isinstance(value, Fraction) else Fraction(str(value)))
    raise TypeError(f"A formula is made of models and numbers, not of {value!r}")


def nodes(node: Node) -> Iterator[Node]:
    """The node and all below it, as they stand from left to right."""
    match node:
        case Binary():
            yield from nodes(node.left)
            yield node
            yield from nodes(node.right)
        case Negative():
            yield node
            yield from nodes(node.operand)
        case Call():
            yield node
            for inner in (*node.arguments, *(option for _, option in node.options)):
                if not isinstance(inner, str | bool):
                    yield from nodes(inner)
        case _:
            yield node


def written(node: Node) -> str:
    """The canonical text: one spacing, no needless parentheses, the order and structure as written."""
    match node:
        case Number(exact):
            return _number_text(exact)
        case Model(alias):
            return alias
        case Coefficient(name) | Local(name):
            return name
        case Negative(operand):
            inner = written(operand)
            return f"-({inner})" if isinstance(operand, Binary) else f"-{inner}"
        case Call():
            return _call_text(node)
        case Binary(sign, left, right):
            first, second = written(left), written(right)
            if isinstance(left, Binary) and _STRENGTH[left.operator] < _STRENGTH[sign]:
                first = f"({first})"
            # The structure is kept: `x - (y - z)` and even `x + (y + z)`.
            if isinstance(right, Binary) and _STRENGTH[right.operator] <= _STRENGTH[sign]:
                second = f"({second})"
            return f"{first} {sign} {second}"


def _number_text(exact: Fraction) -> str:
    """The shortest decimal, where there is one of reasonable length; it reads back as the same fraction."""
    short = repr(float(exact)).removesuffix(".0")
    if Fraction(short) == exact:
        return short
    digits = Decimal(exact.numerator) / Decimal(exact.denominator)
    return str(digits.normalize()) if Fraction(digits) == exact else f"({exact.numerator} / {exact.denominator})"


def _call_text(call: Call) -> str:
    arguments = [written(argument) for argument in call.arguments]
    options = dict(call.options)
    if call.function == "at":
        arguments.insert(0, _quoted(str(options.pop("glob"))))
    if call.function in ("at", *SCOPES) and len(call.arguments) == 2:
        arguments[-1] = f"else={arguments[-1]}"
    if call.function == "mbw":
        arguments.append(_quoted(str(options.pop("values"))))
    if call.function == "lora":
        arguments = [str(options.pop("file"))]
    arguments += [f"{name}={_option_text(option)}" for name, option in options.items()]
    return f"{call.function}({', '.join(arguments)})"


def _option_text(option: Option) -> str:
    if isinstance(option, bool):
        return str(option).lower()
    return _quoted(option) if isinstance(option, str) else written(option)


def _quoted(text: str) -> str:
    return f'"{text}"'
