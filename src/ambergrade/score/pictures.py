"""A folder of pictures with its prompts: which file belongs to which prompt and seed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from ambergrade.errors import BadInput, MissingObject
from ambergrade.lines import read_text
from ambergrade.nouns import Prompt, PromptSet
from ambergrade.pictures import SUFFIXES
from ambergrade.score.tags import canonical_tags, rating_of


def folder_prompts(folder: Path, ratings: Mapping[str, Sequence[str]], *, needed: bool = True) -> PromptSet:
    """The prompts of a folder: its prompts.jsonl, else a text file beside each picture (`a.png`, `a.txt`).

    A text file's prompt is taken as booru tags, with `ratings` as the words that ask for a rating. Where prompts are
    not `needed`, a picture without one has an empty one. Raises MissingObject naming pictures without a prompt; an
    empty text file is none.
    """
    if (folder / "prompts.jsonl").is_file():
        return PromptSet.read(folder / "prompts.jsonl", folder.name)
    texts = {path: _text_beside(path) for path in _files(folder)}
    missing = [path.name for path, text in texts.items() if not text]
    if missing and needed:
        raise MissingObject(
            f"{folder} has no prompts.jsonl, and {len(missing)} of {len(texts)} pictures lack a .txt with words in it: "
            f"{missing[:3]} …\n"
            "Write one of them, or give prompts=FILE.jsonl (keys: id, text; id is the picture's name without suffix)."
        )
    made = []
    for path, text in texts.items():
        tags = canonical_tags(text)
        made.append(Prompt(path.stem, text, 0, tags=tags, rating=rating_of(tags, ratings)))
    return PromptSet(folder.name, tuple(made))


def folder_pictures(folder: Path, prompts: PromptSet) -> dict[tuple[str, int], Path]:
    """(prompt id, seed) to file, in the prompts' order: `<id>.png`, or `<id>-<seed>.png` for several of one prompt.

    Raises BadInput naming pictures of no prompt and prompts without a picture: nothing is left out quietly.
    """
    by_id = prompts.by_id()
    found: dict[tuple[str, int], Path] = {}
    strange = []
    for path in _files(folder):
        seeded = re.fullmatch(r"(.+)-(\d+)", path.stem)
        if path.stem in by_id:
            key = path.stem, by_id[path.stem].seed
        elif seeded and seeded[1] in by_id:
            key = seeded[1], int(seeded[2])
        else:
            strange.append(path.name)
            continue
        if key in found:
            raise BadInput(f"{path} and {found[key]} are both picture {key}. Keep one of them.")
        found[key] = path
    lacking = [prompt_id for prompt_id in by_id if prompt_id not in {key for key, _ in found}]
    if strange or lacking:
        complaints = []
        if strange:
            complaints.append(f"{len(strange)} pictures belong to no prompt: {', '.join(strange[:4])} …")
        if lacking:
            complaints.append(f"{len(lacking)} prompts have no picture: {', '.join(lacking[:4])} …")
        raise BadInput(f"{folder}: " + "\n".join(complaints) + "\nName pictures <id>.png or <id>-<seed>.png.")
    order = {prompt_id: place for place, prompt_id in enumerate(by_id)}
    return dict(sorted(found.items(), key=lambda item: (order[item[0][0]], item[0][1])))


def _text_beside(picture: Path) -> str:
    """What the text file beside a picture says; "" where there is none."""
    beside = picture.with_suffix(".txt")
    return read_text(beside) if beside.is_file() else ""


def _files(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SUFFIXES]
    if not files:
        raise BadInput(f"{folder} holds no pictures ({', '.join(SUFFIXES)}).")
    return files
