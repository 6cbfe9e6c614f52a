"""Prompts as what the UNet attends to: windows of 75 tokens, as SDXL trainers cut them, and weights.

`ambergrade.prompts` reads what is written. `BREAK` begins a new window; a longer text is cut into as many as it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ambergrade.errors import BadInput
from ambergrade.family.networks import Networks
from ambergrade.prompts import Weighted, read_prompt

WINDOW = 75
"""Tokens of text between begin and end."""
MOST_WINDOWS = 8
"""600 tokens; beyond, cross-attention costs more than the rest of the UNet."""


def refuse_undrawable(prompts: Iterable[tuple[str, str]]) -> None:
    """Raise BadInput naming every (name, text) that the grammar refuses, with the reasons."""
    told = [f"Prompt '{name}': {reason}." for name, text in prompts for reason in read_prompt(text).refused]
    if told:
        more = [f"… and {len(told) - 12} more"] if len(told) > 12 else []
        raise BadInput("These prompts cannot be drawn as they are written:\n  " + "\n  ".join(told[:12] + more))


class TextEncoder:
    """Prompts to conditions, each text encoded once. It is good for as long as the text encoders' weights stay."""

    def __init__(self, networks: Networks) -> None:
        self._networks = networks
        self._known: dict[tuple[tuple[Weighted, ...], int], tuple[Tensor, Tensor]] = {}

    def __call__(
        self, prompts: Sequence[str], names: Sequence[str] | None = None, skip: int = 2
    ) -> list[tuple[Tensor, Tensor]]:
        """For each prompt (75 K + 2, C) states and (P,) pooled; prompts that read alike have the very same ones.

        The states are those of the encoders' layer `skip`, counted from the end.
        `names` are told where a prompt cannot be drawn. Raises BadInput for what the grammar refuses, with the reason,
        and for a prompt that is too long.
        """
        refuse_undrawable(zip(names or prompts, prompts, strict=True))
        read = [read_prompt(prompt) for prompt in prompts]
        new = {one.windows: one.text for one in read if (one.windows, skip) not in self._known}
        plain = {windows: text for windows, text in new.items() if self._is_plain(windows, text)}
        if plain:
            states, pooled = self._networks.encode_text(list(plain.values()), -skip)
            self._known |= {(windows, skip): (states[k], pooled[k]) for k, windows in enumerate(plain)}
        for name, one in zip(names or prompts, read, strict=True):
            if (one.windows, skip) not in self._known:
                self._known[one.windows, skip] = self._windowed(one.windows, name, skip)
        return [self._known[one.windows, skip] for one in read]

    def windows(self, condition: tuple[Tensor, Tensor]) -> int:
        return (len(condition[0]) - 2) // WINDOW

    def padded(self, condition: tuple[Tensor, Tensor], windows: int, skip: int = 2) -> tuple[Tensor, Tensor]:
        """The condition with empty windows behind it, so that prompt and negative prompt are equally long."""
        states, pooled = condition
        missing = windows - self.windows(condition)
        if missing == 0:
            return condition
        empty = self([""], skip=skip)[0][0][1:-1]
        return torch.cat([states[:-1], *[empty] * missing, states[-1:]]), pooled

    def _is_plain(self, windows: tuple[Weighted, ...], text: str) -> bool:
        fits = all(len(_ids(tokenizer, text)) <= WINDOW for tokenizer in self._networks.tokenizers)
        return fits and len(windows) <= 1 and all(weight == 1 for window in windows for _, weight in window)

    def _windowed(self, windows: tuple[Weighted, ...], name: str, skip: int) -> tuple[Tensor, Tensor]:
        """States of all windows, weighted: z + (w - 1)·(z - z₀) with z₀ the empty text's state at the same place.

        (ComfyUI's reading of a weight; multiplying states and restoring their mean, as in A1111, divides by a mean
        that may be near zero.) Begin of the first, text of all, end of the last; pooled of the first.
        """
        networks = self._networks
        tokenizers = networks.tokenizers
        rows = [_rows(tokenizer, windows, name) for tokenizer in tokenizers]
        count = max(len(ids) for ids, _ in rows)
        device = next(iter(networks.encoders.values())).device
        ids = [_stacked(tokenizer, part, count) for tokenizer, (part, _) in zip(tokenizers, rows, strict=True)]
        states, pooled = networks.encode([one.to(device) for one in ids], -skip)
        weights = torch.ones(count, WINDOW + 2, device=device, dtype=states.dtype)
        for row, values in enumerate(rows[0][1]):
            weights[row, 1 : 1 + len(values)] = torch.tensor(values, device=device, dtype=states.dtype)
        empty = self([""], skip=skip)[0][0]
        states = empty + weights[..., None] * (states - empty)
        return torch.cat([states[0, :1], states[:, 1:-1].flatten(0, 1), states[-1, -1:]]), pooled[0]


def _rows(tokenizer: Any, windows: tuple[Weighted, ...], name: str) -> tuple[list[list[int]], list[list[float]]]:
    """Token ids and their weights, 75 a row; every window begins a new row."""
    rows: list[list[tuple[int, float]]] = []
    for pieces in windows:
        tokens = [(number, weight) for text, weight in pieces for number in _ids(tokenizer, text)]
        rows += [tokens[k : k + WINDOW] for k in range(0, max(len(tokens), 1), WINDOW)]
    if len(rows) > MOST_WINDOWS:
        raise BadInput(
            f"Prompt '{name}' has {sum(map(len, rows))} tokens in {len(rows)} windows of {WINDOW}; "
            f"at most {MOST_WINDOWS} are drawn. Shorten it."
        )
    return [[number for number, _ in row] for row in rows], [[weight for _, weight in row] for row in rows]


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return found


def _stacked(tokenizer: Any, rows: Sequence[Sequence[int]], count: int) -> Tensor:
    """(count, 77) int64, padded as the tokenizer pads."""
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    filled = [[begin, *row, end] for row in [*rows, *[[]] * (count - len(rows))]]
    return torch.tensor([row + [pad] * (WINDOW + 2 - len(row)) for row in filled])
