"""What a formula may call beyond arithmetic: read from conf/method, found in `merge/methods` by its name."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from ambergrade.errors import BadSetting, UnknownName
from ambergrade.identity import random_seed
from ambergrade.places import CONF

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FOLDER = CONF / "method"
KINDS = ("model", "difference")


@dataclass(frozen=True)
class Context:
    """What a method may know besides its tensors."""

    name: str
    """Canonical name of the tensor: the single file's, with `.q`, `.k` or `.v` for a part of a stacked one."""

    def uniform(self, shape: Sequence[int], seed: int, *item: Any, device: torch.device | str = "cpu") -> Tensor:
        """Random numbers in [0, 1), fp32, keyed by (seed, tensor name, item) and by nothing else.

        Counter-based (Philox 4x64) and made on the CPU, so every device and thread count gets the same.
        """
        import numpy as np
        import torch

        key = random_seed(int(seed), "merge", self.name, *item)
        drawn = np.random.Generator(np.random.Philox(key=key)).random(tuple(shape), dtype=np.float32)
        return torch.from_numpy(drawn).to(device)


@dataclass(frozen=True)
class Method:
    """One yaml of conf/method."""

    name: str
    source: str
    arguments: tuple[str, ...]
    """`model` or `difference`, one for each tensor; the last may end in `...`."""
    gives: str
    """`model` or `difference`."""
    parameters: Mapping[str, Any]
    """Names and defaults."""

    @classmethod
    def read(cls, name: str) -> Method:
        """Raises UnknownName where conf/method has no such yaml."""
        if name not in names():
            raise UnknownName("Method", name, names())
        values = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
        assert values.keys() == {"source", "arguments", "gives", "parameters"}, (name, sorted(values))
        arguments = tuple(values["arguments"])
        words = {word.removesuffix("...") for word in arguments} | {values["gives"]}
        assert words <= {*KINDS}, (name, words)
        return cls(name, values["source"], arguments, values["gives"], values["parameters"] or {})

    def kinds(self, count: int) -> list[str]:
        """`model` or `difference` for each of `count` arguments. Raises BadSetting for a count it does not take."""
        *fixed, last = self.arguments
        repeated = last.endswith("...")
        if count < len(self.arguments) or (count > len(self.arguments) and not repeated):
            raise BadSetting(f"{self.name}() takes {', '.join(self.arguments)}; {count} given.")
        return [*fixed, *[last.removesuffix("...")] * (count - len(fixed))]

    @functools.cached_property
    def function(self) -> Callable[..., Tensor]:
        """The function of whole tensors; imports torch."""
        module = importlib.import_module(f"ambergrade.merge.methods.{self.name}")
        return getattr(module, self.name)  # type: ignore[no-any-return]


@functools.cache
def names() -> tuple[str, ...]:
    """All methods, by name."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
