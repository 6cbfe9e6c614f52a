"""What is wrong with picture files, before training on them: unusable, mended on reading, damaged, repeated."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, JpegImagePlugin
from tqdm import tqdm

from ambergrade.captions.files import OutsideFolder, PictureFiles
from ambergrade.captions.manifest import each
from ambergrade.captions.repeats import THUMBNAIL, nearly_alike
from ambergrade.captions.settings import Limits
from ambergrade.errors import BadInput
from ambergrade.nouns import RATINGS, Post
from ambergrade.pictures import DECODER_ERRORS, SUFFIXES, opened, orientation, profile_name, upright

RULES = {
    "missing": ("unusable", "no file or tar member for the post"),
    "outside": ("unusable", "the file's name leads out of the picture folder; it is not opened"),
    "truncated": ("unusable", "the file ends early; its rest would be trained on as grey"),
    "unreadable": ("unusable", "not a picture, or of a kind without an agreed sRGB form"),
    "alpha": ("mended", "transparent; laid on white, so that hidden colours do not show"),
    "exif": ("mended", "stored turned; shown upright, and its size taken after that"),
    "icc": ("mended", "another colour space; brought to sRGB"),
    "cmyk": ("mended", "ink, not light; brought to sRGB"),
    "16-bit": ("mended", "more than 8 bits a channel; scaled, not cut off at white"),
    "animated": ("mended", "several frames; the first is used"),
    "jpeg": ("damage", "JPEG below the quality asked for: blocks and ringing"),
    "chroma": ("damage", "colours stored at half size (4:2:0): they bleed over lines"),
    "webp": ("damage", "lossy WebP, whose colours are always stored at half size"),
    "grid": ("damage", "an 8 x 8 mosaic in the pixels, whatever the file's format says"),
    "upscaled": ("damage", "no detail near the pixel's size: enlarged, or blurred"),
    "duplicate": ("repeat", "the same bytes as another post's"),
    "near-duplicate": ("repeat", "looks like another post's, which is at least as large"),
    "size": ("database", "the file's size is not the upload's that the database tells"),
    "tagless": ("database", "the post has no tag"),
    "rating": ("database", "a rating that the enum does not hold; it has no quality tag"),
}
"""Rule to (severity, what it means)."""
LEFT_OUT = ("unusable", "repeat")
"""Severities that a training set is better without."""
IJG_LUMA = (
    "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62 "
    "18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"
)
"""Luma table of JPEG's annex K, which quality 50 stands for."""


@dataclass(frozen=True)
class Finding:
    post_id: int
    file: str
    """Relative to the picture folder; empty where there is none."""
    rule: str
    """A key of RULES."""
    detail: str

    @property
    def severity(self) -> str:
        return RULES[self.rule][0]


@dataclass(frozen=True)
class Lint:
    """Findings about a set of posts."""

    posts: int
    pictures: int
    """Found and read."""
    findings: tuple[Finding, ...]
    """By post id, then in the order of RULES."""
    by_name: bool = False
    """Whether people know the pictures by their files' names, there being no database."""

    @property
    def counts(self) -> dict[str, int]:
        """Rule to the number of posts, in the order of RULES; those that hit nothing are left out."""
        found = Counter(finding.rule for finding in self.findings)
        return {rule: found[rule] for rule in RULES if found[rule]}

    @property
    def left_out(self) -> list[str]:
        """What people call the posts that a training set is better without, by id."""
        found = {f.post_id: self.called(f) for f in self.findings if f.severity in LEFT_OUT}
        return [found[post] for post in sorted(found)]

    def called(self, finding: Finding) -> str:
        """Return the post's id, or its file's name where there is no database."""
        return finding.file if self.by_name else str(finding.post_id)

    @property
    def text(self) -> str:
        """A few lines for a person."""
        lines = [f"{self.pictures} pictures of {self.posts} posts read, {len(self.findings)} findings"]
        for rule, count in self.counts.items():
            severity, meaning = RULES[rule]
            some = [self.called(finding) for finding in self.findings if finding.rule == rule][:4]
            more = ", …" if count > len(some) else ""
            lines.append(f"  {count:6}  {rule:<15}{severity:<10}{meaning}: {', '.join(some)}{more}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Examined:
    """One file, looked at on its own."""

    found: list[tuple[str, str]] = field(default_factory=list)
    """(rule, detail)"""
    name: str = ""
    sha256: str = ""
    size: tuple[int, int] = (0, 0)
    """Upright, pixels."""
    thumbnail: bytes = b""


def lint(
    posts: Iterable[Post],
    files: PictureFiles,
    limits: Limits | None = None,
    *,
    workers: int = 1,
    total: int | None = None,
    by_name: bool = False,
) -> Lint:
    """Look at every post's picture, decoded in full by `workers` processes, and compare them with one another.

    With `by_name` the findings call pictures by their files' names, as for the posts of `folder_posts`.
    """
    limits = limits or Limits()
    findings: list[Finding] = []
    kept: list[tuple[Post, Examined]] = []
    listed = list(posts)
    with each(partial(_found, files, limits), ((p.id, p.file_name) for p in listed), workers) as looked_at:
        for post, found in zip(
            tqdm(listed, "looking at pictures", total=total, disable=None, unit="picture"), looked_at, strict=True
        ):
            findings += [Finding(post.id, found.name, *told) for told in (*found.found, *_database(post, found))]
            if found.thumbnail:
                kept.append((post, found))
    findings += _repeats(kept, limits, by_name)
    order = {rule: place for place, rule in enumerate(RULES)}
    findings.sort(key=lambda finding: (finding.post_id, order[finding.rule]))
    return Lint(len(listed), len(kept), tuple(findings), by_name)


def grid_strength(luma: npt.NDArray[np.float32]) -> float:
    """How much steeper luma steps across one phase of an 8-pixel grid than across the median phase, grey levels.

    After the block-edge differences of Wang, Bovik & Evans 2000: a step less the mean of its neighbours, capped at 12
    so that drawn edges do not count. The phase is free, so a cropped file's grid is found; a resized one's is not.
    """
    strengths = []
    for rows in (luma, luma.T):
        if rows.shape[1] < 32:
            return 0.0
        step = np.minimum(np.abs(np.diff(rows, axis=1)), 12.0)
        columns = (step[:, 1:-1] - (step[:, :-2] + step[:, 2:]) / 2).mean(axis=0)
        phases = [float(columns[phase::8].mean()) for phase in range(8)]
        strengths.append(max(phases) - float(np.median(phases)))
    return sum(strengths) / 2


def detail_share(luma: npt.NDArray[np.float32]) -> float:
    """Power at 0.8–0.98 of the Nyquist frequency over that at 0.3–0.45, along the better of both axes.

    Drawn or photographed edges fall with frequency f as 1/f², to about 0.15; a smooth enlargement has nothing there.
    """
    shares = []
    for rows in (luma, luma.T):
        if rows.shape[1] < 32:
            return 1.0
        power = (np.abs(np.fft.rfft(rows * np.hanning(rows.shape[1]), axis=1)) ** 2).mean(axis=0)
        frequency = np.linspace(0, 1, len(power))
        middle = power[(frequency > 0.3) & (frequency < 0.45)].mean()
        shares.append(float(power[(frequency > 0.8) & (frequency <= 0.98)].mean() / middle) if middle > 1 else 1.0)
    return max(shares)


def replicated(luma: npt.NDArray[np.float32]) -> int:
    """2, 3 or 4 where every pixel is a block of so many a side, as nearest-neighbour enlargement leaves it; else 1."""
    for factor in (4, 3, 2):
        cut = luma[: luma.shape[0] // factor * factor, : luma.shape[1] // factor * factor]
        rest = range(1, factor)
        if (
            cut.size
            and np.ptp(cut) > 0
            and all((cut[::factor] == cut[k::factor]).all() for k in rest)
            and all((cut[:, ::factor] == cut[:, k::factor]).all() for k in rest)
        ):
            return factor
    return 1


def jpeg_quality(tables: dict[int, list[int]]) -> int:
    """libjpeg's quality, 1 to 100, whose luma table is nearest to the file's."""
    zigzag_free = sorted(map(int, IJG_LUMA.split()))
    scale = 100 * sum(sorted(tables[min(tables)])) / sum(zigzag_free)
    return max(1, min(100, round(100 - scale / 2 if scale <= 100 else 5000 / scale)))


def examined(data: bytes, name: str, limits: Limits) -> Examined:
    """Look at one file on its own: what its format and its pixels tell, and what it takes to compare it."""
    try:
        with opened(io.BytesIO(data), name) as stored:
            picture = upright(stored, name)
            found = _format(stored, data, limits)
    except BadInput as error:
        return Examined([_unusable(data, str(error))], name)
    found += _pixels(picture, limits)
    thumbnail = picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX).tobytes()
    return Examined(found, name, hashlib.sha256(data).hexdigest(), picture.size, thumbnail)


def _found(files: PictureFiles, limits: Limits, post: tuple[int, str]) -> Examined:
    name: str | None = post[1]
    try:
        name = files.find(*post)
        if name is None:
            return Examined([("missing", f"{post[1]} is not in {files.folder}")])
        return examined(files.read(name), name, limits)
    except OutsideFolder as error:
        return Examined([("outside", str(error))])
    except BadInput as error:
        return Examined([("truncated" if "cut short" in str(error) else "unreadable", str(error))], name or "")


def _unusable(data: bytes, complaint: str) -> tuple[str, str]:
    """Whether a file is cut short: the decoder says so, or the mark that ends its format is not there."""
    ends = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND", b"GIF8": b"\x3b"}
    cut = any(data.startswith(head) and tail not in data[-16:] for head, tail in ends.items())
    cut |= data[:4] == b"RIFF" and len(data) < int.from_bytes(data[4:8], "little") + 8
    return "truncated" if cut or "truncated" in complaint.lower() else "unreadable", complaint


def _format(file: Image.Image, data: bytes, limits: Limits) -> list[tuple[str, str]]:
    """What the file's own words tell: modes, profiles, tables."""
    found: list[tuple[str, str]] = []
    if file.has_transparency_data:
        alpha = np.asarray(file.convert("RGBA"))[..., 3]
        if alpha.min() < 255:
            found.append(("alpha", f"{file.mode}, {(alpha < 255).mean():.0%} of the pixels see-through"))
    if orientation(file) != 1:
        found.append(("exif", f"orientation {orientation(file)}"))
    described = profile_name(file)
    if described and "srgb" not in described.lower():
        found.append(("icc", described))
    if file.mode == "CMYK":
        found.append(("cmyk", f"{file.format}{', Adobe-inverted' if 'adobe' in file.info else ''}"))
    if file.mode.startswith("I") or (file.format == "PNG" and data[24] == 16):
        found.append(("16-bit", file.mode))
    if isinstance(file, JpegImagePlugin.JpegImageFile) and file.format == "JPEG":
        quality = jpeg_quality(file.quantization)
        if quality < limits.jpeg_quality:
            found.append(("jpeg", f"quality {quality}"))
        if JpegImagePlugin.get_sampling(file) in (1, 2):
            found.append(("chroma", "4:2:0" if JpegImagePlugin.get_sampling(file) == 2 else "4:2:2"))
    if file.format == "WEBP" and b"VP8 " in data[:4096]:
        found.append(("webp", "lossy, 4:2:0"))
    try:
        frames = int(getattr(file, "n_frames", 1))  # seeks to the file's end
        found += [("animated", f"{frames} frames")] if frames > 1 else []
    except DECODER_ERRORS:
        found.append(("animated", "damaged after the first frame"))
    return found


def _pixels(picture: Image.Image, limits: Limits) -> list[tuple[str, str]]:
    luma = np.asarray(picture.convert("L"), np.float32)
    found = []
    factor = replicated(luma)
    if factor > 1:
        return [("upscaled", f"{factor} times, by repeating pixels")]
    grid, detail = grid_strength(luma), detail_share(luma)
    if grid > limits.grid:
        found.append(("grid", f"steps of {grid:.2f} grey levels"))
    if detail < limits.detail:
        found.append(
            ("upscaled", f"{detail:.3f} of the detail of a sharp one's middle band; sharp ones have 0.1 and more")
        )
    return found


def _database(post: Post, found: Examined) -> list[tuple[str, str]]:
    told = []
    if not any(post.tags.values()):
        told.append(("tagless", ""))
    if post.rating not in RATINGS:
        told.append(("rating", post.rating))
    known = sorted((post.width, post.height))
    if found.thumbnail and min(known) > 0 and sorted(found.size) != known:
        told.append(("size", f"file {found.size[0]}x{found.size[1]}, database {post.width}x{post.height}"))
    return told


def _repeats(kept: Sequence[tuple[Post, Examined]], limits: Limits, by_name: bool) -> list[Finding]:
    """Copies, and pictures that look like one that is at least as large (of equals the older one stays)."""

    def called(post: Post, found: Examined) -> str:
        return found.name if by_name else f"post {post.id}"

    findings: list[Finding] = []
    first: dict[str, str] = {}
    single: list[tuple[Post, Examined]] = []
    for post, found in kept:
        if found.sha256 in first:
            findings.append(Finding(post.id, found.name, "duplicate", f"of {first[found.sha256]}"))
        else:
            first[found.sha256] = called(post, found)
            single.append((post, found))
    single.sort(key=lambda item: (-item[1].size[0] * item[1].size[1], item[0].id))
    thumbnails = np.frombuffer(b"".join(found.thumbnail for _, found in single), np.uint8).reshape(len(single), -1)
    shapes = np.array([found.size for _, found in single], np.float64).reshape(-1, 2)
    for earlier, later, apart in nearly_alike(thumbnails, shapes, limits.alike):
        post, found = single[later]
        told = f"of {called(*single[earlier])}, {apart:.1f} grey levels apart"
        findings.append(Finding(post.id, found.name, "near-duplicate", told))
    return findings


def folder_posts(folder: Path) -> list[Post]:
    """Posts for the pictures of a folder that has no database: numbered in the order of their names, without tags."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    if not names:
        raise BadInput(f"No picture lies in {folder}.")
    return [Post(n, {"general": ("unknown",)}, RATINGS[0], "", 0, 0, 0, 0, name) for n, name in enumerate(names)]
