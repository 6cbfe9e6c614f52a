"""Puts LyCORIS adapters (Yeh et al. 2023: LoCon, LoHa, LoKr) into networks, by the optional package lycoris-lora."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ambergrade.errors import BadSetting
from ambergrade.identity import random_seed
from ambergrade.train.denoiser import Denoiser
from ambergrade.train.settings import LoraSettings

LAYERS = (nn.Linear, nn.Conv2d)


def inject(denoiser: Denoiser, lr: Mapping[str, float], seed: int, settings: LoraSettings) -> dict[str, nn.Module]:
    """Put an adapter on every linear and convolution layer of the parts with a learning rate, and freeze all else.

    Returns name (`unet.down_blocks…`) to adapter; each begins at no change. Raises BadSetting where lycoris-lora is
    not installed.
    """
    try:
        modules: Any = importlib.import_module("lycoris.modules")
    except ImportError as error:
        raise BadSetting(
            f"lora.kind={settings.kind} needs the package lycoris-lora, which is not installed ({error}).\n"
            "Install it: pip install 'ambergrade[lora]'"
        ) from error
    kinds = {"locon": modules.LoConModule, "loha": modules.LohaModule, "lokr": modules.LokrModule}
    made, about = kinds[settings.kind], {"factor": settings.factor} if settings.kind == "lokr" else {}
    denoiser.requires_grad_(False)
    unread = {layer for module in denoiser.networks.unread for layer in module.modules()}
    adapters: dict[str, nn.Module] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random_seed(seed, "lycoris"))
        for part in [part for part in lr if lr[part] > 0]:
            model = getattr(denoiser, part)
            for name, layer in list(model.named_modules()):
                if isinstance(layer, LAYERS) and layer not in unread:
                    adapter = made(name.replace(".", "_"), layer, 1.0, settings.rank, settings.alpha, **about)
                    adapter.apply_to()
                    adapters[f"{part}.{name}"] = adapter
                    # a child of its layer, so that devices, precision and parameter names follow the model's
                    layer.add_module("lycoris", adapter)
    return adapters


def entries(adapters: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Map names to each adapter's tensors by their LyCORIS names, `alpha` included."""
    return {name: dict(_state(adapter)) for name, adapter in adapters.items()}


@torch.no_grad()
def merge(adapters: Mapping[str, nn.Module]) -> None:
    """Add the adapters to their layers' weights, and take them out."""
    for adapter in adapters.values():
        layer: Any = adapter.org_module[0]  # type: ignore[index]
        adapter.restore()  # type: ignore[operator]
        delta = _difference(adapter)
        layer.weight.add_(delta.reshape(layer.weight.shape).to(layer.weight))
        del layer.lycoris


def _difference(adapter: Any) -> Tensor:
    """Compute what the adapter's forward pass adds to the weight.

    Not its `get_diff_weight`, which in lycoris-lora 4.1 scales LoHa's and LoKr's product twice.
    """
    made: Tensor
    if hasattr(adapter, "make_weight"):
        made = adapter.make_weight() * adapter.scale
    else:
        made = adapter.get_weight(adapter.shape) * adapter.scalar
    return made


def _state(adapter: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.detach().clone()
        for name, value in adapter.custom_state_dict().items()  # type: ignore[operator]
        if value is not None
    }
