"""A merge formula, read as a model card prints it: one line, or several with intermediate names.

    gamma rev2 = beta7 + a * (anxl3 - anxl2) + b * (base8 - beta7)
    merged = mbw(gamma rev2, anxl3, "0,0.1,0.1,…", dialect="supermerger")

Names that are no model and no earlier line are coefficients. Numbers are kept as exact fractions.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property

from ambergrade.errors import BadSetting
from ambergrade.merge.nodes import (
    Binary,
    Call,
    Coefficient,
    Local,
    Model,
    Negative,
    Node,
    Number,
    Operators,
    nodes,
    written,
)
from ambergrade.merge.parser import parse

__all__ = [
    "Binary",
    "Call",
    "Coefficient",
    "Formula",
    "Local",
    "Model",
    "Negative",
    "Node",
    "Number",
    "exact",
    "nodes",
    "number",
    "written",
]

_OPERATORS: Mapping[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


@dataclass(frozen=True)
class Formula:
    """A parsed merge. `models[0]`, the first model of the result, is the base: what is not merged is copied from it."""

    name: str
    """Left of the last `=`; empty where the last line has no left side."""
    expression: Node
    """The last line's."""
    lines: tuple[tuple[str, Node], ...] = ()
    """Earlier lines that the result needs, as (name, expression)."""
    lora_paths: Mapping[str, str] = field(default_factory=dict, compare=False)
    """Alias to path, for each `lora("path", …)`."""
    unused: tuple[str, ...] = field(default=(), compare=False)
    """Names of lines that were read and checked, and that the result does not need."""

    @classmethod
    def parse(cls, text: str, models: Iterable[str]) -> Formula:
        """Read a formula, given the aliases of the models; aliases may hold spaces, dots and hyphens.

        Where aliases overlap the longest wins, so with the models `x`, `y` and `x-y` the difference is `x - y`.
        Raises BadSetting, pointing at the column, for what cannot be read, for sums of numbers and models, and
        where the models' weights do not sum to 1 for every value of the coefficients.

        >>> formula = Formula.parse("gamma rev1 = beta7 + a*(anxl3 - anxl2)", ["beta7", "anxl2", "anxl3"])
        >>> formula.name, formula.models, formula.coefficients
        ('gamma rev1', ('beta7', 'anxl3', 'anxl2'), ('a',))
        >>> formula.text
        'gamma rev1 = beta7 + a * (anxl3 - anxl2)'
        """
        read = parse(text, models)
        *earlier, last = read.lines
        needed = {node.name for node in nodes(last.expression) if isinstance(node, Local)}
        for line in reversed(earlier):
            if line.name in needed:
                needed |= {node.name for node in nodes(line.expression) if isinstance(node, Local)}
        kept = tuple((line.name, line.expression) for line in earlier if line.name in needed)
        unused = tuple(line.name for line in earlier if line.name not in needed)
        return cls(last.name, last.expression, kept, read.lora_paths, unused)

    @classmethod
    def of(cls, expression: Operators, name: str = "") -> Formula:
        """A formula from Python's operators on nodes, checked like a written one.

        >>> beta7, base7 = Model("beta7"), Model("base7")
        >>> Formula.of(beta7 + Coefficient("b") * (base7 - beta7), "tuned").text
        'tuned = beta7 + b * (base7 - beta7)'
        """
        assert isinstance(expression, Node)
        parts = list(nodes(expression))
        aliases = [node.alias for node in parts if isinstance(node, Model)]
        aliases += [str(node.option("file")) for node in parts if isinstance(node, Call) and node.function == "lora"]
        return cls.parse(f"{name} = {written(expression)}" if name else written(expression), dict.fromkeys(aliases))

    @cached_property
    def text(self) -> str:
        """The canonical lines: one spacing, no needless parentheses, the order and structure as written."""
        shown = [f"{name} = {written(node)}" for name, node in self.lines]
        last = written(self.expression)
        return "\n".join([*shown, f"{self.name} = {last}" if self.name else last])

    @cached_property
    def models(self) -> tuple[str, ...]:
        """Aliases in order of appearance, the result's first."""
        return self._appearing(lambda node: node.alias if isinstance(node, Model) else None)

    @cached_property
    def loras(self) -> tuple[str, ...]:
        """Aliases of the LoRAs, in order of appearance."""
        return self._appearing(
            lambda node: str(node.option("file")) if isinstance(node, Call) and node.function == "lora" else None
        )

    @cached_property
    def coefficients(self) -> tuple[str, ...]:
        """Free names in order of appearance."""
        return self._appearing(lambda node: node.name if isinstance(node, Coefficient) else None)

    def _appearing(self, name_of: object) -> tuple[str, ...]:
        assert callable(name_of)
        lines: dict[str, dict[str, None]] = {}

        def found(node: Node) -> dict[str, None]:
            names: dict[str, None] = {}
            for part in nodes(node):
                if isinstance(part, Local):
                    names |= {name: None for name in lines[part.name] if name not in names}
                elif (name := name_of(part)) is not None:
                    names.setdefault(name)
            return names

        for line, node in self.lines:
            lines[line] = found(node)
        return tuple(found(self.expression))

    def check_coefficients(self, coefficients: Mapping[str, float]) -> None:
        """Raise BadSetting unless each free name has a finite number and nothing else is given."""
        complaints = [f"coefficient '{name}' has no value" for name in self.coefficients if name not in coefficients]
        for name, value in coefficients.items():
            if name not in self.coefficients:
                complaints.append(f"'{name}' is no coefficient of the formula")
            elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                complaints.append(f"coefficient '{name}' is {value}")
        if complaints:
            known = ", ".join(self.coefficients) or "none"
            raise BadSetting(f"{self.text}\n{'; '.join(complaints)}.\nCoefficients of this formula: {known}.")


def exact(node: Node, coefficients: Mapping[str, float]) -> Fraction:
    """The value of a node that holds no model; a coefficient is taken as it prints, 0.1 as one tenth.

    Raises BadSetting for a division by zero.
    """
    match node:
        case Number():
            return node.exact
        case Coefficient(name):
            return Fraction(repr(float(coefficients[name])))
        case Negative(operand):
            return -exact(operand, coefficients)
        case Binary(sign, left, right):
            first, second = exact(left, coefficients), exact(right, coefficients)
            if sign == "/" and second == 0:
                raise BadSetting(f"'{written(node)}' divides by zero with {dict(coefficients)}.")
            return _OPERATORS[sign](first, second)
        case Model() | Local() | Call():
            raise AssertionError(f"{written(node)} is no number")


def number(node: Node, coefficients: Mapping[str, float]) -> float:
    """`exact`, as the nearest float."""
    return float(exact(node, coefficients))
