"""Tells the Gamma story: captions, base7, the sweep over the merge, the last word on held-out prompts, the release."""

from __future__ import annotations

from dataclasses import asdict, replace
from html import escape
from pathlib import Path

from ambergrade.chain.context import Context, open_journal, record_command, use_threads
from ambergrade.chain.dataset import dataset, draw_world, read_sets
from ambergrade.chain.gates import judge_candidate
from ambergrade.chain.heldout import Finalists, compare_finalists
from ambergrade.chain.point import (
    LiveMerge,
    LiveNetworks,
    Point,
    Scoring,
    find_originals,
    label_of,
    open_checkpoint,
    read_prompts,
)
from ambergrade.chain.release import merged, publish, training
from ambergrade.chain.review import Shown, draw, links_of
from ambergrade.chain.settings import GammaSettings, Invocation, SweepSettings
from ambergrade.chain.sweep import SweepResult, keep_best, reviewed, run_sweep
from ambergrade.chain.training import Subject, flat, train
from ambergrade.identity import digest
from ambergrade.merge.formula import Formula
from ambergrade.nouns import Checkpoint, Release
from ambergrade.release.facts import Origin
from ambergrade.release.gate import insist, load_gates
from ambergrade.release.licenses import derive
from ambergrade.score.comparison import aggregates
from ambergrade.score.html import picture
from ambergrade.store import find_file
from ambergrade.track import ui


def run(settings: GammaSettings, invocation: Invocation) -> None:
    """Run the whole chain. Raises Refused at the end where a gate does not pass and `insist` is set."""
    paths = {alias: find_file(source) for alias, source in settings.models.items() if source}
    load_gates({label: one.as_mapping for label, one in settings.gates.items()})
    origins = {settings.trained: _origin_of_trained(settings), **settings.origins}
    formula = Formula.parse(settings.merge.formula, {**settings.models, settings.trained: ""})
    derive({alias: origins.get(alias, Origin()).license for alias in formula.models}, settings.release.license)
    use_threads(settings.compute)
    title = f"{settings.release.name} {settings.release.version}"
    journal = open_journal(settings.root, settings.name, settings, invocation)
    key = digest({name: value for name, value in vars(settings).items() if name not in _WHERE})
    with journal.run(title, key=key, kind="chain", params=_parameters(settings)) as parent:
        print(f"{title}, {settings.root / 'mlruns'}")
        print(f"  {'stage':<34}{'time':>10}{'':8}record")
        draw_world(settings.data, settings.compute)
        record_command(parent, settings, invocation)
        context = Context(settings.root, journal, parent, settings.compute)
        sets = read_sets(dataset(context, settings.data, settings.captions, settings.family))
        parent.datasets({"captions": sets[0].digest, "held out": sets[1].digest})

        models = {alias: open_checkpoint(path, settings.family.name) for alias, path in paths.items()}
        trained = training(
            settings.trained,
            settings.base,
            models[settings.base].digest,
            settings.trainer,
            sets[0],
            settings.captions,
        )
        subject = Subject(
            name=settings.trained,
            base=models[settings.base],
            base_name=settings.base,
            family=settings.family,
            data=settings.data,
            captions=sets[0],
            validation=sets[1],
            trainer=settings.trainer,
            sampler=settings.sampler,
            samples=read_prompts(settings.prompts, "sweep").first(8) if settings.trainer.sample_every else None,
        )
        models[settings.trained] = train(context, subject)

        live = LiveNetworks(settings.family, context.device)
        scoring = Scoring(settings.sampler, settings.suite, context.device)
        merge = LiveMerge(settings.merge, models, live)
        folder = settings.root / "mlruns" / "reports" / key[:12]
        result = run_sweep(context, _sweep_settings(settings, models), merge, scoring)
        shown = _review(settings, result, folder / "sweep")
        keep_best(result, shown, origins)
        point, members = _winner(result, shown)
        merge = merge.of_dtype(settings.release.dtype)
        final = _last_word(context, settings, scoring, merge, point, folder)
        candidate = replace(
            merged(context, merge, point, origins, folder),
            members=members,
            objective=settings.search.objective,
            heat_map=shown.pictures.get("heat map"),
        )
        made = publish(context, settings.release, settings.family, scoring, candidate, final, trained)
        verdict = judge_candidate(
            context,
            settings.gates,
            settings.release.name,
            candidate.checkpoint,
            final.sheets[final.winner],
            final.sheets[settings.base],
            scoring,
            live,
            final.prompts,
        )
        view, page = _close(context, settings, invocation, result, shown, final, made)

    print(f"\n{shown.review.table}\n\n{final.text}\n")
    print(f"contact sheet  {final.contact_sheet}")
    print(f"review         {page}")
    print(f"release        {made.path}\n               model file sha256 {made.model_sha256}")
    print(f"MLflow         {ui.ui_command(settings.root)}\n               ", end="")
    print(ui.deep_link(journal.experiment_id, view=view))
    context.close()
    if settings.insist:
        insist(title, verdict)


_WHERE = ("root", "compute", "debug", "insist")
"""Settings that change no result."""


def _parameters(settings: GammaSettings) -> dict[str, object]:
    """What the chain's row shows in MLflow; the whole configuration is an artifact."""
    return {
        "base": settings.base,
        "trained": settings.trained,
        "formula": settings.merge.formula,
        "objective": settings.search.objective,
        "captions": settings.captions.name,
        "family": settings.family.name,
        **flat(asdict(settings.sampler), "sampler."),
    }


def _sweep_settings(settings: GammaSettings, models: dict[str, Checkpoint]) -> SweepSettings:
    """The chain's sweep as the sweep pipeline has it."""
    return SweepSettings(
        root=settings.root,
        name=settings.name,
        family=settings.family,
        models={alias: str(model.path) for alias, model in models.items()},
        data=settings.data,
        merge=settings.merge,
        search=settings.search,
        prompts=settings.prompts,
        sampler=settings.sampler,
        suite=settings.suite,
        compute=settings.compute,
        leaderboard=settings.leaderboard,
        sheet=settings.sheet,
        write_winner=False,
        race=settings.race,
    )


def _review(settings: GammaSettings, result: SweepResult, folder: Path) -> Shown:
    """The winner set, the leaderboard and the pictures of the sweep."""
    review = reviewed(
        result, title=settings.merge.formula, objective=settings.search.objective, columns=settings.leaderboard
    )
    card = tuple(
        settings.merge.coefficients[name] for name in settings.search.values if name in settings.merge.coefficients
    )
    prompts = read_prompts(settings.prompts, "sweep").first(settings.sheet).prompts
    marked = (card[0], card[1]) if len(card) == 2 else None
    originals = find_originals(settings.prompts, "sweep", prompts)
    return draw(review, folder, result.strips, prompts, settings.sampler, card=marked, originals=originals)


def _winner(result: SweepResult, shown: Shown) -> tuple[Point, tuple[Point, ...]]:
    """The best point, and the points that are not significantly different from it."""

    def point(label: str) -> Point:
        return {name: float(value) for name, value in result.points[label].items()}

    return point(shown.best), tuple(point(label) for label in shown.review.found.members)


def _origin_of_trained(settings: GammaSettings) -> Origin:
    """Where the fine-tune comes from: it inherits its base's licence."""
    base = settings.origins.get(settings.base, Origin())
    return Origin(license=base.license, author=settings.release.author or None, note=f"fine-tuned from {settings.base}")


def _last_word(
    context: Context, settings: GammaSettings, scoring: Scoring, merge: LiveMerge, point: Point, folder: Path
) -> Finalists:
    """Score the winner on held-out prompts, beside the card's point, the fine-tune and the base."""
    card = settings.merge.coefficients
    rivals: dict[str, tuple[LiveMerge, Point]] = {}
    if dict(card) != dict(point):
        rivals[f"card: {label_of(card)}"] = (merge, card)
    for name in (settings.base, settings.trained):
        rivals[name] = (merge.alone(name), {})
    prompts = read_prompts(settings.prompts, "heldout")
    return compare_finalists(
        context,
        scoring,
        (f"winner: {label_of(point)}", merge, point),
        rivals,
        settings.base,
        prompts,
        leaderboard=settings.leaderboard,
        objective=settings.search.objective,
        kept=settings.sheet,
        title=f"{settings.release.name} {settings.release.version}",
        folder=folder,
        originals=find_originals(settings.prompts, "heldout", prompts.first(settings.sheet).prompts),
    )


def _close(
    context: Context,
    settings: GammaSettings,
    invocation: Invocation,
    result: SweepResult,
    shown: Shown,
    final: Finalists,
    made: Release,
) -> tuple[str, Path]:
    """Show the chain on its own page in MLflow; returns the key of its saved view, and the review's page."""
    parent, review, about = context.parent, shown.review, settings.release
    parent.metrics(aggregates(final.sheets[final.winner]))
    parent.picture("held-out contact sheet", final.contact_sheet)
    parent.tags({"release.model_sha256": made.model_sha256})
    parent.note(f"```\n{review.table}\n\n{final.text}\n```")
    view = shown.view(parent, "rung" if result.race else "point", list(settings.search.values))
    page = shown.page(
        facts={
            "release": f"{about.name} {about.version}, model file sha256 {made.model_sha256}",
            "files": str(made.path),
            "base": settings.base,
            "trained": f"{settings.trained}, captions {settings.captions.name}",
            "winner set": shown.review.winner_set,
            "prompts": f"{review.scores[shown.best][review.objective].n} for the sweep, each with its own seed; "
            f"{len(final.prompts.prompts)} others for the last word",
            "dashboard": f"{ui.ui_command(settings.root)} (the links need it)",
        },
        links=links_of(context.journal, parent, view),
        recipe=(made.path / "recipe.yaml").read_text(),
        command=invocation.line,
        failures=result.failures,
        out=result.left,
        more=[
            f"<h2>On prompts it was not chosen on</h2><pre>{escape(final.text)}</pre>",
            picture(final.differences_plot, "The winner against the base."),
            picture(final.contact_sheet, "Held-out prompts: the same seeds in every row."),
        ],
    )
    shown.journal(parent, page)
    return view, page
