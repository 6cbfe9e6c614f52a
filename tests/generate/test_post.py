"""The step after generation, with a narrow ESRGAN made by spandrel's own class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from spandrel.architectures import ESRGAN

from ambergrade.errors import BadInput
from ambergrade.generate.post import postprocessor
from ambergrade.nouns import Picture


def test_every_picture_goes_through_the_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = ESRGAN.ESRGAN(scale=2, num_filters=8, num_blocks=1)
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, tmp_path / "x2.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    found = next(postprocessor(tmp_path / "x2.safetensors")(iter([Picture("a", 5, pixels)])))
    with torch.inference_mode():
        expected = network.eval()(torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255)[0]
    assert (found.prompt_id, found.seed) == ("a", 5)
    assert found.pixels.shape == (32, 48, 3)
    np.testing.assert_array_equal(found.pixels, (expected.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def test_strange_weights_and_pickles_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(BadInput, match="does not know"):
        postprocessor(tmp_path / "a.safetensors")
    torch.save({}, tmp_path / "a.pth")
    with pytest.raises(BadInput, match="pickle"):
        postprocessor(tmp_path / "a.pth")
