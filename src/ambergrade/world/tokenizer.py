"""A CLIPTokenizer with the world's own small vocabulary: every word of its captions is one token."""

from __future__ import annotations

import re

from transformers import CLIPTokenizer

from ambergrade.world import grammar

CONTROL = (
    *("safe", "sensitive", "nsfw", "explicit"),
    *("masterpiece", "best quality", "great quality", "good quality", "normal quality", "low quality"),
    *("worst quality", "newest", "recent", "mid", "early", "old", "highres", "absurdres", "original"),
)
"""Tags that caption recipes add, as they spell them."""


def words() -> list[str]:
    """Every word of every caption, in a fixed order; CLIP splits digits and punctuation off first."""
    tags = [*grammar.VISIBLE, *grammar.CHARACTERS, *grammar.ARTISTS, grammar.SERIES, *CONTROL]
    found: dict[str, None] = {}
    for tag in tags:
        for word in re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9_]+", tag.lower()):
            found[word] = None
    return list(found)


def build(max_length: int = 77) -> CLIPTokenizer:
    """The tokenizer; unknown words fall back to single bytes, as in CLIP."""
    alphabet = _byte_alphabet()
    vocabulary = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    merges: list[tuple[str, str]] = []
    for word in words():
        pieces = _pieces(word, merges)
        while len(pieces) > 1:  # later merges rank lower, so the words before stay whole
            merges.append((pieces[0], pieces[1]))
            pieces = ["".join(pieces[:2]), *pieces[2:]]
            if pieces[0] not in vocabulary:
                vocabulary.append(pieces[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: number for number, token in enumerate(vocabulary)},
        merges=merges,
        model_max_length=max_length,
        pad_token="<|endoftext|>",
    )


def _pieces(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """`word` cut by byte-pair encoding (Sennrich et al. 2016): the earliest merge that fits goes first."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    for left, right in merges:
        place = 0
        while place < len(pieces) - 1:
            if (pieces[place], pieces[place + 1]) == (left, right):
                pieces[place : place + 2] = [left + right]
            place += 1
    return pieces


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]
