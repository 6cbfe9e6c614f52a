"""For a GPU: networks in bf16 and channels-last with compiled blocks, and drawing ahead of what reads the pictures."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from ambergrade.family.networks import Networks
from ambergrade.generate.texts import MOST_WINDOWS
from ambergrade.nouns import Picture

KINDS_OF_BLOCK = 8
"""Differently wide blocks that share their code in a UNet of SD's kind, at most."""


def accelerate(
    networks: Networks, *, dtype: torch.dtype = torch.bfloat16, compiled: bool = True, backend: str = "inductor"
) -> Networks:
    """Change the networks in place for speed; pictures move by what `dtype` rounds.

    The UNet's repeated blocks are compiled one for all with fixed shapes, so `sdxl.assign` (which copies into the same
    tensors) needs no new compilation; `stream.pictures` fills a smaller last batch up. Texts of another number of
    windows are compiled anew (`room_to_compile`). The VAE is in bf16, whose range fp16 lacks.
    """
    for module in networks.modules().values():
        module.to(dtype=dtype)
    for module in (networks.unet, networks.vae):
        module.to(memory_format=torch.channels_last)
    unet: Any = networks.unet
    if compiled:
        unet.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
    return networks


def room_to_compile() -> Any:
    """A context for drawing in which PyTorch compiles as many shapes as prompts have lengths; its own limit is 8."""
    config: Any = torch.compiler.config
    return config.patch(recompile_limit=max(config.recompile_limit, MOST_WINDOWS * KINDS_OF_BLOCK))


def is_compiled(networks: Networks) -> bool:
    """Whether a block is compiled; what patches its modules' `forward` would then compile it anew."""
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in networks.unet.modules())


def drawn_ahead(pictures: Iterator[Picture], ahead: int = 16) -> Iterator[Picture]:
    """The same pictures, drawn by a thread that runs up to `ahead` of the reader: scoring and drawing overlap.

    On a GPU the thread draws on a CUDA stream of its own, the same one each time, after what the caller's stream has
    queued (a merge into the networks, say). TF32 is off for both until the last picture: the switch is the whole
    process's, and scoring needs it off. An error is raised where its picture would have come; a reader that stops
    early stops the thread.
    """
    callers = torch.cuda.current_stream() if torch.cuda.is_available() else None
    waiting: queue.Queue[Picture | BaseException | None] = queue.Queue(ahead)
    stopped = threading.Event()

    def put(item: Picture | BaseException | None) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def draw() -> None:
        stream = None if callers is None else _side_stream()
        try:
            if stream is not None:
                stream.wait_stream(callers)
            with torch.cuda.stream(stream):
                for picture in pictures:
                    if not put(picture):
                        return
            put(None)
        except BaseException as error:  # it belongs to the reader
            put(error)

    worker = threading.Thread(target=draw, daemon=True)
    with full_precision():
        worker.start()
        try:
            while (item := waiting.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            worker.join()


@contextmanager
def full_precision() -> Iterator[None]:
    """Without TF32 in fp32 sums, in the whole process."""
    before, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = tf32


@cache
def _side_stream() -> Any:
    """One stream for all drawing: each has memory of its own that no other can use."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]
