"""A step after generation: an upscaling or repairing network on each picture, by the optional spandrel library."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from ambergrade.errors import BadInput, BadSetting
from ambergrade.family.files import read_tensors
from ambergrade.nouns import Picture

Stream = Iterator[Picture]


def postprocessor(path: Path, *, device: str = "cpu") -> Callable[[Stream], Stream]:
    """A picture stream through the network of a .safetensors file (R-ESRGAN anime6b, SCUNet, …), one at a time.

    spandrel tells the architecture from the weights. Raises BadSetting where it is not installed, BadInput for a
    pickle, or for weights that it does not know or that are no picture-to-picture network.
    """
    try:
        from spandrel import (  # type: ignore[import-untyped,unused-ignore]
            ImageModelDescriptor,
            ModelLoader,
            UnsupportedModelError,
        )
    except ImportError as error:
        raise BadSetting("post=… needs spandrel: pip install 'ambergrade[post]'.\nOr leave post out.") from error
    weights = read_tensors(path)
    try:
        network = ModelLoader(device=device).load_from_state_dict(weights)
    except (UnsupportedModelError, RuntimeError, KeyError) as error:
        raise BadInput(f"spandrel does not know the network in {path}: {str(error)[:300]}") from error
    if not isinstance(network, ImageModelDescriptor) or (network.input_channels, network.output_channels) != (3, 3):
        raise BadInput(f"{path} ({network.architecture.name}) does not make one RGB picture of another.")
    network.eval()

    @torch.inference_mode()
    def processed(pictures: Stream) -> Stream:
        for picture in pictures:
            if picture.fault:
                yield picture
                continue
            x = torch.from_numpy(np.ascontiguousarray(picture.pixels)).permute(2, 0, 1)[None].float().to(device) / 255
            y = network(x)
            if not y.isfinite().all():
                raise BadInput(f"{path.name} gives NaN or infinity for prompt '{picture.prompt_id}'.")
            pixels = (y[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
            yield Picture(picture.prompt_id, picture.seed, pixels)

    return processed
