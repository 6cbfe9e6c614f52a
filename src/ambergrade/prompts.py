r"""Reads a prompt as people write it for A1111, ComfyUI and NovelAI: one grammar for what is drawn and what is scored.

| written | read as |
|---|---|
| `(smile:1.2)`, `(smile)`, `[smile]`, `{smile}` | weights 1.2, 1.1, 1/1.1 and 1.05; nested weights multiply |
| `BREAK` | what follows begins a new window of the text encoder |
| `\(`, `\)`, `\[`, `\]` | brackets that belong to a name |
| `kohaku (world)`, `(o)_(o)`, `:(` | brackets of a name or a face: they stay |
| `long_hair` | `long hair`; names of three characters or fewer keep their underscores, as in the captions (`^_^`) |

What cannot be drawn is named in `refused`: networks and embeddings that a prompt would load, wildcards, alternatives,
prompt editing, `AND`, negative weights, brackets without a partner.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

Weighted = tuple[tuple[str, float], ...]
"""Pieces of text with their weights."""

SHORT = 3
"""Names of at most so many characters keep their underscores (HakuBooru's rule): they are faces."""
_FACTORS = {"(": 1.1, "[": 1 / 1.1, "{": 1.05}
_CLOSING = {")": "(", "]": "[", "}": "{"}
_TOKEN = re.compile(
    r"""\\(?P<escaped>[()\[\]{}\\])
    | (?P<network><\w+:[^<>]*>) | (?P<embedding>\bembedding:[\w./-]+) | (?P<wildcard>(?<!\w)__\w[\w/-]*__(?!\w))
    | (?P<word>\b(?:BREAK|AND)\b)
    | (?P<close>\s*:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[)\]}])
    | (?P<open>[(\[{])
    | (?P<plain>\w+|.)""",
    re.VERBOSE | re.DOTALL,
)
_REASONS = {
    "network": "loads a network, which a prompt cannot do here: add it to the merge",
    "embedding": "names a textual inversion, which is not loaded here",
    "wildcard": "is a wildcard: write the words that it stands for",
    "AND": "joins two prompts: write a comma, or draw them apart",
    "editing": "changes or chooses words while it is drawn: write the words that are meant",
    "negative": "has a negative weight: write the words into the negative prompt",
    "bracket": "has no partner: close it, or write a backslash before it",
}
_WORDS = re.compile(r"[^\W_]{2}|[^\x00-\x7f]")
_EDITING = re.compile(r"[^\W_]\s*\||[^\W_].*:\s*[\d.]+\s*$", re.DOTALL)


@dataclass(frozen=True)
class ReadPrompt:
    """What a prompt says."""

    windows: tuple[Weighted, ...]
    """Plain text with weights; `BREAK` stands between windows, each of which may be longer than the encoder's."""
    tags: tuple[str, ...]
    """The parts between commas as they were written, less weights and escapes; without those of weight 0."""
    refused: tuple[str, ...]
    """What cannot be drawn, with the reason."""

    @property
    def text(self) -> str:
        """The plain text of all windows: what the text encoder is shown."""
        return ", ".join("".join(text for text, _ in window) for window in self.windows)


@lru_cache(maxsize=4096)
def read_prompt(prompt: str) -> ReadPrompt:
    r"""Read a prompt; the same text gives the same answer for drawing and for scoring.

    >>> read_prompt("1girl, (long_hair, (smile:1.3):1.2) BREAK by the sea").windows
    ((('1girl, ', 1.0), ('long hair, ', 1.2), ('smile', 1.56)), (('by the sea', 1.0),))
    >>> read_prompt(r"((smile)), kohaku_\(world\), (o)_(o)").tags
    ('smile', 'kohaku_(world)', '(o)_(o)')
    >>> read_prompt("<lora:style:0.8>, 1girl").refused
    ("'<lora:style:0.8>' loads a network, which a prompt cannot do here: add it to the merge",)
    """
    reader = _Reader(prompt)
    windows, tags = [], []
    for letters in reader.windows():
        named = list(_tags(letters))
        if named:
            windows.append(_pieces(named))
        tags += [
            "".join(letter for letter, _ in tag) for tag, _ in named if any(weight for x, weight in tag if x.strip())
        ]
    return ReadPrompt(tuple(windows), tuple(tags), tuple(dict.fromkeys(reader.refused)))


def plain_text(prompt: str) -> str:
    r"""The prompt as the text encoder is shown it: spelled as the training captions, without weights.

    >>> plain_text(r"1girl, long_hair,kohaku_\(world\), (red_eyes:1.2), ^_^, ")
    '1girl, long hair, kohaku (world), red eyes, ^_^'
    """
    return read_prompt(prompt).text


Letters = list[tuple[str, float]]


@dataclass
class _Item:
    text: str
    weight: float = 1.0
    kind: str = "text"
    """`text`, `open` (a bracket that is not closed yet), `end` of a weighted group, or `break`."""
    weighted: bool = False
    """Whether it stands in a weighted group."""


class _Reader:
    """Letters with their weights, from the brackets as they close."""

    def __init__(self, prompt: str) -> None:
        self.refused: list[str] = []
        self._items: list[_Item] = []
        self._open: list[int] = []
        for match in _TOKEN.finditer(prompt):
            kind, found = str(match.lastgroup), match[0]
            if match["close"]:
                self._close(found, match["weight"], prompt[match.end() : match.end() + 1])
            elif kind == "open":
                self._open.append(len(self._items))
                self._items.append(_Item(found, kind="open"))
            elif kind == "word":
                self._items.append(_Item(",", kind="break" if found == "BREAK" else "text"))
                if found == "AND":
                    self._refuse(found, "AND")
            elif kind in _REASONS:
                self._refuse(found, kind)
                self._items.append(_Item(","))
            else:
                self._items.append(_Item(match["escaped"] or found))
        for place in self._open:
            item, after = self._items[place], "".join(item.text for item in self._items[place + 1 :])
            item.kind = "text"
            if self._begins_a_tag(place) and re.match(r"\s*[^\W_]{2}", after):
                self._refuse(item.text + after.split(",")[0], "bracket")
                item.text = ""

    def windows(self) -> Iterator[Letters]:
        """The letters of each window, `BREAK` by `BREAK`."""
        letters: Letters = []
        for item in self._items:
            if item.kind == "break":
                yield letters
                letters = []
            elif item.kind == "text":
                letters += [(letter, item.weight) for letter in item.text]
        yield letters

    def _close(self, found: str, stated: str | None, following: str) -> None:
        bracket = _CLOSING[found[-1]]
        if not self._open or self._items[self._open[-1]].text != bracket:
            before = "".join(item.text for item in self._items[-2:])
            if re.search(r"[^\W_]{2}$", before):
                self._refuse(before.strip(" ,") + found, "bracket")
            else:
                self._items.append(_Item(found))
            return
        place = self._open.pop()
        inside = [item for item in self._items[place + 1 :] if item.kind == "text" and item.text.strip()]
        content = "".join(item.text for item in self._items[place + 1 :])
        if stated and not content.strip():  # `(:3)` is a face
            stated, content = None, found[:-1]
            self._items.append(_Item(content))
            inside = self._items[-1:]
        whole = f"{bracket}{content}{found}" if stated else f"{bracket}{content}{found[-1]}"
        if stated and float(stated) < 0:
            self._refuse(whole, "negative")
        elif bracket != "(" and _EDITING.search(content):
            self._refuse(whole, "editing")
        if stated:
            self._weigh(place, max(float(stated), 0.0))
        elif self._emphasises(place, bracket, content, following) or (inside and all(x.weighted for x in inside)):
            self._weigh(place, _FACTORS[bracket])
        else:
            self._items[place].kind = "text"
            self._items.append(_Item(found[-1]))

    def _emphasises(self, place: int, bracket: str, content: str, following: str) -> bool:
        """Whether brackets without a number are emphasis, not a name's (`kohaku (world)`) or a face's (`(o)_(o)`)."""
        if _WORDS.search(content):
            return bracket != "(" or self._begins_a_tag(place)
        face = len(content.strip()) > 1 and not re.match(r"\w", following)
        return face and self._begins_a_tag(place)

    def _weigh(self, place: int, factor: float) -> None:
        for item in self._items[place + 1 :]:
            item.weight *= factor
            item.weighted = True
        self._items[place] = _Item("," if self._follows_a_group(place) else "")
        self._items.append(_Item("", kind="end"))

    def _begins_a_tag(self, place: int) -> bool:
        """Whether a comma, a line's end, a bracket, a weighted group or nothing stands before, but for blanks."""
        for item in reversed(self._items[:place]):
            if item.kind != "text" or "\n" in item.text or item.text.endswith(","):
                return True
            if item.text.strip():
                return False
        return True

    def _follows_a_group(self, place: int) -> bool:
        """Whether a weighted group stands right before, so that the two are two tags: `(smile)(frown)`."""
        for item in reversed(self._items[:place]):
            if item.kind != "text" or item.text.strip(" \t"):
                return item.kind == "end"
        return False

    def _refuse(self, what: str, why: str) -> None:
        self.refused.append(f"'{what.strip()}' {_REASONS[why]}")


def _tags(letters: Letters) -> Iterator[tuple[Letters, float]]:
    """The parts between commas and line ends, trimmed, each with the weight of the comma before it."""
    tag: Letters = []
    comma = 1.0
    for letter, weight in [*letters, (",", 1.0)]:
        if letter not in ",\n":
            tag.append((letter, weight))
            continue
        while tag and tag[0][0].isspace():
            tag.pop(0)
        while tag and tag[-1][0].isspace():
            tag.pop()
        if tag:
            yield tag, comma
        tag, comma = [], weight


def _pieces(tags: list[tuple[Letters, float]]) -> Weighted:
    """Tags in the captions' spelling with `, ` between them; neighbours of equal weight are one piece."""
    found: list[tuple[str, float]] = []
    for number, (tag, comma) in enumerate(tags):
        spaced = len(tag) > SHORT
        for text, weight in [(", ", comma)] * (number > 0) + tag:
            text, weight = " " if text == "_" and spaced else text, round(weight, 6)
            if found and found[-1][1] == weight:
                found[-1] = found[-1][0] + text, weight
            else:
                found.append((text, weight))
    return tuple(found)
