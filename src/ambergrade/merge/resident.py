"""Merging in memory: the inputs are read once, and every further point costs one pass over the weights.

All arithmetic is fp32 in the order the formula is written, with unfused operations (`a + w * (b - c)`, no `lerp`, no
`add(alpha=)`: fused forms change bits with the CPU), and one rounding at the end. The difference of two nearby fp16
values is exact in fp32, so a formula kept as written ends on the fp16 number nearest to the exact result; where two
are equally near it may be either (at 0.8 and 0.5 it is always the even one; at 0.6 and 0.7 in all but 1 of 600).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ambergrade.errors import BadInput, UnknownName
from ambergrade.merge.formula import (
    OPERATORS,
    Binary,
    Coefficient,
    Formula,
    Model,
    Negative,
    Node,
    Number,
    nodes,
    number,
)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VAE_PREFIX = "first_stage_model."
COSMETIC_ENDINGS = ("position_ids", "logit_scale")
"""Index tables and CLIP's temperature: averaging them means nothing and breaks ids."""


def is_copied(name: str, tensor: Tensor) -> bool:
    """Whether this single-file key is copied from the base: the VAE, what is not float, and the cosmetic."""
    return not tensor.is_floating_point() or name.startswith(VAE_PREFIX) or name.endswith(COSMETIC_ENDINGS)


class ResidentMerge:
    """A formula over models held in memory; `at` gives the merge for one set of coefficients.

    What is copied from the base (`formula.models[0]`, see `is_copied`) is copied byte for byte. All else must be in
    every model with one shape. Sub-expressions without a coefficient, such as `anxl3 - anxl2`, are computed once and
    kept in fp32.

    >>> x, y = {"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}
    >>> merge = ResidentMerge(Formula.parse("x + a * (y - x)", ["x", "y"]), {"x": x, "y": y})
    >>> merge.at({"a": 0.25})["w"]
    tensor([1.5000])
    """

    def __init__(
        self, formula: Formula, inputs: Mapping[str, Mapping[str, Tensor]], *, dtype: str | None = None
    ) -> None:
        """`inputs` maps each alias to its tensors; `dtype` is one of fp32, fp16, bf16, or None for the base's own.

        Raises UnknownName for a dtype or a missing model, BadInput for keys or shapes that differ (with a list) and
        for a tensor that holds an infinity or NaN (with its name).
        """
        if dtype is not None and dtype not in DTYPES:
            raise UnknownName("dtype", dtype, DTYPES)
        for alias in formula.models:
            if alias not in inputs:
                raise UnknownName("model", alias, inputs, f"The formula {formula.text} needs it.")
        self.formula = formula
        self._dtype = None if dtype is None else DTYPES[dtype]
        self._inputs = {alias: inputs[alias] for alias in formula.models}
        self._base = inputs[formula.models[0]]
        self._merged = [name for name, tensor in self._base.items() if not is_copied(name, tensor)]
        self._check_layout()
        self._check_finite()
        self._constants: dict[Node, dict[str, Tensor]] = {}
        for node in _constant_differences(formula.expression):
            program = self._program(node, {})
            self._constants[node] = {name: program(name) for name in self._merged}

    def at(self, coefficients: Mapping[str, float]) -> dict[str, Tensor]:
        """The merged tensors, in the base's order: fresh storage for what is merged, the base's own for what is copied.

        Raises BadSetting for coefficients that do not fit the formula and BadInput, with the tensor's name, where the
        result is beyond the range of the output dtype.
        """
        self.formula.check_coefficients(coefficients)
        program = self._program(self.formula.expression, coefficients)
        result = dict(self._base)
        for name in self._merged:
            base = self._base[name]
            exact, exact_base = program(name), base.to(torch.float32)
            # -0.0 + 0.0 is 0.0: an unchanged zero keeps its sign, so that merge(x, x) is x to the bit.
            exact = torch.where(exact == exact_base, exact_base, exact)
            result[name] = exact.to(self._dtype or base.dtype)
            if not result[name].isfinite().all():
                raise BadInput(
                    f"{self.formula.text}\nThe merge at {dict(coefficients)} leaves the range of {result[name].dtype} "
                    f"in '{name}'.\nUse smaller coefficients, or an output dtype of greater range (bf16, fp32)."
                )
        return result

    def _program(self, node: Node, coefficients: Mapping[str, float]) -> Callable[[str], Tensor]:
        """A function from a tensor's name to the fp32 value of `node`, with its plain numbers worked out."""
        if node in self._constants:
            return self._constants[node].__getitem__
        match node:
            case Model(alias):
                tensors = self._inputs[alias]
                return lambda name: tensors[name].to(torch.float32)
            case Negative(operand):
                inner = self._program(operand, coefficients)
                return lambda name: -inner(name)
            case Binary(sign, left, right):
                operate = OPERATORS[sign]
                if not _holds_model(left):
                    factor, second = number(left, coefficients), self._program(right, coefficients)
                    return lambda name: operate(factor, second(name))
                first = self._program(left, coefficients)
                if not _holds_model(right):
                    factor = number(right, coefficients)
                    return lambda name: operate(first(name), factor)
                second = self._program(right, coefficients)
                return lambda name: operate(first(name), second(name))
            case Number() | Coefficient():
                raise AssertionError(f"{node} holds no model")

    def _check_layout(self) -> None:
        """Refuse keys that are not in every model and shapes that differ, all of them in one list."""
        base_alias = self.formula.models[0]
        complaints = []
        for alias, tensors in self._inputs.items():
            names = {name for name, tensor in tensors.items() if not is_copied(name, tensor)}
            complaints += [f"'{name}' is missing in {alias}" for name in self._merged if name not in names]
            complaints += [
                f"'{name}' of {alias} is missing in {base_alias}" for name in sorted(names - {*self._merged})
            ]
            for name in self._merged:
                shape, base_shape = tuple(tensors[name].shape) if name in names else None, tuple(self._base[name].shape)
                if shape not in (None, base_shape):
                    complaints.append(f"'{name}' is {shape} in {alias}, {base_shape} in {base_alias}")
        if complaints:
            shown = "\n  ".join(complaints[:12]) + ("\n  …" if len(complaints) > 12 else "")
            raise BadInput(
                f"{self.formula.text}\nThe models do not hold the same tensors; {len(complaints)} differ:\n  {shown}\n"
                "Merge models of one family, and of one prediction type."
            )

    def _check_finite(self) -> None:
        for alias, tensors in self._inputs.items():
            for name in self._base if tensors is self._base else self._merged:
                if not tensors[name].to(torch.float32).isfinite().all():
                    raise BadInput(f"'{name}' of {alias} holds NaN or infinity. Mend or replace that checkpoint.")


def _holds_model(node: Node) -> bool:
    return any(isinstance(part, Model) for part in nodes(node))


def _constant_differences(node: Node) -> Iterator[Binary]:
    """The largest parts that hold models and no coefficient: their value is one for all points."""
    if isinstance(node, Binary):
        if _holds_model(node) and not any(isinstance(part, Coefficient) for part in nodes(node)):
            yield node
        else:
            yield from _constant_differences(node.left)
            yield from _constant_differences(node.right)
    elif isinstance(node, Negative):
        yield from _constant_differences(node.operand)
