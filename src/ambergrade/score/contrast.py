"""Contrast prompts: the same prompt and seed twice, with one control word swapped for its opposite.

Quality, year and rating words are seen by no tagger; what they do is measured between the two pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ambergrade.errors import BadSetting
from ambergrade.nouns import PromptSet
from ambergrade.prompts import plain_text

MARK = "@"


def contrasted(prompts: PromptSet, axes: Mapping[str, Sequence[str]], poles: Mapping[str, Sequence[str]]) -> PromptSet:
    """Two prompts a prompt and axis: `<id>@<axis>+` with the first pole's word, `<id>@<axis>-` with the second's.

    `axes`: axis to all of its words, so that those of the prompt are taken out; `poles`: axis to (better, worse). Words
    stand where the axis's first word stood, else at the end. The seed is the prompt's own in both.
    """
    made = []
    for prompt in prompts.prompts:
        if MARK in prompt.id:
            raise BadSetting(f"Prompt id '{prompt.id}' holds '{MARK}', which marks contrast prompts. Rename it.")
        for axis, (first, second) in poles.items():
            for sign, word in (("+", first), ("-", second)):
                text = _with_word(prompt.text, word, axes[axis])
                made.append(dataclasses.replace(prompt, id=f"{prompt.id}{MARK}{axis}{sign}", text=text))
    return PromptSet(f"{prompts.name} contrasts", tuple(made))


def pairs(prompt_ids: Sequence[str], seeds: Sequence[int]) -> dict[str, list[tuple[str, int, int]]]:
    """Axis to (base prompt, row of the first pole, row of the second), in the order of the rows."""
    place = {key: row for row, key in enumerate(zip(prompt_ids, seeds, strict=True))}
    found: dict[str, list[tuple[str, int, int]]] = {}
    for (prompt_id, seed), row in place.items():
        base, mark, axis = prompt_id.partition(MARK)
        other = place.get((f"{base}{MARK}{axis[:-1]}-", seed)) if mark and axis.endswith("+") else None
        if other is not None:
            found.setdefault(axis[:-1], []).append((base, row, other))
    return found


def _with_word(text: str, word: str, words: Sequence[str]) -> str:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    spelled = {plain_text(other) for other in (*words, word)}
    places = [k for k, part in enumerate(parts) if plain_text(part) in spelled]
    first = places[0] if places else len(parts)
    rest = [part for k, part in enumerate(parts) if k not in places]
    return ", ".join([*rest[:first], word, *rest[first:]])
