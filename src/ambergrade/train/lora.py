"""Trains adapters instead of weights: LoRA (Hu et al. 2021) by peft, LyCORIS' kinds by lycoris-lora.

They are trained, written as one file with kohya's key names, which A1111, ComfyUI and our own merges read, and then
merged into the weights.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ambergrade.errors import BadSetting
from ambergrade.family.files import write_tensors
from ambergrade.identity import random_seed
from ambergrade.train import lycoris
from ambergrade.train.denoiser import Denoiser
from ambergrade.train.settings import LoraSettings

OF_UNET = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
OF_TEXT = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
"""Linear layers of attention and feed-forward; LyCORIS' kinds go to all linear and convolution layers."""
FILE = "lora.safetensors"
"""In the scratch folder of a training."""


class Adapters:
    """Holds the adapters of a network while they are trained."""

    def __init__(self, denoiser: Denoiser, lr: Mapping[str, float], seed: int, settings: LoraSettings) -> None:
        """Put adapters into the parts with a learning rate, and freeze all else.

        An adapter adds alpha / rank times its product, which is 0 at first, so training begins at the base. Raises
        BadSetting where the library of that kind is not installed.
        """
        self.denoiser = denoiser
        self.settings = settings
        self.parts = [part for part in lr if lr[part] > 0]
        self.lycoris: dict[str, nn.Module] = {}
        if settings.kind != "lora":
            self.lycoris = lycoris.inject(denoiser, lr, seed, settings)
            return
        try:
            peft = importlib.import_module("peft")
        except ImportError as error:
            raise BadSetting(
                f"lora needs the package peft, which is not installed ({error}).\npip install 'ambergrade[lora]'"
            ) from error
        denoiser.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_seed(seed, "lora"))
            for part in self.parts:
                targets = OF_UNET if part == "unet" else OF_TEXT
                config = peft.LoraConfig(r=settings.rank, lora_alpha=settings.alpha, target_modules=targets)
                peft.inject_adapter_in_model(config, getattr(denoiser, part))
        for module in denoiser.networks.unread:
            module.requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """Collect the trained values under kohya's names (`lora_unet_down_blocks_….lora_up.weight`), with alphas."""
        found: dict[str, Tensor] = {}
        for name, values in (lycoris.entries(self.lycoris) if self.lycoris else self._peft()).items():
            found |= {f"{self._kohya(name)}.{leaf}": value.contiguous() for leaf, value in values.items()}
        return found

    def write(self, path: Path) -> None:
        """Write the adapters as one file whose header says, in kohya's words, what they are."""
        module = "networks.lora" if self.settings.kind == "lora" else "lycoris.kohya"
        about = {"ss_network_dim": str(self.settings.rank), "ss_network_alpha": f"{self.settings.alpha:g}"}
        write_tensors(path, self.tensors(), {"ss_network_module": module, **about})

    def merge(self) -> None:
        """Add the adapters to the weights, and take them out."""
        if self.lycoris:
            lycoris.merge(self.lycoris)
            return
        for name, layer in self._layers().items():
            layer.merge()
            holder, _, leaf = name.rpartition(".")
            setattr(self.denoiser.get_submodule(holder), leaf, layer.get_base_layer())

    def _layers(self) -> dict[str, Any]:
        kind: Any = importlib.import_module("peft.tuners.lora").LoraLayer
        return {name: layer for name, layer in self.denoiser.named_modules() if isinstance(layer, kind)}

    def _peft(self) -> dict[str, dict[str, Tensor]]:
        return {
            name: {
                "lora_down.weight": layer.lora_A["default"].weight.detach().clone(),
                "lora_up.weight": layer.lora_B["default"].weight.detach().clone(),
                "alpha": torch.tensor(float(self.settings.alpha)),
            }
            for name, layer in self._layers().items()
            if any(p.requires_grad for p in layer.parameters())
        }

    def _kohya(self, name: str) -> str:
        """Name a module as kohya: `te1.encoder.layers.0.mlp.fc1` is `lora_te1_text_model_encoder_layers_0_mlp_fc1`.

        The only text encoder of a family is `te`.
        """
        part, _, path = name.partition(".")
        if part != "unet" and not path.startswith(("text_model.", "text_projection")):
            path = f"text_model.{path}"
        if part != "unet" and len(self.denoiser.networks.encoders) == 1:
            part = "te"
        return f"lora_{part}_{path.replace('.', '_')}"
