"""A narrow SDXL and eight pictures in two buckets, small enough to train on in a test."""

import json
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ambergrade.family import sdxl
from ambergrade.nouns import Caption, CaptionedPicture, CaptionSet
from ambergrade.train.latents import Latents
from ambergrade.train.run import LogRow

write_tiny_config = runpy.run_path(str(Path(__file__).parents[1] / "family" / "conftest.py"))["write_tiny_config"]
BUCKETS = [(64, 64)] * 6 + [(32, 96)] * 2


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family tests' config with a shallower UNet: training does not care for SDXL's depth."""
    folder = write_tiny_config(tmp_path_factory.mktemp("sdxl_shallow"))
    path = folder / "unet" / "config.json"
    shallow = {"transformer_layers_per_block": [1, 1, 1], "layers_per_block": 1}
    path.write_text(json.dumps({**json.loads(path.read_text()), **shallow}))
    return folder


@pytest.fixture(scope="session")
def captions() -> CaptionSet:
    return CaptionSet(
        tuple(
            CaptionedPicture(
                post_id=n,
                file_name=f"{n}.png",
                sha256=f"{n:064d}",
                caption=Caption(("1girl", f"girl {n}"), ("blue hair", "horns", "tail", "safe")[: 1 + n % 4]),
                original_size=(200 + n, 300),
                bucket=bucket,
                crop=(0, n),
            )
            for n, bucket in enumerate(BUCKETS)
        ),
        recipe="test",
    )


@pytest.fixture(scope="session")
def latents() -> Latents:
    draw = torch.Generator().manual_seed(5)
    return Latents(
        {
            (32, 96): torch.randn(2, 4, 12, 4, generator=draw),
            (64, 64): torch.randn(6, 4, 8, 8, generator=draw),
        },
        {(32, 96): torch.tensor([6, 7]), (64, 64): torch.tensor([0, 1, 2, 3, 4, 5])},
    )


@pytest.fixture(scope="session")
def beginning(tiny_config: Path) -> dict[str, torch.Tensor]:
    """Weights every test run begins with."""
    return {key: value.clone() for key, value in sdxl.from_config(tiny_config, seed=7).tensors().items()}


@pytest.fixture(scope="session")
def live_networks(tiny_config: Path) -> sdxl.Networks:
    return sdxl.from_config(tiny_config, seed=7)


@pytest.fixture
def networks(live_networks: sdxl.Networks, beginning: dict[str, torch.Tensor]) -> sdxl.Networks:
    """The same modules for all tests, at their beginning again."""
    live_networks.assign(beginning)
    for module in live_networks.modules().values():
        module.requires_grad_(True)
        module.zero_grad(set_to_none=True)
    return live_networks


class KilledError(Exception):
    """What a test's kill raises."""


@pytest.fixture
def killed() -> type[KilledError]:
    return KilledError


@pytest.fixture
def kill_at() -> Callable[[int], Callable[[LogRow], None]]:
    """`kill_at(8)`, given as `on_log`, raises `killed` at the row of 8 images."""

    def at(images: int) -> Callable[[LogRow], None]:
        def kill(row: LogRow) -> None:
            if row.seen == images:
                raise KilledError

        return kill

    return at
