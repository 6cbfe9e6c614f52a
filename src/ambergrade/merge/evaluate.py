"""One tensor's value, from its operands in memory: copied, merged linearly, or through methods on canonical parts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ambergrade.family.dtypes import torch_dtypes
from ambergrade.family.layouts import Source
from ambergrade.merge.arithmetic import Combiner
from ambergrade.merge.lora import difference
from ambergrade.merge.method import Context, Method
from ambergrade.merge.mixture import Applied, Mixture
from ambergrade.merge.parts import Parts
from ambergrade.merge.plan import Task


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
        weights = task.mixture.weights
        return self.combiner.combine(weights, xs, out, tensors.get(self.base))

    def whole(self, task: Task, tensors: Mapping[str, Tensor]) -> Tensor:
        """A tensor whose mixture holds methods, from whole operands in the single file's shape."""
        out = torch.empty(task.shape, dtype=torch_dtypes()[task.dtype], device=self.combiner.device)
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
            weights = mixture.weights
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
