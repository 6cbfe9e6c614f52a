"""One tensor's value, from its operands in memory: copied, merged linearly, or through methods on canonical parts."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ambergrade.errors import BadInput
from ambergrade.family.detect import Layout
from ambergrade.family.files import TORCH
from ambergrade.family.layouts import Source, looks_transposed
from ambergrade.merge.arithmetic import Combiner, Weights
from ambergrade.merge.lora import difference
from ambergrade.merge.method import Context, Method
from ambergrade.merge.mixture import Applied, Mixture
from ambergrade.merge.plan import Task

Parts = Mapping[str, Sequence[tuple[str, Source]]]
"""Single-file name to its canonical parts: canonical name, and how it is taken from the single file's tensor."""


def canonical_parts(layout: Layout | None, shapes: Mapping[str, tuple[int, ...]]) -> Parts:
    """The parts that methods see, named `component/diffusers key`; none for what is canonical as it is."""
    if layout is None:
        return {}
    found: dict[str, list[tuple[str, Source]]] = {}
    for part in layout.family.components:
        for key, source in layout.family.to_diffusers(part, shapes).items():
            found.setdefault(source.keys[0], []).append((f"{part}/{key}", source))
    return {name: sorted(parts, key=lambda item: item[1].part) for name, parts in found.items()}


def check_operands(task: Task, tensors: Mapping[str, Tensor], base: str, *, cosmetic: str) -> None:
    """Refuse what only values tell: ids that are none, temperatures or markers that differ, a transposed matrix."""
    first = tensors[task.mixture.models[0]] if task.mixture.models else tensors[base]
    if task.name.endswith("position_ids") and len(first.reshape(-1)):
        ids = first.reshape(-1).double()
        if cosmetic == "refuse" and not torch.equal(ids, torch.arange(len(ids), dtype=torch.float64)):
            raise BadInput(
                f"'{task.name}' of {base} is not 0, 1, 2 …: another tool merged it like a weight.\n"
                "Mend or replace that file, or keep its ids with policies.cosmetic: base."
            )
    for alias in task.compared if cosmetic == "refuse" else ():
        near = first.shape == tensors[alias].shape and torch.allclose(
            first.float(), tensors[alias].float(), rtol=2**-7, atol=0
        )
        if not near:
            raise BadInput(
                f"'{task.name}' differs: {_few(first)} in {base}, {_few(tensors[alias])} in {alias}.\n"
                "Check that the models belong together, or take the base's with policies.cosmetic: base."
            )
    if task.kind == "merge" and task.name.endswith("text_projection"):
        for alias in task.mixture.models:
            if alias != base and base in tensors and looks_transposed(tensors[alias], tensors[base]):
                raise BadInput(
                    f"'{task.name}' of {alias} is transposed against {base}'s: a tool forgot that diffusers and the "
                    "single file hold it differently.\nWrite one of the two files again with a tool that transposes it."
                )


def refuse_nonfinite(task: Task, tensors: Mapping[str, Tensor], what: str) -> None:
    """Say whose fault it is that the result is not finite."""
    for alias in task.models:
        if alias in tensors and not bool(tensors[alias].double().isfinite().all()):
            raise BadInput(f"'{task.name}' of {alias} holds NaN or infinity. Mend or replace that checkpoint.")
    raise BadInput(
        f"{what}\nThe merge leaves the range of {task.dtype} in '{task.name}'.\n"
        "Use smaller coefficients, or an output dtype of greater range (bf16, fp32)."
    )


class Kept:
    """What methods and LoRAs made, kept for the next point: of atoms that hold no coefficient, up to some bytes.

    A value is kept as it was made, so a point has the same bits with it and without. Threads may share it.
    """

    def __init__(self, atoms: frozenset[Applied], most: int) -> None:
        self.atoms, self.left = atoms, most
        self._values: dict[tuple[Applied, str], Tensor] = {}
        self._lock = threading.Lock()

    def get(self, atom: Applied, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The atom's value on the canonical part `name`."""
        if atom not in self.atoms:
            return make()
        value = self._values.get((atom, name))
        if value is None:
            value = make()
            with self._lock:
                size = value.untyped_storage().nbytes()
                if size <= self.left:
                    self._values[atom, name] = value
                    self.left -= size
        return value


class Evaluator:
    """Values of merged tensors. One for each thread: it owns buffers."""

    def __init__(
        self,
        base: str,
        parts: Parts,
        loras: Callable[[str, str], Mapping[str, Tensor]],
        device: str = "cpu",
        *,
        kept: Kept | None = None,
    ) -> None:
        """`loras(alias, name)` gives the tensors of a LoRA that the weight `name` needs; `kept` spares repeats."""
        self.base, self.parts, self.loras = base, parts, loras
        self.kept = kept or Kept(frozenset(), 0)
        self.combiner = Combiner(device)

    def linear(self, task: Task, tensors: Mapping[str, Tensor], out: Tensor) -> bool:
        """Any stretch of a tensor, flat; returns whether the result is finite."""
        xs = [tensors[alias] for alias in task.mixture.models]
        if task.mixture.only(task.mixture.models[0]) and xs[0].dtype == out.dtype:
            out.copy_(xs[0])
            return self.combiner.finite(out)
        weights = _weights(task.mixture)
        return self.combiner.combine(weights, xs, out, tensors.get(self.base))

    def whole(self, task: Task, tensors: Mapping[str, Tensor]) -> Tensor:
        """A tensor whose mixture holds methods, from whole operands in the single file's shape."""
        out = torch.empty(task.shape, dtype=TORCH[task.dtype], device=self.combiner.device)
        parts = self.parts.get(task.name) or [(task.name, Source((task.name,)))]
        for name, source in parts:
            made = self._mixed(task.mixture, task, name, source, tensors, out.dtype)
            target = source.take({task.name: out})
            target.copy_(made.reshape(target.shape))
        return out

    def _mixed(
        self,
        mixture: Mixture,
        task: Task,
        name: str,
        source: Source,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> Tensor:
        """A mixture on one canonical part, correctly rounded once from its atoms."""
        atoms = [self._atom(atom, task, name, source, tensors) for atom, _ in mixture.terms]
        shape = source.shape({task.name: task.shape})
        out = torch.zeros(shape, dtype=dtype, device=self.combiner.device)
        if atoms:
            base = self._atom(self.base, task, name, source, tensors) if self.base in tensors else None
            weights = _weights(mixture)
            flat_base = None if base is None else base.reshape(-1)
            self.combiner.combine(weights, [atom.reshape(-1) for atom in atoms], out.reshape(-1), flat_base)
        return out

    def _atom(
        self, atom: str | Applied, task: Task, name: str, source: Source, tensors: Mapping[str, Tensor]
    ) -> Tensor:
        if isinstance(atom, str):
            return source.take({task.name: tensors[atom]}).contiguous()
        return self.kept.get(atom, name, lambda: self._applied(atom, task, name, source, tensors))

    def _applied(self, atom: Applied, task: Task, name: str, source: Source, tensors: Mapping[str, Tensor]) -> Tensor:
        if atom.function == "lora":
            file = str(dict(atom.options)["file"])
            made = difference(task.name, self.loras(file, task.name), tensors[self.base])
            return source.take({task.name: made}).contiguous()
        arguments = [self._mixed(m, task, name, source, tensors, torch.float32) for m in atom.arguments]
        method = Method.read(atom.function)
        options = {
            key: int(value) if isinstance(method.parameters[key], int) and not isinstance(value, str | bool) else value
            for key, value in atom.options
        }
        result = method.function(*arguments, **options, context=Context(name))
        assert result.shape == arguments[0].shape, (atom.function, name, result.shape)
        return result.float().contiguous()


def operands(task: Task, base: str) -> tuple[str, ...]:
    """The models whose tensor is read: those with a weight, those compared, and the base where a LoRA may need it."""
    needs_base = not task.mixture.linear
    return tuple(dict.fromkeys((*task.models, *((base,) if needs_base else ()))))


@functools.lru_cache(maxsize=256)
def _weights(mixture: Mixture) -> Weights:
    return Weights(tuple(weight for _, weight in mixture.terms))


def _few(x: Tensor) -> str:
    values = x.reshape(-1)[:3].tolist()
    return ", ".join(f"{value:g}" for value in values) + (" …" if math.prod(x.shape) > 3 else "") if values else "empty"
