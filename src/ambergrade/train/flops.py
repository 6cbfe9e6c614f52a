"""Counts the floating-point operations (FLOP) of a training step on the networks at hand, and knows GPUs' peaks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ambergrade.family.networks import Networks
from ambergrade.train.plan import DEVICES
from ambergrade.train.tokens import WINDOW, encode

LONG = 77
"""Ids of one window, begin and end included."""


class StepFlop:
    """Counts forward and backward of one image, by bucket; recomputation is left out, as MFU wants it."""

    def __init__(self, networks: Networks, lr: Mapping[str, float], tokens: int) -> None:
        """`lr` says which parts are trained: a frozen text encoder has no backward pass; backward is twice forward."""
        self._networks: Any = copy.copy(networks)
        for name, module in networks.modules().items():
            setattr(self._networks, name, _on_meta(module))
        self._tokens = tokens
        self._factors = {part: 3 if lr[part] else 1 for part in networks.encoders}
        self._shrink = 2 ** (len(networks.vae.config.block_out_channels) - 1)
        self._text: float | None = None
        self._found: dict[tuple[int, int], float] = {}

    def of_image(self, bucket: tuple[int, int]) -> float:
        """Count the FLOP (a multiply-add is two) of one image of a bucket (width, height in pixels)."""
        if bucket not in self._found:
            states, pooled = self._encoded()
            height, width = (side // self._shrink for side in bucket[::-1])
            unet = self._networks.unet
            noisy = torch.empty(1, unet.config.in_channels, height, width, device="meta", dtype=unet.dtype)
            added = self._networks.added(pooled, torch.empty(1, 6, device="meta"))
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                unet(noisy, torch.zeros(1, device="meta"), states, added_cond_kwargs=added, return_dict=False)
            self._found[bucket] = 3.0 * counter.get_total_flops() + (self._text or 0.0)
        return self._found[bucket]

    def _encoded(self) -> tuple[Tensor, Tensor]:
        """Return the shapes of what the UNet reads, and count the encoders on the way."""
        windows = self._tokens // WINDOW
        ids = torch.zeros((1, LONG) if windows == 1 else (1, windows, LONG), dtype=torch.int64, device="meta")
        flat = ids.reshape(-1, LONG)
        if self._text is None:
            self._text = 0.0
            for part, encoder in self._networks.encoders.items():
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    encoder(flat, output_hidden_states=True)
                self._text += self._factors[part] * counter.get_total_flops()
        with torch.no_grad():
            return encode(self._networks, [ids] * len(self._factors))


def peak_flops(device: torch.device) -> float | None:
    """Look up a GPU's dense bf16 FLOP/s, its datasheet's, by its name; None where the table lacks it and for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((kind.peak_tflops * 1e12 for key, kind in DEVICES.items() if key in name), None)


def _on_meta(module: Any) -> Any:
    """Copy a module's shapes without its values: a deep copy would hold a second set of weights for a moment."""
    memo: dict[int, object] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        meta = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta
    return copy.deepcopy(module, memo).eval()
