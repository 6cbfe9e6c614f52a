"""A formula's text to nodes: a tokenizer and a recursive descent of our own, never `eval`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Any, NoReturn, TypeVar

from ambergrade.errors import BadSetting, UnknownName, nearest
from ambergrade.merge import method
from ambergrade.merge.affine import ONE, Ratio, TooIntricate, first_column, weight
from ambergrade.merge.blocks import DIALECTS, block_weights
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

_AnyNode = TypeVar("_AnyNode", bound=Node)
ALIAS = re.compile(r"\w+(?:[ .:-]\w+)*")
_NUMBER = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?")
_NAME = re.compile(r"[^\W\d]\w*")
_TEXT = re.compile(r"\"([^\"\n]*)\"|'([^'\n]*)'")
MOST_CHARACTERS, MOST_LINES, MOST_NODES, MOST_DEPTH = 100_000, 200, 500, 50
"""The largest formula, line and nesting: far beyond what people publish, far below what costs time."""
MOST_NUMBER = Fraction(10) ** 300


@dataclass(frozen=True)
class Line:
    """One line that was read and checked."""

    name: str
    expression: Node
    weight: Ratio


@dataclass
class Parsed:
    lines: list[Line]
    """As written; the last is the result."""
    lora_paths: dict[str, str]
    """Alias to path, for each `lora("path", …)`."""


def parse(text: str, aliases: Iterable[str]) -> Parsed:
    """Read all lines. Raises BadSetting that points at the column."""
    known = tuple(aliases)
    for alias in known:
        if not ALIAS.fullmatch(alias) or _NUMBER.fullmatch(alias):
            raise BadSetting(
                f"'{alias}' cannot be a model's alias. Use letters, digits, spaces and _ . : - (and not a number)."
            )
    if len(text) > MOST_CHARACTERS:
        raise BadSetting(f"The formula has {len(text):,} characters; at most {MOST_CHARACTERS:,} are read.")
    sources = [line.partition("#")[0].strip() for line in text.splitlines()]
    sources = [source for source in sources if source]
    if not sources:
        raise BadSetting("The formula is empty. Write one such as: merged = base + a * (tuned - base)")
    if len(sources) > MOST_LINES:
        raise BadSetting(f"The formula has {len(sources)} lines; at most {MOST_LINES} are read.")
    parsed = Parsed([], {})
    for number, source in enumerate(sources):
        last = number == len(sources) - 1
        parsed.lines.append(_Parser(source, known, parsed).line(number + 1 if len(sources) > 1 else 0, last=last))
    return parsed


class _Parser:
    """Recursive descent over `sum: product (('+' | '-') product)*`, `product: factor (('*' | '/') factor)*`."""

    def __init__(self, source: str, models: tuple[str, ...], parsed: Parsed) -> None:
        self.source, self.models, self.parsed = source, models, parsed
        self.locals = {line.name: line.weight for line in parsed.lines}
        names = sorted({*models, *self.locals}, key=lambda alias: (-len(alias), alias))
        # A space in an alias stands for any run of spaces; the longest alias is tried first.
        self.aliases = [(name, re.compile(r"\s+".join(map(re.escape, name.split())) + r"(?!\w)")) for name in names]
        self.position = self.last = self.depth = self.count = self.number = 0

    def line(self, number: int, *, last: bool) -> Line:
        self.number = number
        name = self.left_side()
        if not name and not last:
            raise self.error("Every line but the last needs a name: name = …", 0)
        if name and not last and (name in self.models or name in self.locals):
            raise self.error(f"'{name}' is taken. Choose another name for this line.", 0)
        expression = self.sum()
        self.skip_spaces()
        if self.position < len(self.source):
            self.fail_at_rest()
        try:
            total = weight(expression, self.locals, self.fail)
        except TooIntricate:
            raise self.error("Too many products of coefficients. Split the formula into lines.", 0) from None
        if total is None:
            raise self.error("The formula names no model: nothing to merge.", first_column(expression))
        if last and not total.equals(ONE):
            self.fail_of_sum(expression, total)
        return Line(name, expression, total)

    def left_side(self) -> str:
        head, equals, _ = self.source.partition("=")
        if not equals or any(sign in head for sign in "(\"'"):
            return ""
        self.position = len(head) + 1
        name = " ".join(head.split())
        if not ALIAS.fullmatch(name):
            raise self.error("Left of the '=' stands one name, of letters, digits, spaces and _ . : -", 0)
        return name

    def sum(self) -> Node:
        node = self.product()
        while sign := self.taken("+-"):
            column = self.last
            node = self.counted(Binary(sign, node, self.product(), column))
        return node

    def product(self) -> Node:
        node = self.factor()
        while sign := self.taken("*/"):
            column = self.last
            node = self.counted(Binary(sign, node, self.factor(), column))
        return node

    def factor(self) -> Node:
        if self.taken("-"):
            column = self.deeper()
            node: Node = self.counted(Negative(self.factor(), column))
        elif self.taken("("):
            column = self.deeper()
            node = self.sum()
            self.closed(column)
        else:
            return self.atom()
        self.depth -= 1
        return node

    def atom(self) -> Node:
        self.skip_spaces()
        start = self.position
        name = _NAME.match(self.source, start)
        if name and name.group() in functions() and self.source[name.end() :].lstrip().startswith("("):
            self.position = self.source.index("(", name.end()) + 1
            return self.call(name.group(), start)
        for alias, pattern in self.aliases:
            if match := pattern.match(self.source, start):
                self.position = match.end()
                return Local(alias, start) if alias in self.locals else Model(alias, start)
        if match := _NUMBER.match(self.source, start):
            self.position = match.end()
            if len(match.group()) > 40:
                raise self.error("A number has at most 40 characters.", start)
            number = Fraction(match.group())
            if number and not 1 / MOST_NUMBER <= number <= MOST_NUMBER:
                raise self.error("A number lies between 1e-300 and 1e300.", start)
            return Number(number, start)
        if name:
            self.position = name.end()
            return Coefficient(name.group(), start)
        raise self.error("Expected a number, a name or '('.", start)

    # --- functions

    def call(self, name: str, column: int) -> Node:
        self.last = self.position - 1
        self.deeper()
        given, options = self.arguments(column)
        self.depth -= 1
        made: dict[str, Any] = {"at": self.at, "mbw": self.mbw, "lora": self.lora}
        if name in SCOPES:
            return self.counted(self.scope(name, given, options, column))
        if name in made:
            node: Node = made[name](given, options, column)
            return self.counted(node)
        return self.counted(self.method(name, given, options, column))

    def arguments(self, column: int) -> tuple[list[Node | str], dict[str, Node | str | bool]]:
        """What stands between the parentheses: by position, and by name."""
        given: list[Node | str] = []
        options: dict[str, Node | str | bool] = {}
        opened = self.last
        while not self.taken(")"):
            if given or options:
                if not self.taken(","):
                    self.closed(opened)
                    break
                if self.taken(")"):  # a last comma
                    break
            self.skip_spaces()
            keyword = re.compile(r"([^\W\d]\w*)\s*=").match(self.source, self.position)
            if keyword:
                self.position = keyword.end()
                if keyword[1] in options:
                    raise self.error(f"'{keyword[1]}' is given twice.", keyword.start())
                word = re.compile(r"\s*(true|false|True|False)\b").match(self.source, self.position)
                if word:
                    self.position = word.end()
                    options[keyword[1]] = word[1].lower() == "true"
                else:
                    options[keyword[1]] = self.text_or_sum()
            elif options:
                raise self.error("What is given by name comes last.", self.position)
            else:
                given.append(self.text_or_sum())
        return given, options

    def text_or_sum(self) -> Node | str:
        self.skip_spaces()
        if match := _TEXT.match(self.source, self.position):
            self.position = match.end()
            return match[1] if match[1] is not None else match[2]
        return self.sum()

    def scope(self, name: str, given: list[Any], options: dict[str, Any], column: int) -> Call:
        otherwise = options.pop("else", None)
        self.usage(
            f"{name}(expression, else=expression)",
            len(given) == 1 and not options and not any(isinstance(part, str) for part in (*given, otherwise)),
            column,
        )
        return Call(name, (given[0],) if otherwise is None else (given[0], otherwise), (), column)

    def at(self, given: list[Any], options: dict[str, Any], column: int) -> Call:
        usage = 'at("glob of tensor names", expression, else=expression)'
        self.usage(usage, len(given) == 2 and isinstance(given[0], str), column)
        inner = self.scope("at", given[1:], options, column)
        return Call("at", inner.arguments, (("glob", given[0]),), column)

    def mbw(self, given: list[Any], options: dict[str, Any], column: int) -> Call:
        usage = f'mbw(a, b, "20, 21 or 26 numbers", dialect="{" or ".join(DIALECTS)}")'
        fits = len(given) == 3 and [isinstance(part, str) for part in given] == [False, False, True]
        self.usage(usage, fits and options.keys() == {"dialect"} and isinstance(options["dialect"], str), column)
        try:
            values = block_weights(given[2], options["dialect"])
        except (BadSetting, UnknownName) as error:
            raise self.error(str(error), column) from None
        text = ",".join(value for _, value in values)
        return Call("mbw", (given[0], given[1]), (("values", text), ("dialect", options["dialect"])), column)

    def lora(self, given: list[Any], options: dict[str, Any], column: int) -> Node:
        self.usage("lora(alias or path, weight)", len(given) in (1, 2) and not options, column)
        file = given[0]
        if isinstance(file, str):
            alias = PurePosixPath(file).stem
            if not ALIAS.fullmatch(alias):
                raise self.error(f"'{alias}' is no fit name. Give the file an alias under models.", column)
            if self.parsed.lora_paths.setdefault(alias, file) != file:
                raise self.error(f"Two LoRAs are called '{alias}'. Give the files aliases under models.", column)
        elif isinstance(file, Model):
            alias = file.alias
        else:
            suspect = file.name if isinstance(file, Coefficient) else None
            raise self.error("lora() takes an alias or a path first.", column, suspect)
        call = Call("lora", (), (("file", alias),), column)
        if len(given) == 1:
            return call
        if isinstance(given[1], str):
            raise self.error("A LoRA's weight is a number.", column)
        return Binary("*", given[1], call, column)

    def method(self, name: str, given: list[Any], options: dict[str, Any], column: int) -> Call:
        plan = method.Method.read(name)
        keywords = "".join(f", {key}={_shown(value)}" for key, value in plan.parameters.items())
        usage = f"{name}({', '.join(plan.arguments)}{keywords})"
        try:
            plan.kinds(len(given))
        except BadSetting as error:
            raise self.error(f"{error} Usage: {usage}", column) from None
        self.usage(usage, not any(isinstance(part, str) for part in given), column)
        unknown = [key for key in options if key not in plan.parameters]
        if unknown:
            raise self.error(str(UnknownName(f"Parameter of {name}()", unknown[0], plan.parameters)), column)
        filled: list[tuple[str, Option]] = []
        for key, default in plan.parameters.items():
            value = options.get(key, default)
            if isinstance(value, int | float) and not isinstance(value, bool):
                value = Number(Fraction(str(value)), column)
            if isinstance(default, str | bool) != isinstance(value, str | bool) or (
                isinstance(default, str | bool) and type(value) is not type(default)
            ):
                raise self.error(f"{key} of {name}() is {_shown(value)}; wanted one like {_shown(default)}.", column)
            if not isinstance(value, str | bool) and any(
                isinstance(part, Model | Local | Call) for part in nodes(value)
            ):
                raise self.error(f"{key} of {name}() is a number, not a model.", column)
            filled.append((key, value))
        return Call(name, tuple(given), tuple(filled), column)

    # --- small steps

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

    def deeper(self) -> int:
        """Count one more level; returns the column where it began."""
        self.depth += 1
        if self.depth > MOST_DEPTH:
            raise self.error(f"More than {MOST_DEPTH} levels. Split the formula into lines with names.", self.last)
        return self.last

    def counted(self, node: _AnyNode) -> _AnyNode:
        self.count += 1
        if self.count > MOST_NODES:
            raise self.error(f"More than {MOST_NODES} operations. Split the formula into lines.", self.last)
        return node

    def closed(self, opened: int) -> None:
        if not self.taken(")"):
            self.skip_spaces()
            if self.position < len(self.source):
                self.fail_at_rest()
            raise self.error("This parenthesis is never closed.", opened)

    def usage(self, usage: str, fits: bool, column: int) -> None:
        if not fits:
            raise self.error(f"Usage: {usage}", column)

    # --- complaints

    def fail_at_rest(self) -> NoReturn:
        if self.source[self.position] == "=":
            raise self.error("One '=' a line: name = expression.", self.position)
        before = re.search(r"[^\W\d]\w*$", self.source[: self.position].rstrip())
        hint = ""
        if self.source[self.position] == "(" and before and (near := nearest(before.group(), functions())):
            hint = f" Did you mean {' or '.join(f'{name}(…)' for name in near)}?"
        raise self.error(f"Expected + - * / or the end.{hint}", self.position)

    def fail_of_sum(self, expression: Node, total: Ratio) -> NoReturn:
        free = [node for node in nodes(expression) if isinstance(node, Coefficient)]
        known = [*self.models, *self.locals]
        suspect = next((node for node in free if nearest(node.name, known)), None)
        raise self.error(
            f"The weights of the models must sum to 1 (a difference sums to 0); here they sum to {total}.",
            suspect.column if suspect else first_column(expression),
            suspect.name if suspect else None,
        )

    def fail(self, complaint: str, column: int, suspect: str | None = None) -> NoReturn:
        raise self.error(complaint, column, suspect)

    def error(self, complaint: str, column: int, suspect: str | None = None) -> BadSetting:
        """A BadSetting with a caret under `column`; `suspect` is a free name that may be a misspelt model."""
        start = max(0, column - 80)
        shown = self.source[start : start + 120]
        lines = [f"Line {self.number}: {complaint}" if self.number else complaint]
        lines += [f"  {shown}", "  " + " " * (column - start) + "^"]
        if suspect is not None:
            near = nearest(suspect, [*self.models, *self.locals])
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            lines.append(f"'{suspect}' is no model, so it was read as a coefficient.{hint}")
        shown_models = ", ".join(self.models[:24]) + (", …" if len(self.models) > 24 else "")
        lines.append(f"Models: {shown_models or 'none'}")
        return BadSetting("\n".join(lines))


def functions() -> tuple[str, ...]:
    """Every name that may stand before '(' in a formula."""
    return ("at", *SCOPES, "mbw", "lora", *method.names())


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value.value if isinstance(value, Number) else value)
