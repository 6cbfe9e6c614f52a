"""What a chain says at its end: the winner set, the held-out comparison, the release and its page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages import Chain, Merger, Point, cut, evaluate, label_of, write_merge

from ambergrade.generate.contact_sheet import contact_sheet, write_png
from ambergrade.identity import digest
from ambergrade.nouns import CaptionSet, Checkpoint, PromptSet, Release
from ambergrade.release.build import build as build_release
from ambergrade.score import figures
from ambergrade.score.comparison import aggregates, differences, winners
from ambergrade.score.sheet import ScoreSheet
from ambergrade.store import Finished
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
    heat_map: Path


def judge(chain: Chain, sheets: Mapping[tuple[float, ...], ScoreSheet], folder: Path) -> Verdict:
    """The winner set, the leaderboard and the heat map of a sweep."""
    names = tuple(chain.settings["search"]["values"])
    objective = chain.settings["search"]["objective"]
    labels = {label_of(dict(zip(names, point, strict=True))): point for point in sheets}
    found = winners({label: sheets[point] for label, point in labels.items()}, objective)
    best, members = labels[found.best], tuple(labels[label] for label in found.members)
    rows = {label: aggregates(sheets[point]) for label, point in labels.items()}
    table = figures.leaderboard_text(rows, chain.settings["leaderboard"], winner=found.best, winner_set=found.members)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "leaderboard.txt").write_text(table + "\n")
    scores = {point: rows[label][objective] for label, point in labels.items()}
    card = tuple(chain.settings["merge"]["coefficients"][name] for name in names)
    if len(names) == 2:
        figures.heat_map(
            {(p[0], p[1]): value.value for p, value in scores.items()},
            folder / "heat_map.png",
            title=f"{chain.settings['merge']['formula']}",
            score_name=objective,
            axes=(names[0], names[1]),
            low={(p[0], p[1]): value.low for p, value in scores.items()},
            high={(p[0], p[1]): value.high for p, value in scores.items()},
            card=(card[0], card[1]),
            winner=(best[0], best[1]),
            winner_set=[(p[0], p[1]) for p in members],
        )
    return Verdict(names, best, members, table, folder / "heat_map.png")


def sheet_of_points(chain: Chain, points: Mapping[str, Finished], prompts: PromptSet, marked: str, path: Path) -> None:
    """The contact sheet: one row a point, one column a prompt, the same seeds in every row."""
    shown = prompts.first(chain.settings["sheet"]).prompts
    rows, notes = {}, {}
    objective = chain.settings["search"]["objective"]
    for label, done in points.items():
        strips = cut(done.files["pictures"], chain.sampler.width)
        rows[label] = {prompt.id: pixels for prompt, pixels in zip(shown, strips, strict=True)}
        found = done.values["aggregates"]
        notes[label] = f"{objective} {found[objective]['value']:.3f}"
    captions = {prompt.id: ", ".join(tag.replace("_", " ") for tag in prompt.tags) for prompt in shown}
    drawn = contact_sheet(
        rows,
        title=f"{chain.settings['release']['name']} {chain.settings['release']['version']}",
        subtitle=f"{prompts.name} prompts, one seed a column, {chain.sampler.steps} {chain.sampler.name} steps",
        captions=captions,
        notes=notes,
        marked=[marked],
    )
    write_png(path, drawn)


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
    card = settings["merge"]["coefficients"]
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
    table = figures.leaderboard_text({label: aggregates(sheet) for label, sheet in sheets.items()}, named, winner=first)
    apart = differences(sheets[first], sheets[settings["base"]])
    lines = [f"Held-out prompts ({len(prompts.prompts)}):", table, "", f"Winner minus {settings['base']}, paired:"]
    for name in named:
        found = apart[name]
        lines.append(f"  {name:<24}{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]  {found.verdict}")
    text = "\n".join(lines)
    (folder / "heldout.txt").write_text(text + "\n")
    sheet_of_points(chain, done, prompts, first, folder / "contact_sheet.png")
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
) -> Release:
    """Write the winner's checkpoint once, build its release folder, and register the model."""
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
    return made


def close(chain: Chain, verdict: Verdict, final: Finalists, made: Release) -> str:
    """What the chain's own page in MLflow shows; returns the key of its saved view."""
    run, settings = chain.parent, chain.settings
    run.metrics(aggregates(next(iter(final.sheets.values()))))
    run.picture("heat map", verdict.heat_map)
    run.picture("contact sheet", final.contact_sheet)
    run.tags({"release.sha256": made.digest})
    run.note(f"```\n{verdict.table}\n\n{final.text}\n```")
    objective = settings["search"]["objective"]
    return run.view("sweep", "point", order_by=objective, params=list(verdict.names), metrics=settings["leaderboard"])


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
    evaluation = {
        "prompts": {"name": final.prompts.name, "count": winner.n, "digest": final.prompts.digest},
        "sampler": asdict(chain.sampler),
        "objective": settings["search"]["objective"],
        "scores": {name: {label: aggregates(sheet)[name] for label, sheet in final.sheets.items()} for name in named},
        "differences": {name: {base: apart[name]} for name in named},
        "winner_set": [dict(zip(verdict.names, member, strict=True)) for member in verdict.members],
        "scorers": {
            name: {"fingerprint": digest(made_of), "tiny": _is_tiny(settings["suite"]["metrics"][name])}
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
        heat_map=verdict.heat_map if len(verdict.names) == 2 else None,
        lineage={trained: {"base": models[base].digest, "captions": captions.digest}, "inputs": recipe["inputs"]},
        summary=about["summary"],
    )


def _is_tiny(metric: Mapping[str, Any]) -> bool:
    return any(isinstance(value, str) and value.startswith("builtin://") for value in metric.values())
