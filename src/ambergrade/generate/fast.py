"""For a GPU: networks in bf16 and channels-last with compiled blocks, and drawing ahead of what reads the pictures."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch

from ambergrade.family.sdxl import Networks
from ambergrade.nouns import Picture


def accelerate(
    networks: Networks, *, dtype: torch.dtype = torch.bfloat16, compiled: bool = True, backend: str = "inductor"
) -> Networks:
    """Change the networks in place for speed; pictures move by what `dtype` rounds.

    The UNet's repeated blocks are compiled one for all with fixed shapes, so `sdxl.assign` (which copies into the same
    tensors) needs no new compilation; `stream.pictures` fills a smaller last batch up. The VAE is in bf16,
    whose range fp16 lacks.
    """
    for module in networks.modules().values():
        module.to(dtype=dtype)
    for module in (networks.unet, networks.vae):
        module.to(memory_format=torch.channels_last)
    unet: Any = networks.unet
    if compiled:
        unet.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
    return networks


def is_compiled(networks: Networks) -> bool:
    """Whether a block is compiled; what patches its modules' `forward` would then compile it anew."""
    return any(getattr(module, "_compiled_call_impl", None) is not None for module in networks.unet.modules())


def drawn_ahead(pictures: Iterator[Picture], ahead: int = 16) -> Iterator[Picture]:
    """The same pictures, drawn by a thread that runs up to `ahead` of the reader: scoring and drawing overlap.

    On a GPU the thread has a CUDA stream of its own. An error is raised where its picture would have come; a reader
    that stops early stops the thread.
    """
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
        stream = torch.cuda.Stream() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
        try:
            with torch.cuda.stream(stream):
                for picture in pictures:
                    if not put(picture):
                        return
            put(None)
        except BaseException as error:  # it belongs to the reader
            put(error)

    worker = threading.Thread(target=draw, daemon=True)
    worker.start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        worker.join()
