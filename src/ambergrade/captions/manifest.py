"""Build a caption set: which pictures, cut how, with which caption, and why the others were left out."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from ambergrade.captions.buckets import Size, nearest_bucket, placement
from ambergrade.captions.files import PictureFiles
from ambergrade.captions.pictures import decode
from ambergrade.captions.recipe import CaptionRecipe, caption
from ambergrade.errors import BadInput
from ambergrade.nouns import CaptionedPicture, CaptionSet, Post

MISSING = "picture file missing"
UNREADABLE = "picture unreadable"
DUPLICATE = "same bytes as an earlier picture"
SMALL = "smaller than its bucket"
UNCAPTIONED = "rating has no quality table"
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Report:
    """What became of every post."""

    posts: int
    kept: int
    dropped: Mapping[str, tuple[int, ...]]
    """Reason to the ids of the posts left out for it."""
    details: tuple[str, ...]
    """What the reader said of each unreadable picture."""
    buckets: Mapping[str, int]
    """Bucket, as `128x128`, to its number of pictures."""

    @property
    def counts(self) -> dict[str, int]:
        """Reason to number of posts left out."""
        return {reason: len(ids) for reason, ids in self.dropped.items()}

    @property
    def text(self) -> str:
        """A few lines for a person."""
        lines = [f"{self.kept} of {self.posts} posts kept; buckets: " + _listed(self.buckets)]
        for reason, ids in self.dropped.items():
            some = ", ".join(map(str, ids[:5])) + (", …" if len(ids) > 5 else "")
            lines.append(f"  {len(ids)} left out, {reason}: {some}")
        return "\n".join(lines)


def build(
    posts: Iterable[Post],
    recipe: CaptionRecipe,
    pictures: Path | PictureFiles,
    buckets: Sequence[Size],
    *,
    workers: int = 1,
) -> tuple[CaptionSet, Report]:
    """Captioned pictures in ascending post id, and what became of every post.

    Each picture file is hashed and decoded in full, by `workers` processes. A post is left out, and counted with its
    reason, if its file is missing, unreadable, a byte-for-byte copy of an earlier one, or smaller than its bucket
    (nothing is enlarged), or if its caption cannot be made.

    Raises:
        BadInput: nothing is left.
    """
    files = pictures if isinstance(pictures, PictureFiles) else PictureFiles(pictures)
    ordered = sorted(posts, key=lambda post: post.id)
    dropped: dict[str, list[int]] = {}
    details: list[str] = []
    kept: list[CaptionedPicture] = []
    seen: set[str] = set()
    with each(partial(_seen, files), ((post.id, post.file_name) for post in ordered), workers) as found:
        for post, file in zip(tqdm(ordered, "captioning", disable=None, unit="picture"), found, strict=True):
            outcome = _captioned(post, recipe, file, buckets, seen, details)
            if isinstance(outcome, CaptionedPicture):
                kept.append(outcome)
            else:
                dropped.setdefault(outcome, []).append(post.id)
    sizes = Counter("x".join(map(str, picture.bucket)) for picture in kept)
    reasons = {reason: tuple(ids) for reason, ids in sorted(dropped.items())}
    report = Report(len(ordered), len(kept), reasons, tuple(details), dict(sorted(sizes.items())))
    if not kept:
        raise BadInput(f"No picture is left to train on.\n{report.text}\nLook at the selection and at {files.folder}.")
    return CaptionSet(tuple(kept), recipe.name), report


@contextmanager
def each(work: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Iterator[Result]]:
    """`work` of every item, in order, by so many processes."""
    if workers <= 1:
        yield map(work, items)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield pool.imap(work, items, 16)


@dataclass(frozen=True)
class _File:
    """A picture file as it was found."""

    name: str = ""
    """Empty: there is none."""
    sha256: str = ""
    size: Size | None = None
    complaint: str = ""


def _seen(files: PictureFiles, post: tuple[int, str]) -> _File:
    name = files.find(*post)
    if name is None:
        return _File()
    try:
        data = files.read(name)
        sha256 = hashlib.sha256(data).hexdigest()
    except BadInput as error:
        return _File(name, complaint=str(error))
    try:
        return _File(name, sha256, decode(io.BytesIO(data), str(files.folder / name)).size)
    except BadInput as error:
        return _File(name, sha256, complaint=str(error))


def _captioned(
    post: Post, recipe: CaptionRecipe, file: _File, buckets: Sequence[Size], seen: set[str], details: list[str]
) -> CaptionedPicture | str:
    """The captioned picture, or the reason for leaving it out."""
    if not file.name:
        return MISSING
    try:
        text = caption(post, recipe)
    except BadInput:
        return UNCAPTIONED
    if file.sha256 in seen:
        return DUPLICATE
    if file.size is None:
        details.append(f"post {post.id}: {file.complaint}")
        return UNREADABLE
    bucket = nearest_bucket(file.size, buckets)
    place = placement(file.size, bucket)
    if place is None:
        return SMALL
    seen.add(file.sha256)
    original = _original_size(post, file.size)
    return CaptionedPicture(post.id, file.name, file.sha256, text, original, bucket, place.crop)


def _original_size(post: Post, size: Size) -> Size:
    """The upload's size as the database says (the file may be a smaller copy), turned as the upright picture is."""
    if post.width <= 0 or post.height <= 0:
        return size
    turned = (post.width - post.height) * (size[0] - size[1]) < 0
    return (post.height, post.width) if turned else (post.width, post.height)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
