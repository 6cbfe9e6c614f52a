"""Merging in memory: the inputs are read once, and every further point costs one pass over the weights.

The same plan and the same arithmetic as for files, so a live model has the bits of the file that would be released.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from ambergrade.errors import BadInput, UnknownName
from ambergrade.family.detect import Layout, detect
from ambergrade.family.dtypes import torch_dtypes, words
from ambergrade.merge.blocks import component
from ambergrade.merge.checks import check_operands, needs_values, refuse_nonfinite
from ambergrade.merge.engine import keep_subnormals
from ambergrade.merge.evaluate import Evaluator, Kept
from ambergrade.merge.formula import Formula
from ambergrade.merge.lora import check_shapes, targets
from ambergrade.merge.mixture import Applied, Mixture
from ambergrade.merge.parts import canonical_parts
from ambergrade.merge.passes import Live, fused_point
from ambergrade.merge.plan import DTYPES, Plan, Task, check_policies, input_names, make_plan, operands


class ResidentMerge:
    """A formula over models held in memory in their own precision; a point is merged anew from them.

    What is copied from the base (`formula.models[0]`; see `plan`) is copied byte for byte. All else must be in every
    model with one shape.

    >>> x, y = {"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}
    >>> merge = ResidentMerge(Formula.parse("x + a * (y - x)", ["x", "y"]), {"x": x, "y": y})
    >>> merge.at({"a": 0.25})["w"]
    tensor([1.5000])
    """

    def __init__(
        self,
        formula: Formula,
        inputs: Mapping[str, Mapping[str, Tensor]],
        *,
        dtype: str | None = None,
        policies: Mapping[str, str] | None = None,
        keep: int | None = None,
    ) -> None:
        """`inputs` maps each alias to its tensors: models' under single-file names, LoRAs' as `lora.read_lora` gives.

        `keep`: bytes of what methods and LoRAs make without coefficients that are kept between points, in fp32; None is
        half of the memory that is free now.
        `dtype` is one of fp32, fp16, bf16, or None for the base's own. Raises UnknownName for a dtype or a missing
        model, BadInput for keys or shapes that differ (with a list) and for values that cannot be merged.
        """
        if dtype is not None and dtype not in DTYPES:
            raise UnknownName("dtype", dtype, DTYPES)
        self._policies = check_policies(policies or {}, (*formula.models, *inputs))
        needed = input_names(formula, self._policies)
        for alias in needed:
            if alias not in inputs:
                raise UnknownName("model", alias, inputs, f"The formula {formula.text} needs it.")
        self.formula = formula
        self._dtype = dtype
        self._inputs = {alias: inputs[alias] for alias in needed}
        self._base = inputs[formula.models[0]]
        devices = {tensor.device for found in self._inputs.values() for tensor in found.values()}
        if len(devices) > 1:
            raise BadInput(f"The inputs lie on {', '.join(sorted(map(str, devices)))}. Move all of them to one device.")
        self._device = devices.pop() if devices else torch.device("cpu")
        shapes = {name: tuple(tensor.shape) for name, tensor in self._base.items()}
        self._layout = _layout(shapes)
        self._parts = canonical_parts(self._layout, shapes)
        self._lora_targets = {}
        left_out: list[str] | None = [] if self._policies["lora"] == "fitting" else None
        for alias in formula.loras:
            entries = {name: tuple(tensor.shape) for name, tensor in inputs[alias].items()}
            self._lora_targets[alias] = targets(entries, shapes, left_out)
            check_shapes(self._lora_targets[alias], entries, shapes)
        self._planned: tuple[str, Plan] | None = None
        # Any point with every model in it will do for the checks, and an odd one divides by no zero.
        some = {name: 0.6180339 + 0.1 * place for place, name in enumerate(formula.coefficients)}
        plan = self._plan(some)
        self._check(plan)
        self._kept = Kept(self._constant(plan, some), _free_memory() // 2 if keep is None else keep)

    def made_of(self, coefficients: Mapping[str, float], *components: str) -> tuple[tuple[str, Mixture], ...]:
        """Name and mixture of every tensor of these components (`te1`, `te2`, `unet`, `vae`).

        Equal for two points, it says that the components have the same bits in both.
        """
        tasks = self._plan(coefficients).tasks.values()
        return tuple((task.name, task.mixture) for task in tasks if component(task.name) in components)

    def at(self, coefficients: Mapping[str, float]) -> dict[str, Tensor]:
        """The merged tensors, in the base's order: fresh storage for what is merged, the input's for what is copied.

        Raises BadSetting for coefficients that do not fit the formula and BadInput, with the tensor's name, where the
        result is beyond the range of the output dtype.
        """
        plan = self._plan(coefficients)
        made: dict[str, Tensor] = {}

        def one(evaluator: Evaluator, task: Task) -> None:
            made[task.name] = self._value(plan, task, evaluator)

        self._each(plan, one)
        return {name: made[name] for name in plan.tasks}

    def assign(self, modules: Mapping[str, nn.Module], coefficients: Mapping[str, float]) -> None:
        """Write a point straight into live modules (component name to module), without a copy of the model.

        The parameters get the values that `at` gives, in the modules' own dtype. Raises as `at`, and BadInput where a
        module and the merged tensors do not hold the same.
        """
        plan = self._plan(coefficients)
        live = self._live(modules, plan)

        def one(evaluator: Evaluator, task: Task) -> None:
            if task.name in live:
                parts = live[task.name]
                here = len(parts) == 1 and parts[0].holds(task) and parts[0].target.device == self._device
                straight = parts[0].target if here else None
                value = self._value(plan, task, evaluator, straight)
                for part in parts if value is not straight else ():
                    part.target.copy_(part.source.take({task.name: value}))

        with torch.no_grad():
            fused, wrong = fused_point(plan, live, self._inputs)
            for name in sorted(wrong):
                self._refuse(plan, plan.tasks[name])
            self._each(plan, one, fused)

    def _plan(self, coefficients: Mapping[str, float]) -> Plan:
        """The last plan is kept: a point is assigned, and then asked what it is made of."""
        point = str(sorted(coefficients.items()))  # -0.0 is another point than 0.0
        if self._planned is None or self._planned[0] != point:
            plan = make_plan(
                self.formula,
                coefficients,
                self._described,
                dtype=self._dtype,
                policies=self._policies,
                loras={alias: tuple(found) for alias, found in self._lora_targets.items()},
                family=self._layout.family if self._layout else None,
            )
            self._planned = (point, plan)
        return self._planned[1]

    @cached_property
    def _described(self) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
        return {
            alias: {name: (words()[tensor.dtype], tuple(tensor.shape)) for name, tensor in self._inputs[alias].items()}
            for alias in self._inputs
            if alias not in self.formula.loras
        }

    def _each(self, plan: Plan, work: Callable[[Evaluator, Task], None], done: Collection[str] = ()) -> None:
        threads = torch.get_num_threads()
        free: SimpleQueue[Evaluator] = SimpleQueue()
        for _ in range(threads):
            free.put(self._evaluator(plan, self._kept))

        def one(task: Task) -> None:
            evaluator = free.get()
            try:
                work(evaluator, task)
            finally:
                free.put(evaluator)

        torch.set_num_threads(1)  # our threads, not torch's own within each
        try:
            with ThreadPoolExecutor(threads, initializer=keep_subnormals) as pool:
                for _ in pool.map(one, [task for name, task in plan.tasks.items() if name not in done]):
                    pass
        finally:
            torch.set_num_threads(threads)

    def _value(self, plan: Plan, task: Task, evaluator: Evaluator, out: Tensor | None = None) -> Tensor:
        """The merged tensor; in `out`, where that is given and the mixture is linear."""
        first = self._inputs[task.mixture.models[0]][task.name]
        if task.kind == "copy":
            return first
        if task.kind == "ids":
            return first.to(torch.int64)
        tensors = {alias: self._inputs[alias][task.name] for alias in operands(task, plan.base)}
        if task.mixture.linear:
            value = (
                torch.empty(task.shape, dtype=torch_dtypes()[task.dtype], device=self._device) if out is None else out
            )
            flat = {alias: tensor.reshape(-1) for alias, tensor in tensors.items()}
            finite = evaluator.linear(task, flat, value.view(-1))
        else:
            value = evaluator.whole(task, tensors)
            finite = evaluator.combiner.finite(value.view(-1))
        if not finite:
            self._refuse(plan, task)
        return value

    def _refuse(self, plan: Plan, task: Task) -> None:
        tensors = {alias: self._inputs[alias][task.name] for alias in operands(task, plan.base)}
        sound = {alias: bool(tensor.double().isfinite().all()) for alias, tensor in tensors.items()}
        refuse_nonfinite(task, sound, f"{self.formula.text} at {dict(plan.coefficients)}")

    def _evaluator(self, plan: Plan, kept: Kept | None = None) -> Evaluator:
        return Evaluator(plan.base, self._parts, self._lora_tensors, str(self._device), kept=kept)

    def _lora_tensors(self, alias: str, name: str) -> Mapping[str, Tensor]:
        return {key: self._inputs[alias][key] for key in self._lora_targets[alias][name]}

    def _constant(self, plan: Plan, some: Mapping[str, float]) -> frozenset[Applied]:
        """What methods and LoRAs make at every point: the atoms that two points have in common."""
        if all(task.mixture.linear for task in plan.tasks.values()):
            return frozenset()
        other = self._plan({name: value / 2 for name, value in some.items()})
        found = [{atom for task in one.tasks.values() for atom in _atoms(task.mixture)} for one in (plan, other)]
        return frozenset(found[0] & found[1])

    def _check(self, plan: Plan) -> None:
        """What values alone can tell, of every input, once."""
        probe = self._evaluator(plan)
        for task in plan.tasks.values():
            tensors = {alias: self._inputs[alias][task.name] for alias in operands(task, plan.base)}
            if needs_values(task):
                values = {alias: tensor.double().cpu().numpy() for alias, tensor in tensors.items()}
                check_operands(task, values, plan.base, cosmetic=self._policies["cosmetic"])
            for alias, tensor in tensors.items():
                if tensor.is_floating_point() and not task.schedule and not probe.combiner.finite(tensor.reshape(-1)):
                    raise BadInput(f"'{task.name}' of {alias} holds NaN or infinity. Mend or replace that checkpoint.")

    def _live(self, modules: Mapping[str, nn.Module], plan: Plan) -> dict[str, list[Live]]:
        """Merged name to the parameters it fills. Raises BadInput naming what does not fit; nothing is written then."""
        if self._layout is None:
            raise BadInput("Tensors of no known family cannot be written into live modules.")
        shapes = {name: task.shape for name, task in plan.tasks.items()}
        found: dict[str, list[Live]] = {}
        complaints = []
        for part, module in modules.items():
            state: dict[str, Any] = module.state_dict(keep_vars=False)
            # The module's own names lead: transformers' versions disagree on a prefix of the text encoders' keys.
            plan_of = self._layout.family.into_module(part, state, shapes)
            mine = {name for name in shapes if self._layout.family.component_of(name) == part}
            used = {name for source in plan_of.values() for name in source.keys}
            complaints += [f"missing: {part}/{key}" for key in sorted(state.keys() - plan_of.keys())]
            complaints += [f"unexpected: {name}" for name in sorted(mine - used)]
            for key, source in plan_of.items():
                if key in state and source.shape(shapes) != tuple(state[key].shape):
                    complaints.append(f"shape: {part}/{key}")
                elif key in state:
                    found.setdefault(source.keys[0], []).append(Live(state[key], source))
        if complaints:
            raise BadInput("The live modules do not fit the merge:\n" + "\n".join(complaints[:6]))
        return found


def _atoms(mixture: Mixture) -> Iterator[Applied]:
    for atom, _ in mixture.terms:
        if isinstance(atom, Applied):
            yield atom
            for argument in atom.arguments:
                yield from _atoms(argument)


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _layout(shapes: Mapping[str, tuple[int, ...]]) -> Layout | None:
    try:
        return detect(shapes)
    except BadInput:
        return None
