"""The live networks of a model, of any family: loaded from a file, kept, trained and drawn with, and written back.

A family's module derives `Networks` (see sdxl.py). torch is imported where networks are made, so that reading headers
costs little.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ambergrade.errors import BadInput
from ambergrade.family.prediction import from_noise, scheduler_settings
from ambergrade.identity import random_seed

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch import Tensor, nn

    from ambergrade.family.load import Family


class Networks(ABC):
    """The live modules of one model."""

    family: ClassVar[Family]
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler_config: dict[str, Any]
    passive: dict[str, Tensor]
    """Tensors of the file that no network holds (`logit_scale`, `position_ids`, …), written back as they were."""

    # --- what each family says for itself

    @classmethod
    @abstractmethod
    def build(cls, config: Path, before: Callable[[str], object] = lambda name: None) -> Self:
        """Modules of a config folder as their constructors make them; `before(component)` is called first."""

    @property
    @abstractmethod
    def tokenizers(self) -> tuple[Any, ...]:
        """One for each text encoder."""

    @property
    @abstractmethod
    def unread(self) -> tuple[nn.Module, ...]:
        """Layers of text encoders whose output nothing reads, so that no loss reaches them; the last one first."""

    @abstractmethod
    def encode(self, ids: Sequence[Tensor], layer: int = -2) -> tuple[Tensor, Tensor]:
        """(B, T, C) states of the encoders' layer `layer`, without final norm, and (B, P) pooled.

        `ids`: (B, T) int64 for each text encoder. `layer` counts from the end.
        """

    @abstractmethod
    def added(self, pooled: Tensor, time_ids: Tensor) -> dict[str, Tensor]:
        """What the UNet is given beside the states: of the pooled text (B, P), and of the sizes and crops (B, 6)."""

    @abstractmethod
    def pipeline(self, scheduler: Any) -> Any:
        """The stock pipeline around the live modules."""

    @abstractmethod
    def embeds(self, conditions: tuple[Tensor, Tensor], negatives: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The arguments by which the pipeline takes (states, pooled) of prompts and of negative prompts."""

    # --- what holds for all of them

    @classmethod
    def load(
        cls,
        checkpoint: Path,
        config: Path,
        *,
        dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
        device: str | torch.device = "cpu",
        only: Collection[str] = (),
    ) -> Self:
        """Networks of a single file or a diffusers folder, fp32 unless `dtype` says otherwise, perhaps by component.

        `config` is the family's diffusers-layout folder. Where `only` names components, the others stay without values.
        Raises BadInput for a pickle, a damaged file, or weights that do not fit the config.
        """
        import torch
        from accelerate import init_empty_weights

        weights = cls.family.read_checkpoint(checkpoint)
        predicts = cls.family.prediction_type(checkpoint)
        if predicts not in (None, "epsilon", "v"):
            raise BadInput(
                f"{checkpoint.name} predicts '{predicts}'; training and drawing know epsilon and v.\n"
                "Choose another checkpoint."
            )
        with init_empty_weights():
            networks = cls.build(config)
        for name, module in networks.modules().items():
            if only and name not in only:
                continue
            chosen = (dtype.get(name) if isinstance(dtype, Mapping) else dtype) or torch.float32
            state = cls.family.module_tensors(name, weights, _shapes(module))
            # A copy even where dtype and device agree: what is read may be mapped from the file.
            state = {key: value.to(device, chosen, copy=True).contiguous() for key, value in state.items()}
            module.load_state_dict(state, assign=True)
            module.to(device).eval()
        networks._take_passive(weights)
        return networks

    @classmethod
    def from_config(cls, config: Path, seed: int) -> Self:
        """Networks of a config folder with random fp32 weights, each component keyed by (seed, its name)."""
        import torch

        return cls.build(config, lambda name: torch.manual_seed(random_seed(seed, "init", name)))

    def modules(self) -> dict[str, nn.Module]:
        """Component name (as in `Family.components`) to module."""
        return {name: getattr(self, name) for name in self.family.components}

    @property
    def trained(self) -> dict[str, nn.Module]:
        """The modules that may be trained, by the short names that learning rates have: `unet`, `te1`, …"""
        modules = self.modules()
        return {self.family.components[name].short: modules[name] for name in self.family.trained}

    @property
    def encoders(self) -> dict[str, Any]:
        """The text encoders, by their short names."""
        return {name: module for name, module in self.trained.items() if name != "unet"}

    def tensors(self) -> dict[str, Tensor]:
        """All weights under single-file keys. Most share memory with the modules: clone what must not change."""
        found = dict(self.passive)
        for name, module in self.modules().items():
            state = {key: value.detach() for key, value in module.state_dict().items()}
            found |= self.family.single_tensors(name, state)
        return found

    def assign(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values, given under single-file keys, into the modules in place.

        Raises BadInput naming keys that are missing or unexpected and shapes that differ; nothing is copied then.
        """
        import torch

        modules = self.modules()
        states = {name: self.family.module_tensors(name, tensors, _shapes(one)) for name, one in modules.items()}
        with torch.no_grad():
            for name, module in modules.items():
                live = module.state_dict()
                for key, value in states[name].items():
                    live[key].copy_(value)
        self._take_passive(tensors)

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Token ids of each tokenizer, (B, 77) int64, cut and padded as the pipeline does."""
        return tuple(
            tokenizer(
                list(texts),
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self.tokenizers
        )

    def encode_text(self, texts: Sequence[str], layer: int = -2) -> tuple[Tensor, Tensor]:
        """`encode` of texts, equal to the stock pipeline's `encode_prompt`; gradients as the caller has them."""
        device = next(iter(self.encoders.values())).device
        return self.encode([ids.to(device) for ids in self.tokenize(texts)], layer)

    def _take_passive(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep what no network holds, and let a file's marks decide what its weights predict."""
        self.passive = {key: value for key, value in tensors.items() if self.family.component_of(key) is None}
        self.scheduler_config = from_noise({**self.scheduler_config, **scheduler_settings(self.passive.keys())})


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}
