"""What a sweep shows at its end: leaderboard, winner set and pictures, on the screen, on disk and in MLflow."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from common import cut

from ambergrade import config
from ambergrade.errors import BadInput
from ambergrade.generate.contact_sheet import contact_sheet, write_png
from ambergrade.identity import digest
from ambergrade.nouns import Prompt, PromptSet
from ambergrade.score.comparison import aggregates
from ambergrade.score.figures import Value, leaderboard_text
from ambergrade.score.review import Review, html_review
from ambergrade.score.sheet import ScoreSheet
from ambergrade.store import Finished, Ledger, find_file, written_aside
from ambergrade.track import ui
from ambergrade.track.journal import Journal, Run

ROWS = 30
"""Points on a contact sheet, the best ones."""
LONGEST = 30
"""Characters of a point's name before its numbers are rounded."""


@dataclass(frozen=True)
class Shown:
    """A review on disk."""

    review: Review
    folder: Path
    pictures: Mapping[str, Path]
    """What each shows to its PNG."""

    def page(self, **parts: Any) -> Path:
        """Write the page (parts: `html_review`) beside the pictures."""
        file = self.folder / "review.html"
        with written_aside(file) as aside:
            aside.write_text(html_review(self.review, self.pictures, **parts))
        return file

    def journal(self, run: Run, page: Path) -> None:
        """The page and the pictures on a run; a sweep that grew shows its pictures one step further."""
        for name, file in self.pictures.items():
            run.picture(name, file, step=len(self.review.points))
        run.file(page)


def closes(settings: dict[str, Any], sweep: Any, writes: Callable[..., dict[str, Any]]) -> None:
    """Review a sweep: print, draw, write the winner's checkpoint, and enter it all on the sweep's page in MLflow.

    `writes` is the hook of that name: it writes a point's merge, in the process that drew if there is one.
    """
    opened, journal, _ = sweep.around
    done = [trial for trial in sweep.trials if trial.outcome is not None and trial.outcome.status == "done"]
    grown = opened.done and any(not trial.before for trial in sweep.trials)  # it was finished by an earlier command
    run = journal.attached(opened.id, opened.name, opened.key) if grown else opened
    if sweep.race is not None:
        print(f"\nrace: {sweep.race.text}")
        run.tags({"race": sweep.race.text})
        done = [trial for trial in done if trial.label in sweep.race.alive]
    if not done:
        return
    objective, root = settings["search"]["objective"], Path(settings["root"])
    ledger = Ledger(root / "mlruns")
    named = _named(done)
    # What is not swept is equal by construction; a sweep over the sampler is there to compare unlike ones.
    sheets = {label: replace(_sheet(ledger, trial, sweep), sampler={}) for label, trial in named.items()}
    points = {label: _values(trial.point) for label, trial in named.items()}
    try:
        review = Review.of(sheets, points, title=run.name, objective=objective, columns=settings["leaderboard"])
    except BadInput as error:
        tell_unlike(run, journal, sweep.folder, sheets, settings, error)
        if grown:
            run.end("FINISHED")
        return
    if sweep.race is not None:  # its looks held all points at once; the finalists among themselves would be fewer
        review = replace(review, found=replace(review.found, members=tuple(named)))
    (sweep.folder / "leaderboard.txt").write_text(review.table + "\n")
    print(f"\n{review.table}", flush=True)
    best = review.found.best
    written = begin_writing(sweep, named[best], run, writes) if settings["write_winner"] else None
    strips = {label: _first(ledger, trial, sweep).files["pictures"] for label, trial in named.items()}
    prompts = PromptSet.read(find_file(settings["prompts"]["sweep"]), "sweep").first(settings["sheet"]).prompts
    shown = draw(review, sweep.folder, strips, prompts, settings["sampler"])

    facts = _facts(settings, sweep, review)
    recipe = _recipe(ledger, named[best], sweep)
    if written is not None:
        facts["checkpoint"] = str(enter_winner(run, review, **written()))
    kind = "rung" if sweep.race is not None else "point"
    higher = review.scores[best][objective].higher_is_better
    columns = {"params": list(points[best]), "metrics": settings["leaderboard"]}
    view = run.view("sweep", kind, order_by=objective, ascending=not higher, **columns)
    page = shown.page(
        facts={**facts, "dashboard": f"{ui.ui_command(root)} (the links need it)"},
        links=links_of(journal, run, view),
        recipe=recipe,
        command=command(),
        failures={trial.label: trial.outcome.error for trial in sweep.trials if trial.outcome.status == "failed"},
        out=_left_behind(sweep),
    )
    run.note(f"```\n{review.table}\n```")
    run.metrics({objective: review.scores[best][objective], "points": len(named)})
    run.tags({"winner": best, "winner_set": "; ".join(review.found.members)})
    run.text(recipe, "recipe.yaml")
    shown.journal(run, page)
    if grown:
        run.end("FINISHED")
    print(f"\nreview  {page}\nMLflow  {ui.ui_command(root)}")
    print(f"        {ui.deep_link(journal.experiment_id, view=view)}", flush=True)


def tell_unlike(
    run: Run,
    journal: Journal,
    folder: Path,
    sheets: Mapping[str, ScoreSheet],
    settings: Mapping[str, Any],
    reason: BadInput,
) -> None:
    """The leaderboard of points that cannot be paired, as of a sweep over prompts: each with its own interval."""
    scores = {label: aggregates(sheet) for label, sheet in sheets.items()}
    asked = dict.fromkeys([settings["search"]["objective"], *settings["leaderboard"]])
    columns = [name for name in asked if any(name in found for found in scores.values())]
    rows, _, _ = leaderboard_text(scores, columns).rpartition("\n\n")
    table = f"{rows}\n\nbest first by {columns[0]}, 95 % intervals\n\nNo winner set: {reason}"
    (folder / "leaderboard.txt").write_text(table + "\n")
    run.note(f"```\n{table}\n```")
    higher = next(found[columns[0]].higher_is_better for found in scores.values() if columns[0] in found)
    view = run.view("sweep", "point", order_by=columns[0], ascending=not higher, params=[], metrics=columns)
    print(f"\n{table}\n\nMLflow  {ui.ui_command(Path(settings['root']))}")
    print(f"        {ui.deep_link(journal.experiment_id, view=view)}", flush=True)


def draw(
    review: Review,
    folder: Path,
    strips: Mapping[str, Path],
    prompts: Sequence[Prompt],
    sampler: Mapping[str, Any],
    *,
    card: tuple[Value, Value] | None = None,
) -> Shown:
    """The pictures that suit a sweep's axes, and a contact sheet of its best points.

    `strips`: label to the file with the pictures of `prompts`, side by side.
    """
    pictures = review.draw(folder, card=card)
    rows = review.best_first[:ROWS]
    which = f"the {ROWS} best of {len(review.points)} points" if len(rows) < len(review.points) else "best first"
    notes = {}
    for label in rows:
        score = review.scores[label][review.objective]
        notes[label] = f"{review.objective} {score.value:.3f}\n{score.low:.3f} to {score.high:.3f}"
        if label != review.found.best and label in review.found.members:
            notes[label] += "\ncannot be told from the best"
    pictures["contact sheet"] = folder / "contact_sheet.png"
    sheet_of(
        {label: strips[label] for label in rows},
        prompts,
        sampler,
        pictures["contact sheet"],
        title=review.title,
        subtitle=f"{which}; the same prompts and seeds in every row",
        notes=notes,
        marked=review.found.best,
    )
    return Shown(review, folder, pictures)


def sheet_of(
    strips: Mapping[str, Path],
    prompts: Sequence[Prompt],
    sampler: Mapping[str, Any],
    path: Path,
    *,
    title: str,
    subtitle: str,
    notes: Mapping[str, str],
    marked: str,
) -> None:
    """A contact sheet, one row a strip of pictures and one column a prompt."""
    rows = {
        label: {prompt.id: pixels for prompt, pixels in zip(prompts, cut(strip, sampler["width"]), strict=False)}
        for label, strip in strips.items()
    }
    tags = {prompt.id: ", ".join(tag.replace("_", " ") for tag in prompt.tags) or prompt.text for prompt in prompts}
    drawn = contact_sheet(
        rows,
        title=title,
        subtitle=f"{subtitle}, {sampler['steps']} {sampler['name']} steps",
        captions=tags,
        notes=notes,
        marked=[marked],
        side=256 if len(rows) <= 6 else 160,
    )
    write_png(path, drawn)


def begin_writing(
    sweep: Any, winner: Any, run: Run, writes: Callable[..., dict[str, Any]]
) -> Callable[[], dict[str, Any]]:
    """Begin to write the winner's merge as one file, once; the result waits for what the run enters as its model."""
    about = {"id": run.id, "name": run.name, "key": run.key}
    given = (config.plain(sweep.composed(winner)), about, sweep.folder)
    if sweep.worker is None:
        return lambda: writes(*given)
    sweep.worker.call("writes", *given)
    found: Callable[[], dict[str, Any]] = sweep.worker.answer
    return found


def enter_winner(run: Run, review: Review, *, name: str, path: Path, digest: str, **about: Any) -> Path:
    """Enter the winner as the sweep's model, with what it was made of and its scores."""
    scores = review.scores[review.found.best]
    metrics = {column: scores[column] for column in review.columns if column in scores}
    run.model(name, path, digest, kind="merge", metrics=metrics, **about)
    return path


def links_of(journal: Journal, run: Run, view: str) -> dict[str, str]:
    """Addresses of a sweep in MLflow's UI; none where nothing is journaled."""
    if not run.id:
        return {}
    number = journal.experiment_id
    return {
        "leaderboard in MLflow": ui.deep_link(number, view=view),
        "pictures side by side": ui.deep_link(number, view=view, chart=True),
        "the sweep's run": ui.run_link(number, run.id),
    }


def command() -> str:
    """The command line that this process was started by."""
    given = sys.orig_argv[1:]  # sys.argv holds what was handed to Hydra
    inside = f"{config.REPOSITORY}/"
    return shlex.join(["python", *(word.removeprefix(inside) for word in given)])


def _named(trials: Sequence[Any]) -> dict[str, Any]:
    """Trials by their names; sampled numbers rounded to be read, unless that makes two alike."""
    if all(len(trial.label) <= LONGEST for trial in trials):
        return {trial.label: trial for trial in trials}
    rounded = {", ".join(f"{name} {_read(value)}" for name, value in _values(t.point).items()): t for t in trials}
    return rounded if len(rounded) == len(trials) else {trial.label: trial for trial in trials}


def _read(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"


def _values(point: Mapping[str, Any]) -> dict[str, Value]:
    """A point by the last part of each override's key (the whole where two end alike); numbers as numbers."""
    short = {key: key.rpartition(".")[2] for key in point}
    return {
        (short[key] if list(short.values()).count(short[key]) == 1 else key): _number(value)
        for key, value in point.items()
    }


def _number(value: Any) -> Value:
    try:
        return str(value) if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return str(value)


def _facts(settings: Mapping[str, Any], sweep: Any, review: Review) -> dict[str, str]:
    done = [trial for trial in sweep.trials if trial.outcome.status == "done"]
    found, kept = review.found, review.scores[review.found.best][review.objective]
    facts = {
        "winner": f"{found.best}: {review.objective} {kept.value:.3f} [{kept.low:.3f}, {kept.high:.3f}]",
        "winner set": f"{len(found.members)} of {len(review.points)} points cannot be told from the best",
        "formula": settings["merge"]["formula"],
        "swept": "; ".join(f"{key} = {_told(sweep.plan.spec(key))}" for key in sweep.plan.axes),
        "points": f"{len(done)} done, {len(sweep.trials) - len(done)} failed",
        "prompts": f"{kept.n}, each with its own seed",
    }
    return facts | ({"race": sweep.race.text} if sweep.race is not None else {})


def _told(spec: Any) -> str:
    if isinstance(spec, Mapping):
        more = [f"{key} {value}" for key, value in spec.items() if key not in ("low", "high")]
        return ", ".join([f"{spec['low']:g} to {spec['high']:g}", *more])
    return ", ".join(map(str, spec))


def _left_behind(sweep: Any) -> dict[str, str]:
    """Of a race: when each point fell behind, and its mean until then."""
    if sweep.race is None:
        return {}
    told = {}
    for label, rung in sweep.race.out.items():
        mean = float(np.nanmean(sweep.race.rows(label)))
        told[label] = f"after {sweep.race.rungs[rung]} prompts, with a mean of {mean:.3f} on them"
    return told | dict.fromkeys(sweep.race.screened, "by cheap pictures, before the race")


def _recipe(ledger: Ledger, trial: Any, sweep: Any) -> str:
    kind, identity = _filed(trial, sweep)
    record = json.loads((ledger.root / "records" / kind / f"{identity}.json").read_text())
    return yaml.safe_dump(record["settings"]["recipe"], sort_keys=False, allow_unicode=True)


def _first(ledger: Ledger, trial: Any, sweep: Any) -> Finished:
    """The record with the point's first pictures."""
    done = ledger.find(*_filed(trial, sweep))
    assert done is not None, trial.label
    return done


def _filed(trial: Any, sweep: Any) -> tuple[str, str]:
    """Stage and identity in the ledger; of a race those of the first rung."""
    if sweep.race is None:
        return "point", trial.outcome.value["identity"]
    rung = replace(trial, block=(0, sweep.race.rungs[0]))
    assert rung.recall(), trial.label
    return "rung", rung.outcome.value["identity"]


def _sheet(ledger: Ledger, trial: Any, sweep: Any) -> ScoreSheet:
    """A point's sheet; of a race the rungs' sheets joined."""
    if sweep.race is None:
        return ScoreSheet.read(ledger.store.path(trial.outcome.value["sheet"]))
    parts = []
    for start, stop in zip((0, *sweep.race.rungs), sweep.race.rungs, strict=False):
        rung = replace(trial, block=(start, stop))
        if rung.recall() and rung.outcome is not None:
            parts.append(ScoreSheet.read(ledger.store.path(rung.outcome.value["sheet"])))
    return joined(parts)


def joined(sheets: Sequence[ScoreSheet]) -> ScoreSheet:
    """Sheets of different prompts by the same scorers as one."""
    first = sheets[0]
    return replace(
        first,
        prompt_ids=tuple(one for sheet in sheets for one in sheet.prompt_ids),
        seeds=tuple(one for sheet in sheets for one in sheet.seeds),
        columns={name: np.concatenate([sheet.columns[name] for sheet in sheets]) for name in first.columns},
        features={name: np.concatenate([sheet.features[name] for sheet in sheets]) for name in first.features},
        prompts_digest=digest([sheet.prompts_digest for sheet in sheets]),
        faults={key: reason for sheet in sheets for key, reason in sheet.faults.items()},
        blank=tuple(key for sheet in sheets for key in sheet.blank),
    )
