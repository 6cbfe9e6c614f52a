"""Build a caption set: which pictures, cut how, with which caption, and why the others were left out."""

from __future__ import annotations

import hashlib
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from ambergrade.captions.buckets import centre_corner, nearest_bucket
from ambergrade.captions.files import OutsideFolder, PictureFiles
from ambergrade.captions.recipe import CaptionRecipe, caption
from ambergrade.errors import BadInput
from ambergrade.nouns import CaptionedPicture, CaptionSet, Post
from ambergrade.pictures import Size, decode_bytes

MISSING = "picture file missing"
OUTSIDE = "picture file outside the picture folder"
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
    """What the reader said of each picture that is unreadable or outside the folder."""
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
    part: str = "train",
) -> tuple[CaptionSet, Report]:
    """Return captioned pictures in ascending post id, and what became of every post.

    Each picture file is hashed and decoded in full, by `workers` processes. A post is left out, and counted with its
    reason, if its file is missing, unreadable, outside the folder, a byte-for-byte copy of an earlier one, or smaller
    than its bucket (nothing is enlarged), or if its caption cannot be made. `part` of the split (train, heldout) is
    what the posts are called in complaints.

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
        raise BadInput(_nothing_left(part, report, files))
    return CaptionSet(tuple(kept), recipe.name), report


def _nothing_left(part: str, report: Report, files: PictureFiles) -> str:
    if not report.posts and part == "heldout":
        return (
            "No post is held out, so that no validation loss can be told: data.selection.heldout_share times the "
            "number of selected posts is too small.\nGive a larger data.selection.heldout_share, for example 0.05."
        )
    advice = f"Look at the selection and at {files.folder}."
    return f"No picture is left in the part '{part}'.\n{report.text}\n{advice}"


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
    sha256: str = ""
    size: Size = (0, 0)
    reason: str = ""
    """Why it cannot be used; empty for a sound one."""
    complaint: str = ""


def _seen(files: PictureFiles, post: tuple[int, str]) -> _File:
    try:
        name = files.find(*post)
        if name is None:
            return _File(reason=MISSING)
        data = files.read(name)
        return _File(name, hashlib.sha256(data).hexdigest(), decode_bytes(data, str(files.folder / name)).size)
    except OutsideFolder as error:
        return _File(reason=OUTSIDE, complaint=str(error))
    except BadInput as error:
        return _File(reason=UNREADABLE, complaint=str(error))


def _captioned(
    post: Post, recipe: CaptionRecipe, file: _File, buckets: Sequence[Size], seen: set[str], details: list[str]
) -> CaptionedPicture | str:
    """The captioned picture, or the reason for leaving it out."""
    if file.reason:
        details += [f"post {post.id}: {file.complaint}"] if file.complaint else []
        return file.reason
    try:
        text = caption(post, recipe)
    except BadInput:
        return UNCAPTIONED
    if file.sha256 in seen:
        return DUPLICATE
    bucket = nearest_bucket(file.size, buckets)
    corner = centre_corner(file.size, bucket)
    if corner is None:
        return SMALL
    seen.add(file.sha256)
    original = _original_size(post, file.size)
    return CaptionedPicture(post.id, file.name, file.sha256, text, original, bucket, corner)


def _original_size(post: Post, size: Size) -> Size:
    """The upload's size as the database says (the file may be a smaller copy), turned as the upright picture is."""
    if post.width <= 0 or post.height <= 0:
        return size
    turned = (post.width - post.height) * (size[0] - size[1]) < 0
    return (post.height, post.width) if turned else (post.width, post.height)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
