"""The Inception v3 that published FIDs are measured with: TensorFlow's 2015 graph, as pytorch-fid spells it.

It is torchvision's network with 1008 classes, without the auxiliary head, and with the graph's two quirks: average
pools that do not count their padding, and a maximum instead of an average pool in the last block (pytorch-fid's
`inception.py`). Its state dict has torchvision's key names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models import inception as stock

from ambergrade.errors import BadInput
from ambergrade.family.files import read_tensors


class _A(stock.InceptionA):  # type: ignore[misc]
    def _forward(self, x: Tensor) -> list[Tensor]:
        return [
            self.branch1x1(x),
            self.branch5x5_2(self.branch5x5_1(x)),
            self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x))),
            self.branch_pool(_average(x)),
        ]


class _C(stock.InceptionC):  # type: ignore[misc]
    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        return [
            self.branch1x1(x),
            self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x))),
            self.branch7x7dbl_5(self.branch7x7dbl_4(double)),
            self.branch_pool(_average(x)),
        ]


class _E(stock.InceptionE):  # type: ignore[misc]
    largest = False

    def _forward(self, x: Tensor) -> list[Tensor]:
        wide = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        pooled = functional.max_pool2d(x, 3, stride=1, padding=1) if self.largest else _average(x)
        return [
            self.branch1x1(x),
            torch.cat([self.branch3x3_2a(wide), self.branch3x3_2b(wide)], 1),
            torch.cat([self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)], 1),
            self.branch_pool(pooled),
        ]


class _LargestE(_E):
    largest = True


class FidInception(nn.Module):
    """uint8 RGB pictures (n, 3, height, width) to the 2048 features of the last pool."""

    def __init__(self) -> None:
        super().__init__()
        self.network: Any = stock.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
        blocks = {"Mixed_5b": _A(192, 32), "Mixed_5c": _A(256, 64), "Mixed_5d": _A(288, 64)}
        widths = {"Mixed_6b": 128, "Mixed_6c": 160, "Mixed_6d": 160, "Mixed_6e": 192}
        blocks |= {name: _C(768, channels_7x7=width) for name, width in widths.items()}
        blocks |= {"Mixed_7b": _E(1280), "Mixed_7c": _LargestE(2048)}
        for name, block in blocks.items():
            setattr(self.network, name, block)
        self.network.fc = nn.Identity()

    def forward(self, pixels: Tensor) -> Tensor:
        x = functional.interpolate(pixels.float() / 255, (299, 299), mode="bilinear", align_corners=False)
        found: Tensor = self.network(2 * x - 1)
        return found


def fid_inception(path: Path) -> FidInception:
    """The network with a file's weights, in eval mode. Raises BadInput for weights of another network."""
    state = read_tensors(path)
    made = FidInception()
    state = {key: value.float() for key, value in state.items() if not key.startswith(("fc.", "AuxLogits."))}
    wanted = made.network.state_dict()
    missing = sorted(key for key in wanted.keys() - state.keys() if not key.endswith("num_batches_tracked"))
    strange = sorted(state.keys() - wanted.keys())
    odd = sorted(key for key in wanted.keys() & state.keys() if wanted[key].shape != state[key].shape)
    if missing or strange or odd:
        raise BadInput(
            f"{path} is not pytorch-fid's Inception: {len(missing)} tensors missing {missing[:2]}, {len(strange)} "
            f"unknown {strange[:2]}, {len(odd)} of other shapes {odd[:2]}."
        )
    made.network.load_state_dict(state, strict=False)
    return made.eval().requires_grad_(False)


def _average(x: Tensor) -> Tensor:
    return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
