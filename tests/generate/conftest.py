"""Random networks of SDXL's structure, narrow enough to draw in a test."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from ambergrade.family import sdxl

_FAMILY = runpy.run_path(str(Path(__file__).parents[1] / "family" / "conftest.py"))


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> sdxl.Networks:
    made = sdxl.from_config(_FAMILY["write_tiny_config"](tmp_path_factory.mktemp("narrow")), seed=1)
    with torch.no_grad():
        # Random networks hardly hear the text; louder, so that a wrong prompt shows in the pixels.
        for name, parameter in made.unet.named_parameters():
            if "attn2.to_v" in name or "add_embedding" in name or "conv_out" in name:
                parameter.mul_(6)
        made.vae.decoder.conv_out.weight.mul_(3)
    return made
