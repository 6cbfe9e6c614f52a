"""The nouns that travel between rooms: frozen, typed, each with a digest of what it is made of."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambergrade.errors import BadInput, BadSetting, unknown_name
from ambergrade.identity import digest
from ambergrade.lines import read_rows, write_rows
from ambergrade.typed import settings

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

TAG_TYPES = ("general", "artist", "character", "copyright", "meta")
RATINGS = ("general", "sensitive", "questionable", "explicit")


@dataclass(frozen=True)
class Post:
    """One booru post: metadata only, tags still structured."""

    id: int
    tags: Mapping[str, tuple[str, ...]]
    """Tag type (one of TAG_TYPES) to raw, underscored tag names in the database's row order."""
    rating: str
    """One of RATINGS."""
    created_at: str
    """Upload time as the database spells it, e.g. `2021-05-19T01:30:25.096-04:00`."""
    score: int
    fav_count: int
    width: int
    """Pixels, of the original upload, as the database says."""
    height: int
    file_name: str
    """Picture file relative to the picture folder."""


@dataclass(frozen=True)
class Caption:
    """A caption in sections: `keep` stays first and in order, `flexible` may be shuffled and dropped, then `suffix`."""

    keep: tuple[str, ...]
    flexible: tuple[str, ...]
    suffix: tuple[str, ...] = ()
    """Stays last and in order."""
    groups: tuple[int, ...] = ()
    """Lengths of the runs of `flexible` that group dropout drops whole; none is one run."""
    never_drop: tuple[str, ...] = ()
    """Members of `flexible` that may be moved but not dropped."""

    @property
    def text(self) -> str:
        """What the text encoder reads when nothing is shuffled or dropped."""
        return ", ".join(self.keep + self.flexible + self.suffix)


@dataclass(frozen=True)
class CaptionedPicture:
    """One training picture: its file, its caption and how it is cut to a bucket."""

    post_id: int
    file_name: str
    sha256: str
    """The sha256 of the picture file's bytes."""
    caption: Caption
    original_size: tuple[int, int]
    """(width, height) of the original upload, pixels: SDXL's first micro-condition."""
    bucket: tuple[int, int]
    """(width, height) trained at, pixels: SDXL's third micro-condition."""
    crop: tuple[int, int]
    """(left, top) cut away after the one resize, in resized pixels: SDXL's second micro-condition."""


@dataclass(frozen=True)
class CaptionSet:
    """A manifest of captioned pictures."""

    pictures: tuple[CaptionedPicture, ...]
    recipe: str
    """Name of the caption recipe."""

    @cached_property
    def digest(self) -> str:
        return digest(self)

    def write(self, path: Path) -> None:
        """Write one JSON object a line; the first line names the recipe."""
        write_rows(path, [{"recipe": self.recipe}, *self.pictures])

    @classmethod
    def read(cls, path: Path) -> CaptionSet:
        """Read what `write` wrote. Raises BadInput naming the line that is something else."""
        recipe: str | None = None
        pictures: list[CaptionedPicture] = []
        for number, row in read_rows(path):
            try:
                if recipe is None:
                    (recipe,) = _whole((row["recipe"],), str)
                else:
                    pictures.append(_captioned_picture(row))
            except (KeyError, TypeError, ValueError) as error:
                raise BadInput(f"{path}, line {number} is no line of a caption set: {error!r}.") from error
        if recipe is None:
            raise BadInput(f"{path} is empty; a caption set names its recipe in the first line.")
        return cls(tuple(pictures), recipe)


def _captioned_picture(row: Mapping[str, Any]) -> CaptionedPicture:
    """A caption set's row as the object that was written: by hand, since millions of rows are read."""
    caption = dict(row["caption"])
    parts = {name: _whole(values, int if name == "groups" else str) for name, values in caption.items()}
    sizes = {key: _whole(row[key], int) for key in ("original_size", "bucket", "crop")}
    if any(len(pair) != 2 for pair in sizes.values()):
        raise ValueError(f"pairs are needed, found {sizes}")
    _whole((row["post_id"],), int)
    _whole((row["file_name"], row["sha256"]), str)
    return CaptionedPicture(**{**row, **sizes, "caption": Caption(**parts)})


def _whole(values: Any, kind: type) -> tuple[Any, ...]:
    """A list as a tuple, all of one type; a text is no list of letters."""
    if not isinstance(values, list | tuple) or not {*map(type, values)} <= {kind}:
        raise TypeError(f"{kind.__name__}s are needed, found {values!r:.60}")
    return tuple(values)


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a family, as a single safetensors file in the original (A1111) layout."""

    path: Path
    family: str
    """Name of the yaml in conf/family."""
    digest: str
    """sha256 over the weights in canonical order (names, dtypes, shapes, bytes); the header's metadata is left out."""


@dataclass(frozen=True)
class Prompt:
    """One prompt and what can be checked about its picture."""

    id: str
    text: str
    seed: int
    """The seed of this picture's own generator."""
    negative: str = ""
    tags: tuple[str, ...] = ()
    """Asked for: raw, underscored tag names."""
    unwanted: tuple[str, ...] = ()
    """Must not be seen: raw tag names, chosen where the prompt rules them out."""
    rating: str = "general"


@dataclass(frozen=True)
class PromptSet:
    """Prompts with their tags and seeds."""

    name: str
    prompts: tuple[Prompt, ...]

    @cached_property
    def digest(self) -> str:
        return digest(self)

    def by_id(self) -> dict[str, Prompt]:
        return {prompt.id: prompt for prompt in self.prompts}

    def first(self, count: int | None) -> PromptSet:
        """The first `count` prompts; all of them for None."""
        return self if count is None else PromptSet(self.name, self.prompts[:count])

    def write(self, path: Path) -> None:
        """Write one JSON object a line, as `read` reads it."""
        write_rows(path, self.prompts)

    @classmethod
    def read(cls, path: Path, name: str = "") -> PromptSet:
        """Read JSON lines with the keys of Prompt: `id` and `text` at least.

        `seed` defaults to the number of prompts before; `tags` and `unwanted` are lists, or one text with commas; an
        `id` may be a whole number. Raises BadInput naming the line for anything else.
        """
        prompts: list[Prompt] = []
        ids: set[str] = set()
        for number, row in read_rows(path):
            try:
                prompt = settings(Prompt, {"seed": len(prompts), **_spelled_out(row)})
                if prompt.rating not in RATINGS:
                    raise BadSetting(unknown_name("rating", prompt.rating, RATINGS))
                if not 0 <= prompt.seed < 1 << 63:
                    raise BadSetting(f"seed: 0 to {(1 << 63) - 1} is needed, found {prompt.seed}.")
                if not prompt.id or prompt.id in ids:
                    raise BadSetting(f"the id '{prompt.id}' {'is there twice' if prompt.id else 'is empty'}.")
            except BadSetting as error:
                raise BadInput(f"{path}, line {number}: {error}") from error
            ids.add(prompt.id)
            prompts.append(prompt)
        if not prompts:
            raise BadInput(f"{path} holds no prompt. Write one JSON object a line, with the keys id and text.")
        return cls(name or path.stem, tuple(prompts))


def _spelled_out(row: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt's row with a numeric id as text, and tags in one text as a list."""
    made = dict(row)
    if type(made.get("id")) is int:
        made["id"] = str(made["id"])
    for key in ("tags", "unwanted"):
        if isinstance(made.get(key), str):
            made[key] = [tag.strip().replace(" ", "_") for tag in made[key].split(",") if tag.strip()]
    return made


@dataclass(frozen=True)
class SamplerSettings:
    """How a prompt becomes a picture; part of what pairs two pictures."""

    name: str
    """Name of the file in generate/samplers."""
    steps: int
    guidance: float
    """Classifier-free guidance scale; 1 is off."""
    width: int
    """Pixels."""
    height: int
    batch: int = 8
    """Pictures per forward pass."""
    rescale: float = 0.0
    """How far the spread of guidance is taken back (Lin et al. 2024, equations 15 and 16); 0 is off."""
    clip_skip: int = 2
    """The text encoders' layer that is read, from the end, as A1111 counts: 2 is SDXL's own."""


@dataclass(frozen=True, eq=False)
class Picture:
    """One generated (or real) picture."""

    prompt_id: str
    seed: int
    pixels: npt.NDArray[np.uint8]
    """Height × width × 3, RGB, 0–255; nothing of it counts where there is a fault."""
    fault: str = ""
    """Why there is no picture: an unreadable file, NaN; empty for a sound one."""


@dataclass(frozen=True)
class Measurement:
    """An aggregate with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    n: int
    """Pictures (or prompts) behind it."""
    higher_is_better: bool = True


@dataclass(frozen=True)
class Release:
    """A folder that a stranger can check and rebuild."""

    path: Path
    digest: str
    """sha256 of its MANIFEST.json."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Relative name to sha256."""

    @property
    def model_sha256(self) -> str:
        """sha256 of the released weights' file."""
        return next(sha256 for name, sha256 in self.files.items() if re.fullmatch(r"[^/]+\.safetensors", name))
