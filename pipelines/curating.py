"""What pipelines/data.py does, action by action; heavy imports only where an action needs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ambergrade import config
from ambergrade.captions.booru import Booru, open_booru
from ambergrade.captions.files import PictureFiles
from ambergrade.captions.lines import caption_lines, percentile_table
from ambergrade.captions.readers import Array
from ambergrade.captions.recipe import CaptionRecipe, caption_line, explain
from ambergrade.captions.selection import Selection, select_rows
from ambergrade.errors import BadInput, BadSetting, UnknownName
from ambergrade.store import find_file, link_or_copy, written_aside


def run(settings: dict[str, Any]) -> None:
    """Do `settings.action`. Raises what the rooms raise, for the door to tell."""
    draw_world(settings)
    actions = {"build": build, "lint": lint, "explain": explained, "captions": captions, "percentiles": percentiles}
    actions[settings["action"]](settings)


def draw_world(settings: dict[str, Any]) -> None:
    """The embedded world's pictures, where the data are its own and no other database is named."""
    if settings["data"]["draw"] and settings["database"] == settings["data"]["database"]:
        import stages

        stages.draw_world(settings)


def captions(settings: dict[str, Any]) -> None:
    """`{"id": …, "caption": …}` a line, in ascending id, for the posts selected (all, unless a selection is given)."""
    out = needed(settings, "out", "out=FILE.jsonl")
    booru, recipe = opened(settings), CaptionRecipe.from_dict(settings["captions"])
    written, skipped = 0, []
    with written_aside(Path(out)) as aside, aside.open("w") as file:
        for post, text in caption_lines(booru, recipe, selected(booru, settings)):
            if text is None:
                skipped.append(post)
                continue
            file.write(f'{{"id": {post}, "caption": {json.dumps(text, ensure_ascii=False)}}}\n')
            written += 1
    print(f"{written:,} captions by {recipe.name}: {out}")
    if skipped:
        some = ", ".join(map(str, skipped[:5])) + (", …" if len(skipped) > 5 else "")
        print(f"{len(skipped):,} posts left out, rating without a quality table (as the original does): {some}")


def explained(settings: dict[str, Any]) -> None:
    """Every tag and property of one post, and the rule that put it where it is."""
    wanted = needed(settings, "id", "id=5000123")
    booru, recipe = opened(settings), CaptionRecipe.from_dict(settings["captions"])
    rows = booru.rows([int(wanted)])
    if not len(rows):
        ids = booru.columns["id"]
        near = [str(ids[place]) for place in np.argsort(np.abs(ids - int(wanted)))[:3]]
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


def percentiles(settings: dict[str, Any]) -> None:
    """A recipe's `quality_table` for the database at hand, as yaml to put into a file of conf/captions."""
    booru, recipe, asked = opened(settings), CaptionRecipe.from_dict(settings["captions"]), settings["percentiles"]
    metric = asked["metric"] or recipe.quality_metric
    if metric not in ("score", "fav_count"):
        raise UnknownName("percentiles.metric", str(metric), ("score", "fav_count"))
    span = {"first_id": asked["first_id"], "last_id": asked["last_id"]}
    table = percentile_table(booru, metric, recipe.quality_percentiles, **span)
    ids = f"{span['first_id']} to {span['last_id'] or 'the last'}"
    lines = [
        f"# {metric} at P{', P'.join(map(str, recipe.quality_percentiles))}",
        f"# of {len(booru):,} posts of {settings['database']}, ids {ids}",
        f"# database {booru.fingerprint}",
        f"quality_metric: {metric}",
        f"quality_percentiles: {list(recipe.quality_percentiles)}",
        "quality_table:",
        *(f"  {rating}: [{', '.join(f'{value:g}' for value in row)}]" for rating, row in table.items()),
    ]
    text = "\n".join(lines) + "\n"
    if settings["out"]:
        with written_aside(Path(settings["out"])) as aside:
            aside.write_text(text)
    print(text, end="")


def lint(settings: dict[str, Any]) -> None:
    """The report page, the list of findings and the ids to leave out; with `database=null` of a bare folder."""
    from ambergrade.captions import lint as linting
    from ambergrade.captions.lint_report import write_report

    root = Path(settings["root"]) / "mlruns"
    out = Path(settings["out"] or root / "lint")
    folder = find_file(str(settings["pictures"]))
    limits = config.settings(linting.Limits, settings["limits"], where="limits")
    files = PictureFiles(folder, index=root / "tars")
    if settings["database"] is None:
        posts, total = linting.folder_posts(folder), None
    else:
        booru = opened(settings)
        rows = selected(booru, settings)
        posts, total = booru.posts(rows), len(rows)
    found = linting.lint(posts, files, limits, workers=settings["compute"]["workers"], total=total)
    write_report(found, files, out)
    print(found.text)
    print(f"report      {out / 'lint.html'}\nfindings    {out / 'findings.jsonl'}\nleave out   {out / 'leave_out.txt'}")


def build(settings: dict[str, Any]) -> None:
    """The manifests that train.py makes too: `train.jsonl`, `heldout.jsonl`, and what became of every post."""
    import preparing
    import stages
    from recording import record

    from ambergrade.identity import digest
    from ambergrade.track.journal import Journal
    from ambergrade.train.plan import cache_gb

    out = Path(settings["out"] or Path(settings["root"]) / "mlruns" / "data")
    settings["data"] |= {"database": settings["database"], "pictures": settings["pictures"]}
    journal = Journal.open(Path(settings["root"]), settings["name"])
    about = {key: settings[key] for key in ("data", "captions", "family")}
    with journal.run(
        "build", key=digest(about), kind="chain", params={"captions": settings["captions"]["name"]}
    ) as run:
        record(run, settings)
        done = preparing.dataset_stage(stages.Chain(settings, journal, run))
    for name, path in done.files.items():
        link_or_copy(path, out / name)
    for split, text in done.values["report"].items():
        print(f"{split}: {text}")
    pictures = sum(done.values["pictures"].values())
    resolution = settings["family"]["resolution"]
    print(f"latents of {pictures:,} pictures will take about {cache_gb(pictures, resolution=resolution):,.3g} GB")
    print(f"manifests   {out / 'train.jsonl'}  {out / 'heldout.jsonl'}")


def opened(settings: dict[str, Any]) -> Booru:
    if settings["database"] is None:
        raise BadSetting(f"action={settings['action']} needs database=FILE.")
    return open_booru(find_file(str(settings["database"])), Path(settings["root"]) / "mlruns" / "arrays")


def selected(booru: Booru, settings: dict[str, Any]) -> Array:
    """Rows of the selection, both sides of the split."""
    chosen = config.settings(Selection, {**settings["data"]["selection"], "split": "all"}, where="data.selection")
    return select_rows(booru, chosen)


def needed(settings: dict[str, Any], key: str, example: str) -> Any:
    if settings[key] is None:
        raise BadSetting(f"action={settings['action']} needs {key}: {example}")
    return settings[key]
