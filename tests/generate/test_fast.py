"""What a GPU needs, as far as a CPU can tell: compiled blocks survive a swap, drawing ahead changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from ambergrade.errors import BadInput
from ambergrade.family import sdxl
from ambergrade.family.sdxl import Networks
from ambergrade.generate import fast
from ambergrade.generate.fast import accelerate, drawn_ahead, is_compiled
from ambergrade.generate.stream import pictures
from ambergrade.nouns import Picture, Prompt, PromptSet, SamplerSettings
from ambergrade.score.folders import scoring_mode
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
    networks.assign(sdxl.read_checkpoint(find_file("builtin://anxl2.safetensors")))
    swapped = drawn(networks)
    few = PromptSet("t", PROMPTS.prompts[:1])  # a last batch of one is filled up, not compiled anew
    alone = next(pictures(networks, few, SETTINGS, progress=None)).pixels.astype(int)
    assert abs(alone - swapped[0]).max() <= 1
    assert counters["stats"]["unique_graphs"] == before
    assert abs(swapped - plain).mean() > 1
    torch._dynamo.reset()


def test_prompts_of_every_length_are_drawn_by_compiled_blocks_also_ahead() -> None:
    """Two widths of blocks in five lengths are more than PyTorch compiles by itself: the fifth length crashed."""
    networks = sdxl.load(find_file("builtin://beta7.safetensors"), find_file("builtin://sdxl_tiny"))
    texts = [" BREAK ".join(["1girl"] * count) for count in range(1, 9)]
    prompts = PromptSet("t", tuple(Prompt(str(k), text, k) for k, text in enumerate(texts)))
    once = SamplerSettings("euler", 1, 3.0, 32, 32, batch=1)
    plain = [picture.pixels.astype(int) for picture in pictures(networks, prompts, once, progress=None)]
    accelerate(networks, dtype=torch.float32, backend="eager")
    found = [picture.pixels.astype(int) for picture in drawn_ahead(pictures(networks, prompts, once, progress=None))]
    assert max(abs(one - other).max() for one, other in zip(plain, found, strict=True)) <= 1
    torch._dynamo.reset()


def test_bf16_networks_draw_nearly_the_same_pictures() -> None:
    """The autoencoder in bf16 as well: no NaN, and a rounding of 2^-8 that hardly shows."""
    networks = sdxl.load(find_file("builtin://beta7.safetensors"), find_file("builtin://sdxl_tiny"))
    plain = drawn(networks)
    accelerate(networks, compiled=False)
    assert not is_compiled(networks)
    assert {p.dtype for p in networks.vae.parameters()} == {torch.bfloat16}
    assert abs(drawn(networks) - plain).mean() < 3


def test_drawing_ahead_waits_for_the_caller_on_one_stream_and_switches_tf32_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stand-in for CUDA: what is called, in its order."""
    calls: list[str] = []

    class Stream:
        def __init__(self) -> None:
            calls.append("new")

        def wait_stream(self, other: object) -> None:
            calls.append(f"wait for {other}")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the caller's")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext(calls.append("draw")))
    fast._side_stream.cache_clear()

    def stream() -> Iterator[Picture]:
        for k in range(3):
            assert not torch.backends.cudnn.allow_tf32
            assert torch.get_float32_matmul_precision() == "highest"
            yield Picture(str(k), k, np.zeros((1, 1, 3), np.uint8))

    before, enabled = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled
    torch.set_float32_matmul_precision("high")
    try:
        for _ in range(2):
            for _picture in drawn_ahead(stream(), ahead=1):
                with scoring_mode():
                    assert torch.backends.cudnn.enabled == enabled
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32 == before
        with scoring_mode():
            assert (torch.backends.cudnn.enabled, torch.backends.cudnn.allow_tf32) == (enabled, False)
    finally:
        torch.set_float32_matmul_precision("highest")
        fast._side_stream.cache_clear()
    assert calls == ["new", *["wait for the caller's", "draw"] * 2]


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
