"""Looks at a booru before training: manifests, lint, captions and why they read as they do, percentile tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ambergrade.captions.booru import Booru, open_booru
from ambergrade.captions.files import PictureFiles
from ambergrade.captions.lines import caption_lines, percentile_table
from ambergrade.captions.recipe import caption_line, explain
from ambergrade.captions.selection import select_rows
from ambergrade.captions.values import Array
from ambergrade.chain.dataset import draw_world
from ambergrade.chain.settings import DataPipelineSettings, Invocation
from ambergrade.errors import BadInput, BadSetting, UnknownName
from ambergrade.nouns import Post
from ambergrade.store import copy_file, find_file, written_aside


@dataclass(frozen=True)
class Curation:
    """The settings of one action, with what all actions need."""

    settings: DataPipelineSettings
    invocation: Invocation

    def booru(self) -> Booru:
        """Open the database. Raises BadSetting where none is named."""
        if self.settings.database is None:
            raise BadSetting(f"action={self.settings.action} needs database=FILE.")
        return open_booru(find_file(self.settings.database), self.settings.root / "mlruns" / "arrays")

    def selected(self, booru: Booru) -> Array:
        """Rows of the selection, both sides of the split."""
        return select_rows(booru, replace(self.settings.data.selection, split="all"))

    def out(self, example: str) -> Path:
        """Where to write. Raises BadSetting where that is not said."""
        if self.settings.out is None:
            raise BadSetting(f"action={self.settings.action} needs out: {example}")
        return self.settings.out


def run(settings: DataPipelineSettings, invocation: Invocation) -> None:
    """Do `settings.action`."""
    if settings.database == settings.data.database:  # where another is named, the world is not asked for
        draw_world(settings.data, settings.compute)
    ACTIONS[settings.action](Curation(settings, invocation))


def write_captions(curation: Curation) -> None:
    """Write `{"id": …, "caption": …}` a line, in ascending id, for the posts selected."""
    out = curation.out("out=FILE.jsonl")
    booru, recipe = curation.booru(), curation.settings.captions
    written, skipped = 0, []
    with written_aside(out) as aside, aside.open("w", encoding="utf-8") as file:
        for post, text in caption_lines(booru, recipe, curation.selected(booru)):
            if text is None:
                skipped.append(post)
                continue
            file.write(f'{{"id": {post}, "caption": {json.dumps(text, ensure_ascii=False)}}}\n')
            written += 1
    print(f"{written:,} captions by {recipe.name}: {out}")
    if skipped:
        some = ", ".join(map(str, skipped[:5])) + (", …" if len(skipped) > 5 else "")
        print(f"{len(skipped):,} posts left out, rating without a quality table (as the original does): {some}")


def explain_caption(curation: Curation) -> None:
    """Print every tag and property of one post, and the rule that put it where it is."""
    wanted = curation.settings.id
    if wanted is None:
        raise BadSetting("action=explain needs id: id=5000123")
    booru, recipe = curation.booru(), curation.settings.captions
    rows = booru.rows([wanted])
    if not len(rows):
        ids = booru.columns["id"]
        near = [str(ids[place]) for place in np.argsort(np.abs(ids - wanted))[:3]]
        span = f"ids run from {ids[0]} to {ids[-1]}" if len(ids) else "it is empty"
        raise UnknownName("In this database post", str(wanted), near, f"{len(booru):,} posts; {span}.")
    post = booru.post(int(rows[0]))
    print(f"post {post.id}, recipe {recipe.name}")
    try:
        print(caption_line(post, recipe))
    except BadInput as error:
        print(f"no caption: {error}")
    table = explain(post, recipe)
    widths = [max(len(row[column]) for row in table) for column in (0, 1)]
    for said, became, rule in table:
        print(f"  {said:<{widths[0]}}  {became:<{widths[1]}}  {rule}")


def print_percentiles(curation: Curation) -> None:
    """Print a recipe's `quality_table` for the database at hand, as yaml to put into a file of conf/captions."""
    settings, booru = curation.settings, curation.booru()
    recipe, asked = settings.captions, settings.percentiles
    metric = asked.metric or recipe.quality_metric
    table = percentile_table(booru, metric, recipe.quality_percentiles, first_id=asked.first_id, last_id=asked.last_id)
    lines = [
        f"# {metric} at P{', P'.join(map(str, recipe.quality_percentiles))}",
        f"# of {len(booru):,} posts of {settings.database}, ids {asked.first_id} to {asked.last_id or 'the last'}",
        f"# database {booru.fingerprint}",
        f"quality_metric: {metric}",
        f"quality_percentiles: {list(recipe.quality_percentiles)}",
        "quality_table:",
        *(f"  {rating}: [{', '.join(f'{value:g}' for value in row)}]" for rating, row in table.items()),
    ]
    text = "\n".join(lines) + "\n"
    if settings.out:
        with written_aside(settings.out) as aside:
            aside.write_text(text)
    print(text, end="")


def lint_pictures(curation: Curation) -> None:
    """Write the report page, the list of findings and the ids to leave out; with `database=null` of a bare folder."""
    from ambergrade.captions.lint import folder_posts, lint
    from ambergrade.captions.lint_report import write_report

    settings = curation.settings
    root = settings.root / "mlruns"
    out = settings.out or root / "lint"
    if settings.pictures is None:
        raise BadSetting("action=lint needs pictures=FOLDER.")
    folder = find_file(settings.pictures)
    files = PictureFiles(folder, index=root / "tars")
    if settings.database is None:
        posts: Iterable[Post] = folder_posts(folder)
        total = None
    else:
        booru = curation.booru()
        rows = curation.selected(booru)
        posts, total = booru.posts(rows), len(rows)
    bare = settings.database is None
    found = lint(posts, files, settings.limits, workers=settings.compute.workers, total=total, by_name=bare)
    write_report(found, files, out)
    print(found.text)
    print(f"report      {out / 'lint.html'}\nfindings    {out / 'findings.jsonl'}\nleave out   {out / 'leave_out.txt'}")


def build_manifests(curation: Curation) -> None:
    """Write the manifests that a training makes too, and say what became of every post."""
    from ambergrade.chain.context import Context, open_journal, record_command
    from ambergrade.chain.dataset import dataset
    from ambergrade.identity import digest
    from ambergrade.train.plan import cache_gb

    settings = curation.settings
    out = settings.out or settings.root / "mlruns" / "data"
    if settings.database is None or settings.pictures is None:
        raise BadSetting("action=build needs database=FILE and pictures=FOLDER.")
    data = replace(settings.data, database=settings.database, pictures=settings.pictures)
    journal = open_journal(settings.root, settings.name, settings, curation.invocation)
    key = digest([data, settings.captions, settings.family])
    with journal.run("build", key=key, kind="chain", params={"captions": settings.captions.name}) as run:
        record_command(run, settings, curation.invocation)
        context = Context(settings.root, journal, run, settings.compute)
        done = dataset(context, data, settings.captions, settings.family)
    for name, path in done.files.items():
        copy_file(path, out / name)
    for split, text in done.values["report"].items():
        print(f"{split}: {text}")
    pictures = sum(done.values["pictures"].values())
    resolution = settings.family.resolution
    print(f"latents of {pictures:,} pictures will take about {cache_gb(pictures, resolution=resolution):,.3g} GB")
    print(f"manifests   {out / 'train.jsonl'}  {out / 'heldout.jsonl'}")
    context.close()


ACTIONS: Mapping[str, Callable[[Curation], None]] = {
    "build": build_manifests,
    "lint": lint_pictures,
    "explain": explain_caption,
    "captions": write_captions,
    "percentiles": print_percentiles,
}
