"""A booru prompt as the plain text that training captions are made of, and as what the UNet attends to.

Underscores, escaped parentheses and weights `(tag:1.2)` are read. Plain parentheses stay: they belong to names, as in
`kohaku (world)`, and captions are full of them. Longer prompts are cut into windows of 75 tokens as SDXL trainers do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ambergrade.errors import BadInput
from ambergrade.family import sdxl
from ambergrade.family.sdxl import Networks

WINDOW = 75
"""Tokens of text between begin and end."""
MOST_WINDOWS = 8
"""600 tokens; beyond, cross-attention costs more than the rest of the UNet."""
Weighted = tuple[tuple[str, float], ...]

_WEIGHTED = re.compile(r"(?<!\\)\(((?:[^()\\]|\\.|\([^()]*\))*?)\s*:\s*(\d+(?:\.\d+)?|\.\d+)\s*\)")
_OPEN, _CLOSE = "\ue000", "\ue001"


def plain_text(prompt: str) -> str:
    r"""`prompt` with booru spelling taken out: underscores to spaces, `\(` to `(`, one comma and space between tags.

    Names of three characters or fewer keep their underscores, as in the captions (HakuBooru's rule): they are faces.

    >>> plain_text(r"1girl, long_hair,kohaku_\(world\), (red_eyes:1.2), ^_^, ")
    '1girl, long hair, kohaku (world), red eyes, ^_^'
    """
    return "".join(text for text, _ in weighted_text(prompt))


def weighted_text(prompt: str) -> Weighted:
    r"""The plain text in pieces with their weights.

    >>> weighted_text("1girl, (long_hair, smile:1.3), hat")
    (('1girl, ', 1.0), ('long hair, smile', 1.3), (', hat', 1.0))
    """
    weights = [float(weight) for _, weight in _WEIGHTED.findall(prompt)]
    marked = _WEIGHTED.sub(_OPEN + r"\1" + _CLOSE, prompt)
    tags = [tag.strip().replace(r"\(", "(").replace(r"\)", ")") for tag in marked.split(",")]
    spelled = ", ".join(_spelled(tag) for tag in tags if tag.strip(_OPEN + _CLOSE))
    pieces, found = re.split(f"[{_OPEN}{_CLOSE}]", spelled), []
    for number, piece in enumerate(pieces):  # every second piece stood between the marks
        if piece:
            found.append((piece, weights[number // 2] if number % 2 else 1.0))
    return tuple(found)


def _spelled(tag: str) -> str:
    return tag.replace("_", " ") if len(tag.strip(_OPEN + _CLOSE)) > 3 else tag


class TextEncoder:
    """Prompts to conditions, each text encoded once. It is good for as long as the text encoders' weights stay."""

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def __call__(self, prompts: Sequence[str], names: Sequence[str] | None = None) -> list[tuple[Tensor, Tensor]]:
        """For each prompt (75 K + 2, C) states and (P,) pooled; `names` are told where a prompt is too long."""
        new = list(dict.fromkeys(prompt for prompt in prompts if prompt not in self._known))
        plain = [text for text in new if self._is_plain(text)]
        if plain:
            states, pooled = sdxl.encode_text(self._networks, [plain_text(text) for text in plain])
            self._known |= {text: (states[k], pooled[k]) for k, text in enumerate(plain)}
        for text in new:
            if text not in self._known:
                name = dict(zip(prompts, names or prompts, strict=True))[text]
                self._known[text] = self._windowed(weighted_text(text), name)
        return [self._known[prompt] for prompt in prompts]

    def windows(self, condition: tuple[Tensor, Tensor]) -> int:
        return (len(condition[0]) - 2) // WINDOW

    def padded(self, condition: tuple[Tensor, Tensor], windows: int) -> tuple[Tensor, Tensor]:
        """The condition with empty windows behind it, so that prompt and negative prompt are equally long."""
        states, pooled = condition
        missing = windows - self.windows(condition)
        if missing == 0:
            return condition
        empty = self([""])[0][0][1:-1]
        return torch.cat([states[:-1], *[empty] * missing, states[-1:]]), pooled

    def _is_plain(self, prompt: str) -> bool:
        pieces = weighted_text(prompt)
        fits = all(len(_ids(tokenizer, plain_text(prompt))) <= WINDOW for tokenizer in self._tokenizers)
        return fits and all(weight == 1 for _, weight in pieces)

    def _windowed(self, pieces: Weighted, name: str) -> tuple[Tensor, Tensor]:
        """States of all windows, weighted: z + (w - 1)·(z - z₀) with z₀ the empty text's state at the same place.

        (ComfyUI's reading of a weight; multiplying states and restoring their mean, as in A1111, divides by a mean
        that may be near zero.) Begin of the first, text of all, end of the last; pooled of the first.
        """
        networks = self._networks
        rows = [_rows(tokenizer, pieces, name) for tokenizer in self._tokenizers]
        count = max(len(ids) for ids, _ in rows)
        device = networks.text_encoder.device
        ids = [_stacked(tokenizer, part, count) for tokenizer, (part, _) in zip(self._tokenizers, rows, strict=True)]
        states, pooled = sdxl.encode_tokens(
            networks.text_encoder, networks.text_encoder_2, ids[0].to(device), ids[1].to(device)
        )
        weights = torch.ones(count, WINDOW + 2, device=device, dtype=states.dtype)
        for row, values in enumerate(rows[0][1]):
            weights[row, 1 : 1 + len(values)] = torch.tensor(values, device=device, dtype=states.dtype)
        empty = self([""])[0][0]
        states = empty + weights[..., None] * (states - empty)
        return torch.cat([states[0, :1], states[:, 1:-1].flatten(0, 1), states[-1, -1:]]), pooled[0]

    @property
    def _tokenizers(self) -> tuple[Any, Any]:
        return self._networks.tokenizer, self._networks.tokenizer_2


def _rows(tokenizer: Any, pieces: Weighted, name: str) -> tuple[list[list[int]], list[list[float]]]:
    """Token ids and their weights, 75 a window."""
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in pieces:
        found = _ids(tokenizer, text)
        ids += found
        weights += [weight] * len(found)
    if len(ids) > WINDOW * MOST_WINDOWS:
        raise BadInput(f"Prompt '{name}' has {len(ids)} tokens; at most {WINDOW * MOST_WINDOWS} are drawn. Shorten it.")
    starts = range(0, max(len(ids), 1), WINDOW)
    return [ids[k : k + WINDOW] for k in starts], [weights[k : k + WINDOW] for k in starts]


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return found


def _stacked(tokenizer: Any, rows: Sequence[Sequence[int]], count: int) -> Tensor:
    """(count, 77) int64, padded as the tokenizer pads."""
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    filled = [[begin, *row, end] for row in [*rows, *[[]] * (count - len(rows))]]
    return torch.tensor([row + [pad] * (WINDOW + 2 - len(row)) for row in filled])
