"""What a chain says at its end: the winner set, the held-out comparison, the release and its page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from gating import gate
from reviewing import Shown, command, draw, links_of, sheet_of
from stages import Chain, Merger, Point, evaluate, filed_under, label_of, read_prompts, write_merge

from ambergrade.identity import digest
from ambergrade.nouns import CaptionSet, Checkpoint, PromptSet, Release
from ambergrade.release.build import build as build_release
from ambergrade.release.gate import Judgement
from ambergrade.score import figures
from ambergrade.score.comparison import aggregates, differences
from ambergrade.score.html import picture
from ambergrade.score.review import Review
from ambergrade.score.sheet import ScoreSheet
from ambergrade.store import Ledger
from ambergrade.track import ui
from ambergrade.train.settings import TrainSettings


@dataclass(frozen=True)
class Verdict:
    """What the sweep says."""

    names: tuple[str, ...]
    """Of the coefficients, in the order of the points' values."""
    best: tuple[float, ...]
    members: tuple[tuple[float, ...], ...]
    """The winner set: points that cannot be told from the best."""
    table: str
    shown: Shown
    """The review's pictures."""

    @property
    def heat_map(self) -> Path | None:
        return self.shown.pictures.get("heat map")


def judge(chain: Chain, merger: Merger, sheets: Mapping[tuple[float, ...], ScoreSheet], folder: Path) -> Verdict:
    """The winner set, the leaderboard and the pictures of a sweep."""
    names = tuple(chain.settings["search"]["values"])
    objective = chain.settings["search"]["objective"]
    labels = {label_of(dict(zip(names, point, strict=True))): point for point in sheets}
    review = Review.of(
        {label: sheets[point] for label, point in labels.items()},
        {label: dict(zip(names, point, strict=True)) for label, point in labels.items()},
        title=f"{chain.settings['merge']['formula']}",
        objective=objective,
        columns=chain.settings["leaderboard"],
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "leaderboard.txt").write_text(review.table + "\n")
    prompts = read_prompts(chain, "sweep")
    strips = {label: _strip(chain, merger, review.points[label], prompts) for label in labels}
    card = tuple(chain.settings["merge"]["coefficients"][name] for name in names)
    marked = (card[0], card[1]) if len(card) == 2 else None
    chosen = prompts.first(chain.settings["sheet"]).prompts
    shown = draw(review, folder / "sweep", strips, chosen, chain.settings["sampler"], card=marked)
    best, members = labels[review.found.best], tuple(labels[label] for label in review.found.members)
    return Verdict(names, best, members, review.table, shown)


def _strip(chain: Chain, merger: Merger, point: Point, prompts: PromptSet) -> Path:
    """The file with a point's first pictures."""
    kind, about, inputs = filed_under(chain, merger, point, prompts)
    done = chain.ledger.find(kind, Ledger.identity(kind, 1, about, inputs))
    assert done is not None, label_of(point)
    return done.files["pictures"]


@dataclass(frozen=True)
class Finalists:
    """The last word: held-out prompts, the winner against the base, the card's point and the fine-tune."""

    sheets: Mapping[str, ScoreSheet]
    """By label, the winner's first."""
    prompts: PromptSet
    text: str
    contact_sheet: Path


def finalists(
    chain: Chain, merger: Merger, models: Mapping[str, Checkpoint], verdict: Verdict, prompts: PromptSet, folder: Path
) -> Finalists:
    """Score the winner anew on prompts it was not chosen on, beside what it is compared with."""
    settings = chain.settings
    winner = dict(zip(verdict.names, verdict.best, strict=True))
    card, objective = settings["merge"]["coefficients"], settings["search"]["objective"]
    first = f"winner: {label_of(winner)}"
    entered: dict[str, tuple[Merger, Point]] = {first: (merger, winner)}
    if card != winner:
        entered[f"card: {label_of(card)}"] = (merger, card)
    for name in (settings["base"], settings["trained"]):
        entered[name] = (Merger(chain, models, formula=name), {})
    done = {
        label: evaluate(chain, made, point, prompts, label, f"held out: {label}")
        for label, (made, point) in entered.items()
    }
    sheets = {label: ScoreSheet.read(found.files["scores"]) for label, found in done.items()}
    named = settings["leaderboard"]
    table = figures.leaderboard_text(
        {label: aggregates(sheet) for label, sheet in sheets.items()}, named, winner=first, chosen="the sweep's winner"
    )
    apart = differences(sheets[first], sheets[settings["base"]])
    lines = [f"Held-out prompts ({len(prompts.prompts)}):", table, "", f"Winner minus {settings['base']}, paired:"]
    for name in named:
        found = apart[name]
        lines.append(f"  {name:<24}{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]  {found.verdict}")
    text = "\n".join(lines)
    (folder / "heldout.txt").write_text(text + "\n")
    sheet_of(
        {label: made.files["pictures"] for label, made in done.items()},
        prompts.first(settings["sheet"]).prompts,
        settings["sampler"],
        folder / "contact_sheet.png",
        title=f"{settings['release']['name']} {settings['release']['version']}",
        subtitle=f"{prompts.name} prompts, one seed a column",
        notes={
            label: f"{objective} {made.values['aggregates'][objective]['value']:.3f}" for label, made in done.items()
        },
        marked=first,
    )
    figures.interval_plot(
        {name: {first: apart[name]} for name in named}, folder / "differences.png", baseline=settings["base"]
    )
    return Finalists(sheets, prompts, text, folder / "contact_sheet.png")


def publish(
    chain: Chain,
    merger: Merger,
    verdict: Verdict,
    final: Finalists,
    models: Mapping[str, Checkpoint],
    captions: CaptionSet,
) -> tuple[Release, dict[str, Judgement]]:
    """Write the winner's checkpoint once, build its release folder, register the model; and what the gates say."""
    winner = dict(zip(verdict.names, verdict.best, strict=True))
    merged, done = write_merge(chain, merger, winner, final.contact_sheet.parent)
    made = release(chain, merger, merged, verdict, final, captions, models)
    about = chain.settings["release"]
    identity = digest([made.digest, done.identity])
    with chain.journal.run(
        f"release {about['version']}", key=identity, kind="release", parent=chain.parent, params=winner
    ) as run:
        if not run.done:
            scores = aggregates(next(iter(final.sheets.values())))
            run.metrics(scores)
            run.tags({"release.sha256": made.digest})
            for name in ("README.md", "recipe.yaml", "evaluation.json", "MANIFEST.json"):
                run.file(made.path / name)
            run.picture("contact sheet", final.contact_sheet)
            card = (made.path / "README.md").read_text().partition("---\n\n")[2]
            run.note("\n".join(line for line in card.splitlines() if not line.startswith("![")))
            run.model(
                about["name"],
                merged.path,
                merged.digest,
                parents=merger.inputs,
                registered_as=about["name"],
                aliases=["candidate"],
                note=f"{about['version']}: {merger.formula.text} at {label_of(winner)}",
                params=winner,
                metrics=scores,
            )
    print(f"  {'release':<34}{'':<18}{made.digest[:12]}", flush=True)
    sheet, base = next(iter(final.sheets.values())), final.sheets[chain.settings["base"]]
    return made, gate(chain, merged, sheet, base, final.prompts, _tiny(chain.settings, sheet))


def close(chain: Chain, verdict: Verdict, final: Finalists, made: Release) -> tuple[str, Path]:
    """What the chain's own page in MLflow shows; returns the key of its saved view, and the review's page."""
    run, settings = chain.parent, chain.settings
    run.metrics(aggregates(next(iter(final.sheets.values()))))
    run.picture("held-out contact sheet", final.contact_sheet)
    run.tags({"release.sha256": made.digest})
    run.note(f"```\n{verdict.table}\n\n{final.text}\n```")
    objective, review = settings["search"]["objective"], verdict.shown.review
    columns = {"params": list(verdict.names), "metrics": settings["leaderboard"]}
    higher = review.scores[review.found.best][objective].higher_is_better
    view = run.view("sweep", "point", order_by=objective, ascending=not higher, **columns)
    about = settings["release"]
    page = verdict.shown.page(
        facts={
            "release": f"{about['name']} {about['version']}, sha256 {made.digest}",
            "files": str(made.path),
            "base": settings["base"],
            "trained": f"{settings['trained']}, captions {settings['captions']['name']}",
            "winner set": f"{len(verdict.members)} of {len(review.points)} points cannot be told from the best",
            "prompts": f"{review.scores[review.found.best][objective].n} for the sweep, each with its own seed; "
            f"{len(final.prompts.prompts)} others for the last word",
            "dashboard": f"{ui.ui_command(Path(settings['root']))} (the links need it)",
        },
        links=links_of(chain.journal, run, view),
        recipe=(made.path / "recipe.yaml").read_text(),
        command=command(),
        more=[
            f"<h2>On prompts it was not chosen on</h2><pre>{escape(final.text)}</pre>",
            picture(final.contact_sheet.parent / "differences.png", "The winner against the base."),
            picture(final.contact_sheet, "Held-out prompts: the same seeds in every row."),
        ],
    )
    verdict.shown.journal(run, page)
    return view, page


def release(
    chain: Chain,
    merger: Merger,
    merged: Checkpoint,
    verdict: Verdict,
    final: Finalists,
    captions: CaptionSet,
    models: Mapping[str, Checkpoint],
) -> Release:
    """The release folder of the winner."""
    settings = chain.settings
    point = dict(zip(verdict.names, verdict.best, strict=True))
    recipe = merger.recipe(point).document
    base, trained, about = settings["base"], settings["trained"], settings["release"]
    winner = next(iter(final.sheets.values()))
    named = settings["leaderboard"]
    apart = differences(winner, final.sheets[base])
    scored = {label: aggregates(sheet) for label, sheet in final.sheets.items()}
    evaluation = {
        "prompts": {"name": final.prompts.name, "count": winner.n, "digest": final.prompts.digest},
        "sampler": asdict(chain.sampler),
        "objective": settings["search"]["objective"],
        "scores": {name: {label: scores[name] for label, scores in scored.items()} for name in named},
        "differences": {name: {base: apart[name]} for name in named},
        "winner_set": [dict(zip(verdict.names, member, strict=True)) for member in verdict.members],
        "scorers": {
            name: {"fingerprint": digest(made_of), "tiny": _tiny(settings, winner)[name]}
            for name, made_of in winner.fingerprints.items()
        },
    }
    trainer = TrainSettings.read(settings["trainer"])
    training = {
        "trained": f"{trained} from {base}",
        "learning rates": dict(trainer.lr),
        "schedule": dict(trainer.schedule),
        "batch": f"{trainer.batch} = micro {trainer.micro} × accumulation {trainer.accumulation(1)} × 1 process",
        "images seen": trainer.images,
        "pictures": len(captions.pictures),
        "optimizer": dict(trainer.optimizer),
        "precision": trainer.precision,
    }
    return build_release(
        Path(about["folder"]),
        name=about["name"],
        version=about["version"],
        license=about["license"],
        config=settings["family"]["config"],
        checkpoint=merged.path,
        recipe={
            "formula": settings["merge"]["formula"],
            "coefficients": point,
            "models": {alias: {"sha256": sha256} for alias, sha256 in recipe["inputs"].items()},
            "family": settings["family"]["name"],
            "dtype": recipe["dtype"] or "the base's precision",
            "policies": recipe["policies"],
            "weights": merged.digest,
        },
        evaluation=evaluation,
        training=training,
        captions={"recipe": captions.recipe, "manifest": captions.digest},
        contact_sheet=final.contact_sheet,
        heat_map=verdict.heat_map,
        lineage={trained: {"base": models[base].digest, "captions": captions.digest}, "inputs": recipe["inputs"]},
        summary=about["summary"],
    )


def _tiny(settings: Mapping[str, Any], sheet: ScoreSheet) -> dict[str, bool]:
    """Scorer to whether it is one of the embedded world's."""
    chosen = settings["suite"]["metrics"]
    return {
        name: any(str(value).startswith("builtin://") for value in chosen[name].values()) for name in sheet.fingerprints
    }
