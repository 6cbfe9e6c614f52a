"""Points on a GPU: the live parameters that one fused pass makes, from inputs on the GPU or streamed from the host."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ambergrade.family.dtypes import torch_dtypes
from ambergrade.family.layouts import Source
from ambergrade.merge.plan import Plan, Task

if TYPE_CHECKING:
    from ambergrade.merge.fused import Part


@dataclass(frozen=True)
class Live:
    """One parameter of a live module and the part of a merged tensor that it holds."""

    target: Tensor
    source: Source

    def holds(self, task: Task) -> bool:
        """Whether it is the merged tensor, as it lies in memory."""
        same = self.source.form == "as is" and self.target.dtype == torch_dtypes()[task.dtype]
        return same and self.target.is_contiguous()


def by_kernel(device: torch.device) -> bool:
    """Whether fused passes run there: they need Triton, which comes with torch for NVIDIA's and AMD's GPUs."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def placed(inputs: Mapping[str, Mapping[str, Tensor]], device: torch.device | str) -> dict[str, dict[str, Tensor]]:
    """A merge's inputs where points on `device` are made fastest: on a GPU with room, else pinned in the host's memory.

    They stay where they are for the CPU. A GPU has room where they fill at most half of what is free.
    """
    target = torch.device(device)
    if target.type != "cuda":
        return {alias: dict(tensors) for alias, tensors in inputs.items()}
    size = sum(tensor.nbytes for tensors in inputs.values() for tensor in tensors.values())
    room = torch.cuda.mem_get_info(target)[0] // 2
    return {
        alias: {name: tensor.to(target) if size <= room else tensor.pin_memory() for name, tensor in tensors.items()}
        for alias, tensors in inputs.items()
    }


def fused_point(
    plan: Plan, live: Mapping[str, Sequence[Live]], inputs: Mapping[str, Mapping[str, Tensor]]
) -> tuple[set[str], set[str]]:
    """Write what fused passes can make of a point.

    Returns the names that are made, and those of which the result is not finite. What is in neither set is left to the
    general way: methods, other dtypes, weights of many digits, transposed matrices, numbers beyond hundreds.
    """
    found: dict[torch.device, list[tuple[str, Part]]] = {}
    for name, pieces in live.items():
        task = plan.tasks[name]
        halves = task.kind == "merge" and task.dtype == "F16" and task.mixture.linear
        if not (halves and by_kernel(pieces[0].target.device)):
            continue
        parts = [_part(piece, task, plan.base, inputs) for piece in pieces]
        there = {piece.target.device for piece in pieces}
        if len(there) == 1 and None not in parts:
            found.setdefault(there.pop(), []).extend((name, part) for part in parts if part)
    made: set[str] = set()
    wrong: set[str] = set()
    far: set[str] = set()
    for device, named in found.items():
        from ambergrade.merge.fused import FAR, one_pass, streamed

        parts_here = [part for _, part in named]
        resident = all(x.device == device for part in parts_here for x in part.inputs)
        said = (one_pass(parts_here) if resident else streamed(parts_here, device)).tolist()
        made |= {name for name, _ in named}
        far |= {name for (name, _), fault in zip(named, said, strict=True) if fault == FAR}
        wrong |= {name for (name, _), fault in zip(named, said, strict=True) if fault not in (0, FAR)}
    return made - far, wrong - far


def _part(piece: Live, task: Task, base: str, inputs: Mapping[str, Mapping[str, Tensor]]) -> Part | None:
    from ambergrade.merge.fused import fits, part

    models, weights = task.mixture.models, task.mixture.weights
    tensors = [piece.source.take({task.name: inputs[alias][task.name]}) for alias in models]
    if not fits(weights, tensors, piece.target):
        return None
    return part(weights, tensors, piece.target, models.index(base) if base in models else None)
