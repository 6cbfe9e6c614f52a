"""Makes caption sets: draws the embedded world where asked, then builds the manifests of both splits."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

from ambergrade.captions.booru import open_booru
from ambergrade.captions.buckets import aspect_buckets
from ambergrade.captions.files import PictureFiles
from ambergrade.captions.manifest import build
from ambergrade.captions.recipe import CaptionRecipe
from ambergrade.captions.selection import select_rows
from ambergrade.chain.context import Context, Stage
from ambergrade.chain.settings import Compute, DataSettings, FamilySettings
from ambergrade.errors import BadInput
from ambergrade.identity import digest
from ambergrade.lines import read_lines
from ambergrade.nouns import CaptionSet
from ambergrade.store import Finished, Outputs, find_file, read_json, write_json
from ambergrade.track.journal import Run

DATASET = Stage("dataset", 3)
SPLITS = ("train", "heldout")
MARKER = "drawn.json"
"""In the folder of a mini-booru: what was drawn there, written last."""
SMALL = 20_000
"""Posts up to which one process builds the manifests: another takes 2 s to start."""


def draw_world(data: DataSettings, compute: Compute) -> None:
    """Draw the mini-booru that `data.draw` describes, unless its folder holds it already.

    Two commands at once: one draws, the other waits and finds it drawn.
    """
    from ambergrade.world.booru import write_booru

    if data.draw is None or data.folder is None:
        return
    wanted, folder = asdict(data.draw), Path(data.folder)
    marker = folder / MARKER
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        there = is_drawn(data)
        if not there:
            unfinished = not marker.exists() and folder.name == digest(wanted)[:12]  # killed before it was marked
            if folder.exists() and any(folder.iterdir()) and not unfinished:
                what = "another drawing" if marker.exists() else "other things than a drawn world"
                raise BadInput(f"{folder} holds {what}.\nName a new folder: data.folder=PATH.")
            write_booru(folder, **wanted, workers=compute.workers)
            write_json(marker, wanted)
    how = "  finished before" if there else f"{time.monotonic() - start:8.1f} s"
    print(f"  {'mini-booru':<34}{how:<18}{digest(wanted)[:12]}", flush=True)


def is_drawn(data: DataSettings) -> bool:
    """Whether the mini-booru that `data.draw` describes is there, or none is asked for."""
    return data.draw is None or data.folder is None or read_json(Path(data.folder) / MARKER) == asdict(data.draw)


def read_sets(done: Finished) -> tuple[CaptionSet, CaptionSet]:
    """The captioned pictures to train on, and those held out to validate with."""
    return CaptionSet.read(done.files["train.jsonl"]), CaptionSet.read(done.files["heldout.jsonl"])


def dataset(context: Context, data: DataSettings, captions: CaptionRecipe, family: FamilySettings) -> Finished:
    """Build the manifests of both splits, `train.jsonl` and `heldout.jsonl`, and count what became of every post."""
    buckets = aspect_buckets(family.resolution, family.bucket_step, family.min_side, family.max_side)
    booru = open_booru(find_file(data.database), context.ledger.root / "arrays")
    files = picture_files(context, data)
    unwanted = frozenset(listed_ids(data.leave_out))
    rows = {split: select_rows(booru, replace(data.selection, split=split)) for split in SPLITS}

    def work(scratch: Path, run: Run) -> Outputs:
        reports, counts, made = {}, {}, {}
        for split in SPLITS:
            posts = (post for post in booru.posts(rows[split]) if post.id not in unwanted)
            workers = context.compute.workers if len(booru) > SMALL else 1
            found, report = build(posts, captions, files, buckets, workers=workers, part=split)
            made[f"{split}.jsonl"] = scratch / f"{split}.jsonl"
            found.write(made[f"{split}.jsonl"])
            reports[split], counts[split] = report.text, len(found.pictures)
        return Outputs(made, {"report": reports, "pictures": counts})

    def journal(run: Run, done: Finished) -> None:
        run.note("\n\n".join(f"**{split}**\n```\n{text}\n```" for split, text in done.values["report"].items()))
        run.file(done.files["train.jsonl"], "captions")

    # of each side: a count draws other posts from each than from both together
    pictures = digest([files.fingerprint(booru.pictures(rows[split])) for split in SPLITS])
    made_of = {"captions": captions, "selection": data.selection, "buckets": buckets}
    left_out = {"leave_out": digest(sorted(unwanted))} if unwanted else {}
    task = DATASET.task({**made_of, **left_out}, {"database": booru.fingerprint, "pictures": pictures})
    return context.run(task, "captions and buckets", work, journal=journal)


def picture_files(context: Context, data: DataSettings) -> PictureFiles:
    """The folder of pictures, or of tars whose index is kept beside the results."""
    return PictureFiles(Path(data.pictures), index=context.ledger.root / "tars")


def listed_ids(path: str | None) -> Iterator[int]:
    """Post ids of a file, one a line, as the lint writes it."""
    if path is None:
        return
    for number, line in read_lines(find_file(path)):
        if not (line.isascii() and line.isdigit()):
            raise BadInput(f"{path}, line {number}: a post id is needed, found '{line}'.")
        yield int(line)
