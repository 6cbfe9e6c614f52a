"""Runs a sweep as a command does: its own run in MLflow, the points, the review and the winner's file; or a preview."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from ambergrade.chain.context import Context, Task, open_journal, record_command, use_threads
from ambergrade.chain.dataset import draw_world, is_drawn
from ambergrade.chain.point import find_originals, label_of, read_prompts, write_merge
from ambergrade.chain.points import PointScorer, check_objective
from ambergrade.chain.review import Shown, draw, links_of, tell_dashboard, tell_unlike
from ambergrade.chain.settings import Invocation, SweepSettings
from ambergrade.chain.sweep import SweepPlan, SweepResult, drive, keep_best, pool, result_of, reviewed
from ambergrade.errors import AmbergradeError, BadInput, BadSetting
from ambergrade.merge.formula import Formula
from ambergrade.score.statistics import interval_text
from ambergrade.search.driver import Evaluator, Job, Swept
from ambergrade.search.explain import why_new
from ambergrade.store import Ledger, find_file, write_json
from ambergrade.track import ui
from ambergrade.track.journal import Journal

UNDRAWN = "the mini-booru is not drawn yet: every point is new"


class SweepFailed(AmbergradeError):
    """Some points failed; the others are kept."""


def run(
    settings: SweepSettings,
    invocation: Invocation,
    planned: Callable[[PointScorer | None], SweepPlan],
    launched: Callable[[SweepPlan], Evaluator | None],
) -> None:
    """Sweep, and show what came out. Raises SweepFailed at the end if any point failed.

    settings: of any of the points. planned: makes the plan, once the world that the settings name is drawn; without a
    scorer, one that can only be looked at. launched: the evaluator of a launcher that was chosen, instead of the pool
    of `compute.workers`.
    """
    check_objective(settings.suite, settings.search.objective)
    settings.check_files()
    use_threads(settings.compute)
    if settings.dry or settings.why:
        known = PointScorer() if is_drawn(settings.data) else None
        preview(planned(known), known, settings)
        return
    draw_world(settings.data, settings.compute)
    scorer = PointScorer()
    plan = planned(scorer)
    print(f"sweep {plan.key[:12]}, {len(plan.search)} points, {plan.folder.root}", flush=True)
    with plan.folder.alone():
        journal = open_journal(settings.root, settings.name, settings, invocation)
        try:
            swept = _swept(journal, settings, invocation, plan, scorer, launched(plan))
        except BaseException:
            Journal.open(settings.root, settings.name)  # closes the runs of workers that were killed
            raise
    for trouble in journal.troubles:
        print(f"not journaled: {trouble}")
    if swept.failed:
        print(f"\n{swept.failure_table}\nThe whole reasons: {plan.folder.root / 'failures.txt'}", flush=True)
        head = swept.failure_table.partition("\n")[0]
        raise SweepFailed(f"{head} see above.\nRun the same command again to go on with them.")


def _swept(
    journal: Journal,
    settings: SweepSettings,
    invocation: Invocation,
    plan: SweepPlan,
    scorer: PointScorer,
    launched: Evaluator | None,
) -> Swept:
    names = ", ".join(key.rpartition(".")[2] for key in plan.axes)
    params = {"formula": settings.merge.formula, "objective": settings.search.objective, "swept": names}
    params |= {f"values.{key.rpartition('.')[2]}": str(spec) for key, spec in plan.axes.items()}
    with journal.run(f"sweep {plan.key[:8]}: {names}", key=plan.key, kind="sweep", params=params) as above:
        write_json(plan.folder.root / "sweep.json", {"id": above.id, "name": above.name, "key": above.key})
        record_command(above, settings, invocation)
        above.datasets({"prompts": read_prompts(settings.prompts, "sweep").digest})
        context = Context(settings.root, journal, above, settings.compute)
        with pool(context, plan, settings.compute.workers) as workers:
            swept = drive(context, plan, scorer, launched or workers)
        grown = above.done and any(not trial.before for trial in swept.trials)  # an earlier command finished it
        shown_on = journal.attached(above.id, above.name, above.key) if grown else above
        if swept.race is not None:
            print(f"\nrace: {swept.race.text}")
            shown_on.tags({"race": swept.race.text})
        if swept.done:
            _show(context.below(shown_on), settings, invocation, plan, scorer, result_of(context, plan, swept))
        if grown:
            shown_on.end("FINISHED")
    return swept


def _show(
    context: Context,
    settings: SweepSettings,
    invocation: Invocation,
    plan: SweepPlan,
    scorer: PointScorer,
    result: SweepResult,
) -> None:
    """Print the leaderboard, draw the review, write the winner's file, and enter it all on the sweep's run."""
    run, objective, folder = context.parent, settings.search.objective, plan.folder.root
    try:
        review = reviewed(result, title=run.name, objective=objective, columns=settings.leaderboard)
    except BadInput as error:
        tell_unlike(context, run, folder, result.sheets, objective, settings.leaderboard, error)
        return
    print(f"\n{review.table}", flush=True)
    prompts = read_prompts(settings.prompts, "sweep").first(settings.sheet).prompts
    originals = find_originals(settings.prompts, "sweep", prompts)
    shown = draw(review, folder, result.strips, prompts, settings.sampler, originals=originals)
    keep_best(result, shown, run.key)
    winner = plan.settings_of(result.jobs[shown.best])
    merge, _ = scorer.loaded(winner)
    recipe = merge.recipe(winner.merge.coefficients)
    facts = _facts(settings, plan, shown, result)
    if settings.write_winner:
        file = folder / "merged.safetensors"
        merged, _ = write_merge(context, merge, winner.merge.coefficients, file)
        facts["checkpoint"] = str(file)
        run.model(
            merge.formula.name or "winner",
            merged.path,
            merged.digest,
            kind="merge",
            parents=merge.inputs,
            tags={"recipe": recipe.to_json()},
            params=winner.merge.coefficients,
            metrics={name: value for name, value in review.scores[shown.best].items() if name in review.columns},
        )
    view = shown.view(run, "rung" if result.race else "point", list(result.points[shown.best]))
    page = shown.page(
        facts={**facts, "dashboard": f"{ui.ui_command(settings.root)} (the links need it)"},
        links=links_of(context.journal, run, view),
        recipe=yaml.safe_dump(recipe.document, sort_keys=False, allow_unicode=True),
        command=invocation.line,
        failures=result.failures,
        out=result.left,
    )
    run.note(f"```\n{review.table}\n```")
    run.metrics({objective: review.scores[shown.best][objective], "points": len(result.points)})
    run.tags({"winner": shown.best, "winner_set": "; ".join(review.found.members)})
    run.text(yaml.safe_dump(recipe.document, sort_keys=False, allow_unicode=True), "recipe.yaml")
    shown.journal(run, page)
    print(f"\nreview  {page}", flush=True)
    tell_dashboard(context.journal, view)


def _facts(settings: SweepSettings, plan: SweepPlan, shown: Shown, result: SweepResult) -> dict[str, str]:
    best = shown.review.scores[shown.best][settings.search.objective]
    facts = {
        "winner": f"{shown.best}: {settings.search.objective} {best.value:.3f} {interval_text(best.low, best.high)}",
        "winner set": shown.review.winner_set,
        "formula": settings.merge.formula,
        "swept": "; ".join(f"{key} = {_in_words(spec)}" for key, spec in plan.axes.items()),
        "points": f"{len(result.points)} done, {len(result.failures)} failed",
        "prompts": f"{best.n}, each with its own seed",
    }
    return facts | ({"race": result.race} if result.race else {})


def _in_words(spec: Sequence[object] | Mapping[str, object]) -> str:
    if isinstance(spec, Mapping):
        more = [f"{key} {value}" for key, value in spec.items() if key not in ("low", "high")]
        return ", ".join([f"{spec['low']:g} to {spec['high']:g}", *more])
    return ", ".join(map(str, spec))


# --- before, instead of drawing -------------------------------------------------------------------------------


def preview(plan: SweepPlan, scorer: PointScorer | None, settings: SweepSettings) -> None:
    """Print hit or miss and cost of every point; with `why`, what tells a point from the finished one most like it.

    scorer: None where the mini-booru is not drawn yet, so that nothing of this sweep can be finished.
    """
    ledger = Ledger(settings.root / "mlruns")
    total, seconds, names = 0, 0.0, set[str]()
    rungs = plan.rungs
    blocks: list[tuple[int, int] | None] = list(zip((0, *rungs), rungs, strict=False)) if rungs else [None]
    for point in iter(plan.search.ask, None):
        job = Job(plan.label(point), point)
        chosen = plan.settings_of(job)
        jobs = [replace(job, block=block) for block in blocks]
        missing = [one for one in jobs if scorer is None or scorer.task(chosen, one).find(ledger) is None]
        pictures = sum(one.block[1] - one.block[0] if one.block else _prompts(chosen) for one in missing)
        total += pictures
        if scorer and pictures:
            seconds += pictures * _seconds_a_picture(ledger, scorer.task(chosen, jobs[0]))
        print(f"  {job.label:<34}{f'miss   {pictures} pictures' if missing else 'hit'}", flush=True)
        known_as = {job.label, label_of(chosen.merge.coefficients)}
        names |= known_as
        if settings.why in known_as:
            _explain(ledger, scorer.task(chosen, jobs[0])) if scorer else print(f"    {UNDRAWN}")
    if settings.why and settings.why not in names:
        raise BadSetting(f"why={settings.why} is no point of this sweep: {', '.join(sorted(names)[:6])}.")
    if scorer is None:
        print(f"  {UNDRAWN}")
    base = find_file(settings.models[Formula.parse(settings.merge.formula, settings.models).models[0]] or "")
    size = sum(file.stat().st_size for file in ([base] if base.is_file() else base.rglob("*.safetensors")))
    written = f"{size / 1e9:.2f} GB for the winner" if settings.write_winner else "no checkpoint"
    hours = seconds / 3600
    known = f"about {f'{hours:.1f} h' if hours >= 1 else f'{60 * hours:.1f} min'} on this device"
    time = known if hours or not total else "unknown time: nothing like it was drawn yet"
    print(f"{'at most ' if plan.rungs else ''}{total} pictures, {time}, {written}")


def _prompts(settings: SweepSettings) -> int:
    """How many prompts a whole point has, read or still to be drawn."""
    files, draw = settings.prompts, settings.data.draw
    if draw is None or Path(files.sweep).exists():
        return len(read_prompts(files, "sweep").prompts)
    return min(draw.prompts, files.sweep_count or draw.prompts)


def _explain(ledger: Ledger, task: Task) -> None:
    wanted = {"settings": json.loads(json.dumps(task.settings)), "inputs": task.inputs}
    finished = ({name: row[name] for name in wanted} for row in ledger.records(task.stage.kind))
    for key, now, then in why_new(wanted, finished):
        print(f"    {key}: {_short(now)} (nearest finished point: {_short(then)})")


def _seconds_a_picture(ledger: Ledger, task: Task) -> float:
    """Median over what was drawn by this sampler and scored by this suite; 0 where there is none."""
    assert isinstance(task.settings, Mapping)
    sampler, scorers = task.settings["sampler"], task.inputs["scorers"]
    like = [
        row["seconds"] / max(value["n"] for value in row["values"]["aggregates"].values())
        for row in ledger.records(task.stage.kind)
        if (row["settings"].get("sampler"), row["inputs"].get("scorers")) == (sampler, scorers)
    ]
    return float(np.median(like)) if like else 0.0


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
