"""Encodes captions of up to 225 tokens: windows of 75, each with its begin and end, side by side in the context.

One window is read exactly as the family's own pipeline reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ambergrade.family.networks import Networks

WINDOW = 75
"""Tokens of text between begin and end."""


def tokenize_captions(networks: Networks, captions: Sequence[Sequence[str]], tokens: int) -> tuple[Tensor, ...]:
    """Tokenize captions given as tags, for each encoder: (B, 77) int64 for 75 tokens, else (B, tokens / 75, 77).

    What does not fit is left out: with one window as the pipeline cuts it, with more whole tags at the end, so that
    no half tag is learned.
    """
    if tokens == WINDOW:
        return networks.tokenize([", ".join(tags) for tags in captions])
    return tuple(torch.stack([_windows(one, tags, tokens) for tags in captions]) for one in networks.tokenizers)


def encode(networks: Networks, ids: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Encode (B, 77) or (B, K, 77) ids of each encoder: (B, T, C) states and (B, P) pooled.

    With K windows T is 75 K + 2: the first window's begin, all windows' text, the last window's end. Pooled is the
    first window's. Each window is padded as its own tokenizer pads.
    """
    if ids[0].ndim == 2:
        return networks.encode(ids)
    batch, windows, _ = ids[0].shape
    states, pooled = networks.encode([one.flatten(0, 1) for one in ids])
    states = states.view(batch, windows, *states.shape[1:])
    text = states[:, :, 1:-1].flatten(1, 2)
    return torch.cat([states[:, 0, :1], text, states[:, -1, -1:]], dim=1), pooled.view(batch, windows, -1)[:, 0]


@contextmanager
def unread_layer_left_out(networks: Networks) -> Iterator[None]:
    """Leave out, while it lasts, a text encoder's last layer where nothing reads its states (SDXL's first encoder).

    Its own last state is then wrong; `encode` and the stock pipeline take the one before.
    """
    last: list[Any] = list(networks.unread[:1])
    for layer in last:
        layer.forward = lambda hidden_states, *_, **__: hidden_states
    try:
        yield
    finally:
        for layer in last:
            del layer.forward


def _windows(tokenizer: Any, tags: Sequence[str], tokens: int) -> Tensor:
    """Make (tokens / 75, 77) int64 of one caption."""
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    text = _fitting(tokenizer, list(tags), tokens)
    rows = []
    for start in range(0, tokens, WINDOW):
        row = [begin, *text[start : start + WINDOW], end]
        rows.append(row + [pad] * (WINDOW + 2 - len(row)))
    return torch.tensor(rows)


def _fitting(tokenizer: Any, tags: list[str], tokens: int) -> list[int]:
    """Return the ids of as many whole tags, from the first on, as fit."""
    while True:
        ids: list[int] = tokenizer(", ".join(tags), add_special_tokens=False, truncation=False).input_ids
        if len(ids) <= tokens or len(tags) <= 1:
            return ids[:tokens]
        # drop about as many tags as are too many, at least one
        tags = tags[: min(len(tags) - 1, max(1, len(tags) * tokens // len(ids) + 1))]
