"""LoRA (Hu et al. 2021) through the optional package peft: small adapters are trained, then merged into the weights."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ambergrade.errors import BadSetting
from ambergrade.family.files import write_tensors
from ambergrade.identity import random_seed

TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"],
    "te1": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
    "te2": ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
}
"""Linear layers of attention and feed-forward, by part."""
FILE = "lora.safetensors"


def inject(denoiser: nn.Module, lr: Mapping[str, float], seed: int, *, rank: int, alpha: float) -> list[str]:
    """Put adapters into the parts with a learning rate, freeze all else; returns those parts.

    An adapter adds alpha / rank · B A x, with B = 0 at first, so training begins at the base. Raises BadSetting where
    peft is not installed.
    """
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise BadSetting(f"lora needs the package peft, which is not installed ({error}).\npip install peft") from error
    denoiser.requires_grad_(False)
    parts = [part for part in lr if lr[part] > 0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed(seed, "lora"))
        for part in parts:
            config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS[part])
            peft.inject_adapter_in_model(config, getattr(denoiser, part))
    last = getattr(getattr(denoiser, "te1").encoder, "layers")[-1]  # noqa: B009
    last.requires_grad_(False)  # SDXL does not read it
    return parts


def merge(denoiser: nn.Module, parts: list[str], scratch: Path) -> None:
    """Write the adapters to `scratch`/lora.safetensors, add them to the weights, and take them out."""
    scratch.mkdir(parents=True, exist_ok=True)
    adapters = {name: value for name, value in denoiser.state_dict().items() if ".lora_" in name}
    write_tensors(scratch / FILE, adapters, {"format": "ambergrade lora"})
    layer_kind: Any = importlib.import_module("peft.tuners.lora").LoraLayer
    for part in parts:
        model = getattr(denoiser, part)
        for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, layer_kind)]:
            layer.merge()
            holder, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(holder), leaf, layer.get_base_layer())
