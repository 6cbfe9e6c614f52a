"""The formula parser, judged by Python's own grammar and by exact fractions."""

from __future__ import annotations

import ast
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ambergrade.errors import BadSetting
from ambergrade.merge.formula import Binary, Coefficient, Formula, Model, Negative, Node, Number, number

MODELS = ("beta7", "base7", "anxl2", "anxl3")
CARD = "gamma rev1 = beta7 + 0.8 * (anxl3 - anxl2) + 0.5 * (base7 - beta7)"


def test_the_cards_line_reads_verbatim() -> None:
    formula = Formula.parse(CARD, MODELS)
    assert formula.name == "gamma rev1"
    assert formula.models == ("beta7", "anxl3", "anxl2", "base7")
    assert formula.coefficients == ()
    assert formula.text == CARD


def test_free_names_are_coefficients() -> None:
    formula = Formula.parse("gamma = beta7 + a * (anxl3 - anxl2) + b * (base7 - beta7)\n", MODELS)
    assert formula.coefficients == ("a", "b")


def test_aliases_with_spaces_dots_and_hyphens() -> None:
    models = ["Kohaku XL v1.5", "animagine-xl-3.0", "3dmix", "kohaku"]
    formula = Formula.parse("animagine-xl-3.0-0.5*(Kohaku   XL v1.5 - kohaku) + 0*3dmix - 0*3dmix", models)
    assert formula.models == ("animagine-xl-3.0", "Kohaku XL v1.5", "kohaku", "3dmix")
    assert Formula.parse(formula.text, models) == formula


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("beta7+.80*(anxl3-anxl2)", "beta7 + 0.8 * (anxl3 - anxl2)", True),
        ("(beta7 + a*anxl3) - a*anxl2", "beta7 + a * anxl3 - a * anxl2", True),
        ("beta7 + (a*anxl3 - a*anxl2)", "beta7 + a * anxl3 - a * anxl2", False),
        ("beta7 - (anxl3 - anxl2)", "beta7 - anxl3 + anxl2", False),
    ],
)
def test_canonical_text_keeps_structure_and_forgets_spelling(one: str, other: str, same: bool) -> None:
    assert (Formula.parse(one, MODELS).text == Formula.parse(other, MODELS).text) is same


@pytest.mark.parametrize(
    "text",
    [
        "0.1 * beta7 + 0.2 * base7 + 0.7 * anxl3",  # exact, though 0.1 + 0.2 + 0.7 is not 1 in floats
        ".5*beta7 + .8*anxl3 - .8*anxl2 + .5*base7",
        "(1 - a) * beta7 + a * base7",
        "(a * beta7 + b * base7) / (a + b)",
        "-(a - 1) * beta7 - -a * base7",
        "beta7 + a * b * (anxl3 - anxl2) / 2",
        "beta7",
    ],
)
def test_affine_formulas_are_accepted(text: str) -> None:
    Formula.parse(text, MODELS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("beta7 + base7", "sum to 2"),
        ("beta7 + a * anxl3 - b * anxl2", "sum to 1 + a - b"),
        ("0.33 * beta7 + 0.33 * base7 + 0.33 * anxl3", "sum to 0.99"),
        ("a * (anxl3 - anxl2)", "sum to 0"),
        ("(a * beta7 + base7) / (1 + b)", r"sum to \(1 \+ a\) / \(1 \+ b\)".replace("\\", "")),
    ],
)
def test_other_sums_are_refused_with_what_they_come_to(text: str, says: str) -> None:
    with pytest.raises(BadSetting) as caught:
        Formula.parse(text, MODELS)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "column", "says"),
    [
        ("beta7 + a * (anxl3 - anxl2", 12, "never closed"),
        ("beta7 + a (anxl3 - anxl2)", 10, "Expected + - * / or the end"),
        ("beta7 + * anxl3", 8, "Expected a number, a name"),
        ("beta7 % 2", 6, "Expected + - * /"),
        ("beta8 + a * (anxl3 - anxl2)", 0, "Did you mean beta7"),
        ("beta7 + a * (anxl4 - anxl2)", 13, "'anxl4' is no model"),
        ("beta7 + a", 8, "joins a number and a model"),
        ("beta7 * anxl3", 6, "only added and subtracted"),
        ("1 / beta7", 4, "cannot stand below"),
        ("beta7 / (a - a)", 9, "divides by zero"),
        ("a * b", 0, "names no model"),
        ("x = y = beta7", 6, "One '=' a line"),
        ("2 x! = beta7", 0, "Left of the '='"),
        ("", None, "empty"),
        ("beta7\n+ base7", None, "Line 1: Every line but the last needs a name"),
        ("__import__('os')", 10, "Expected + - * / or the end"),
    ],
)
def test_errors_point_at_the_column(text: str, column: int | None, says: str) -> None:
    with pytest.raises(BadSetting) as caught:
        Formula.parse(text, MODELS)
    assert says in str(caught.value)
    if column is not None:
        assert f"  {text}\n  {' ' * column}^" in str(caught.value)


def test_an_alias_that_reads_as_something_else_is_refused() -> None:
    for alias in ("1e5", "a + b", "a - b", "(x)", ""):
        with pytest.raises(BadSetting, match="cannot be a model's alias"):
            Formula.parse("beta7", ["beta7", alias])


def test_coefficients_are_checked_all_at_once() -> None:
    formula = Formula.parse("beta7 + a * (anxl3 - anxl2) + b * (base7 - beta7)", MODELS)
    with pytest.raises(BadSetting, match=r"'b' has no value; 'c' is no coefficient.*; coefficient 'a' is nan"):
        formula.check_coefficients({"c": 1.0, "a": float("nan")})
    with pytest.raises(BadSetting, match="divides by zero"):
        number(Formula.parse("beta7 + 1 / a * (anxl3 - anxl2)", MODELS).expression.right.left, {"a": 0.0})  # type: ignore[union-attr]


# Random formulas: any expression of the grammar, its text parsed here and by Python's own parser.

_leaves: st.SearchStrategy[Node] = st.one_of(
    st.sampled_from(MODELS).map(Model),
    st.sampled_from(["a", "b"]).map(Coefficient),
    st.integers(1, 40).map(lambda n: Number(Fraction(n, 8))),
)
_trees: st.SearchStrategy[Node] = st.recursive(
    _leaves,
    lambda inner: st.one_of(inner.map(Negative), st.builds(Binary, st.sampled_from("+-*/"), inner, inner)),
    max_leaves=12,
)


def _full(node: Node) -> str:
    match node:
        case Binary(sign, left, right):
            return f"({_full(left)}{sign}{_full(right)})"
        case Negative(operand):
            return f"(-{_full(operand)})"
        case Number():
            return repr(node.value)
        case Model(name) | Coefficient(name):
            return name


def _values(names: dict[str, float], text: str) -> float:
    """Python's own reading of the text."""
    return float(eval(compile(ast.parse(text, mode="eval"), "formula", "eval"), {"__builtins__": {}}, names))


@given(_trees, st.floats(0.1, 2), st.floats(0.1, 2))
def test_random_formulas_agree_with_pythons_grammar(tree: Node, a: float, b: float) -> None:
    text = _full(tree)
    try:
        formula = Formula.parse(text, MODELS)
    except BadSetting:
        return
    assert formula.expression == tree
    again = Formula.parse(formula.text, MODELS)
    assert again == formula
    assert again.text == formula.text
    # The affine check's promise: with every model at the same value the merge has that value, whatever a and b are.
    try:
        merged = _values(dict.fromkeys(MODELS, 3.0) | {"a": a, "b": b}, formula.text)
    except ZeroDivisionError:
        return
    assert merged == pytest.approx(3.0, rel=1e-6, abs=1e-6)


@given(_trees.filter(lambda tree: "Model" not in repr(tree)), st.floats(0.1, 2), st.floats(0.1, 2))
def test_numbers_are_worked_out_as_python_does(tree: Node, a: float, b: float) -> None:
    try:
        expected = _values({"a": a, "b": b}, _full(tree))
    except ZeroDivisionError:
        with pytest.raises(BadSetting, match="divides by zero"):
            number(tree, {"a": a, "b": b})
        return
    assert number(tree, {"a": a, "b": b}) == pytest.approx(expected, rel=1e-9, abs=1e-9)
