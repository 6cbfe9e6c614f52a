"""What a GPU needs, as far as a CPU can tell: compiled blocks survive a swap, drawing ahead changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from ambergrade.errors import BadInput
from ambergrade.family import sdxl
from ambergrade.family.sdxl import Networks
from ambergrade.generate.fast import accelerate, drawn_ahead, is_compiled
from ambergrade.generate.stream import pictures
from ambergrade.nouns import Picture, Prompt, PromptSet, SamplerSettings
from ambergrade.store import find_file

SETTINGS = SamplerSettings("euler", 2, 3.0, 64, 64, batch=2)
PROMPTS = PromptSet("t", tuple(Prompt(str(k), "1girl", k) for k in range(2)))


def drawn(networks: Networks) -> np.ndarray:
    return np.stack([picture.pixels for picture in pictures(networks, PROMPTS, SETTINGS, progress=None)]).astype(int)


def test_compiled_blocks_draw_the_same_and_survive_a_swap_without_compiling_again() -> None:
    from torch._dynamo.utils import counters

    source, config = find_file("builtin://beta7.safetensors"), find_file("builtin://sdxl_tiny")
    networks = sdxl.load(source, config)
    plain = drawn(networks)
    assert not is_compiled(networks)
    accelerate(networks, dtype=torch.float32, backend="eager")
    assert is_compiled(networks)
    assert abs(drawn(networks) - plain).max() <= 1
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    sdxl.assign(networks, sdxl.read_checkpoint(find_file("builtin://anxl2.safetensors")))
    swapped = drawn(networks)
    few = PromptSet("t", PROMPTS.prompts[:1])  # a last batch of one is filled up, not compiled anew
    alone = next(pictures(networks, few, SETTINGS, progress=None)).pixels.astype(int)
    assert abs(alone - swapped[0]).max() <= 1
    assert counters["stats"]["unique_graphs"] == before
    assert abs(swapped - plain).mean() > 1
    torch._dynamo.reset()


def test_bf16_networks_draw_nearly_the_same_pictures() -> None:
    """The autoencoder in bf16 as well: no NaN, and a rounding of 2^-8 that hardly shows."""
    networks = sdxl.load(find_file("builtin://beta7.safetensors"), find_file("builtin://sdxl_tiny"))
    plain = drawn(networks)
    accelerate(networks, compiled=False)
    assert not is_compiled(networks)
    assert {p.dtype for p in networks.vae.parameters()} == {torch.bfloat16}
    assert abs(drawn(networks) - plain).mean() < 3


def test_drawing_ahead_keeps_order_raises_in_place_and_stops_with_its_reader() -> None:
    def stream(fail_at: int = -1) -> Iterator[Picture]:
        for k in range(40):
            if k == fail_at:
                raise BadInput("picture 3 is broken")
            yield Picture(str(k), k, np.zeros((1, 1, 3), np.uint8))

    assert [p.prompt_id for p in drawn_ahead(stream(), ahead=3)] == [str(k) for k in range(40)]
    reader = drawn_ahead(stream(3))
    assert [next(reader).prompt_id for _ in range(3)] == ["0", "1", "2"]
    with pytest.raises(BadInput, match="picture 3"):
        next(reader)
    threads = threading.active_count()
    reader = drawn_ahead(stream(), ahead=2)
    next(reader)
    reader.close()
    assert threading.active_count() == threads
