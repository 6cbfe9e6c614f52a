"""Build a caption set: which pictures, cut how, with which caption, and why the others were left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ambergrade.captions.buckets import Size, nearest_bucket, placement
from ambergrade.captions.pictures import open_picture
from ambergrade.captions.recipe import CaptionRecipe, caption
from ambergrade.errors import BadInput
from ambergrade.identity import file_digest
from ambergrade.nouns import CaptionedPicture, CaptionSet, Post

MISSING = "picture file missing"
UNREADABLE = "picture unreadable"
DUPLICATE = "same bytes as an earlier picture"
SMALL = "smaller than its bucket"
UNCAPTIONED = "rating has no quality table"


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
    posts: Iterable[Post], recipe: CaptionRecipe, picture_folder: Path, buckets: Sequence[Size]
) -> tuple[CaptionSet, Report]:
    """Captioned pictures in ascending post id, and what became of every post.

    Each picture file is hashed and decoded in full. A post is left out, and counted with its reason, if its
    file is missing, unreadable, a byte-for-byte copy of an earlier one, or smaller than its bucket (nothing is
    enlarged), or if its caption cannot be made.

    Raises:
        BadInput: nothing is left.
    """
    ordered = sorted(posts, key=lambda post: post.id)
    dropped: dict[str, list[int]] = {}
    details: list[str] = []
    kept: list[CaptionedPicture] = []
    seen: set[str] = set()
    for post in tqdm(ordered, "captioning pictures", disable=None, unit="picture"):
        path = picture_folder / post.file_name
        outcome = _captioned(post, recipe, path, buckets, seen, details)
        if isinstance(outcome, CaptionedPicture):
            kept.append(outcome)
        else:
            dropped.setdefault(outcome, []).append(post.id)
    sizes = Counter("x".join(map(str, picture.bucket)) for picture in kept)
    reasons = {reason: tuple(ids) for reason, ids in sorted(dropped.items())}
    report = Report(len(ordered), len(kept), reasons, tuple(details), dict(sorted(sizes.items())))
    if not kept:
        raise BadInput(
            f"No picture is left to train on.\n{report.text}\nLook at the selection and at {picture_folder}."
        )
    return CaptionSet(tuple(kept), recipe.name), report


def _captioned(
    post: Post, recipe: CaptionRecipe, path: Path, buckets: Sequence[Size], seen: set[str], details: list[str]
) -> CaptionedPicture | str:
    """The captioned picture, or the reason for leaving it out."""
    if not path.is_file():
        return MISSING
    try:
        text = caption(post, recipe)
    except BadInput:
        return UNCAPTIONED
    sha256 = file_digest(path)
    if sha256 in seen:
        return DUPLICATE
    try:
        size = open_picture(path).size
    except BadInput as error:
        details.append(f"post {post.id}: {error}")
        return UNREADABLE
    bucket = nearest_bucket(size, buckets)
    place = placement(size, bucket)
    if place is None:
        return SMALL
    seen.add(sha256)
    return CaptionedPicture(post.id, post.file_name, sha256, text, _original_size(post, size), bucket, place.crop)


def _original_size(post: Post, size: Size) -> Size:
    """The upload's size as the database says (the file may be a smaller copy), turned as the upright picture is."""
    if post.width <= 0 or post.height <= 0:
        return size
    turned = (post.width - post.height) * (size[0] - size[1]) < 0
    return (post.height, post.width) if turned else (post.width, post.height)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
