"""Releases what is there: the best or a named point of a finished sweep, or a model file that was made elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ambergrade.chain.context import Context, open_journal, record_command, use_threads
from ambergrade.chain.dataset import draw_world
from ambergrade.chain.gates import judge_candidate, licence_of
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
from ambergrade.chain.release import Candidate, merged, publish, recipe_of
from ambergrade.chain.release_settings import ReleasePipelineSettings
from ambergrade.chain.settings import Invocation, MergeFormula, SweepSettings
from ambergrade.chain.sweep import read_best
from ambergrade.errors import BadSetting, UnknownName
from ambergrade.family.dtypes import DTYPES
from ambergrade.family.header import read_header
from ambergrade.identity import digest, file_digest
from ambergrade.merge.files import RECIPE
from ambergrade.merge.find import find_inputs
from ambergrade.merge.formula import Formula
from ambergrade.merge.inputs import Digests, default_cache
from ambergrade.merge.recipe import header_recipe
from ambergrade.nouns import Checkpoint
from ambergrade.release.facts import Origin
from ambergrade.release.gate import insist, load_gates
from ambergrade.release.licenses import UNKNOWN, derive
from ambergrade.store import find_file
from ambergrade.track import ui

RELEASED = "released"
"""The alias of a model file that is released, in `origins` and in the formula of one that is only rounded."""


@dataclass(frozen=True)
class Subject:
    """What is scored for the release: a merge at a point, and what it is compared with."""

    label: str
    merge: LiveMerge
    point: Point
    rivals: Mapping[str, tuple[LiveMerge, Point]]
    base: str | None
    """The rival that gates compare with."""
    objective: str = ""
    members: tuple[Point, ...] = ()
    heat_map: Path | None = None
    origins: Mapping[str, Origin] = field(default_factory=dict)
    """Says where each model that it is merged from comes from."""
    found: Candidate | None = None
    """The candidate, where it is a file that is there already; else the merge is written."""


def run(settings: ReleasePipelineSettings, invocation: Invocation) -> None:
    """Score, build and register the release. Raises Refused at the end where a gate does not pass and `insist` is set.

    A sweep's own family, data, prompts, sampler and suite take the place of the settings'.
    """
    load_gates({label: one.as_mapping for label, one in settings.gates.items()})
    use_threads(settings.compute)
    if settings.sweep is not None:
        best = read_best(settings.sweep)
        swept = best.settings
        same = ("family", "data", "prompts", "sampler", "suite", "leaderboard", "sheet")
        origins = {**best.origins, **settings.origins}
        settings = replace(settings, origins=origins, **{name: getattr(swept, name) for name in same})
    title = f"{settings.release.name} {settings.release.version}"
    journal = open_journal(settings.root, settings.name, settings, invocation)
    key = digest(settings.what("insist"))
    with journal.run(title, key=key, kind="chain") as parent:
        print(f"{title}, {settings.root / 'mlruns'}")
        draw_world(settings.data, settings.compute)
        record_command(parent, settings, invocation)
        context = Context(settings.root, journal, parent, settings.compute)
        live = LiveNetworks(settings.family, context.device)
        scoring = Scoring(settings.sampler, settings.suite, context.device)
        folder = settings.root / "mlruns" / "reports" / key[:12]
        subject = _of_sweep(settings, live) if settings.sweep is not None else _of_file(settings, live)
        final = _scored(context, settings, scoring, subject, folder)
        candidate = subject.found or merged(context, subject.merge, subject.point, subject.origins, folder)
        candidate = replace(candidate, members=subject.members, objective=subject.objective, heat_map=subject.heat_map)
        made = publish(context, settings.release, settings.family, scoring, candidate, final)
        verdict = judge_candidate(
            context,
            settings.gates,
            settings.release.name,
            candidate.checkpoint,
            candidate.inputs.get(subject.base or ""),
            licence_of(made),
            final.sheets[final.winner],
            final.sheets[subject.base] if subject.base else None,
            scoring,
            live,
            final.prompts,
        )
    print(f"\n{final.text}\n\ncontact sheet  {final.contact_sheet}\nrelease        {made.path}")
    print(f"               model file sha256 {made.model_sha256}\nMLflow         {ui.ui_command(settings.root)}")
    context.close()
    if settings.insist:
        insist(title, verdict)


def _of_sweep(settings: ReleasePipelineSettings, live: LiveNetworks) -> Subject:
    """The best point of a sweep, or the one that `point` names; beside it every model of the formula."""
    assert settings.sweep is not None
    best = read_best(settings.sweep)
    swept, point = best.settings, dict(best.settings.merge.coefficients)
    for name in settings.point or {}:
        if name not in point:
            raise UnknownName("point", name, point, "These are the formula's coefficients.")
    named = {**point, **(settings.point or {})}
    models = _models(swept, settings.models)
    merge = LiveMerge(swept.merge, models, live).of_dtype(settings.release.dtype)
    licenses = {alias: settings.origins.get(alias, Origin()).license for alias in merge.paths}
    derive(licenses, settings.release.license)  # before anything is drawn
    chosen = named == point
    return Subject(
        label=f"{'winner' if chosen else 'released'}: {label_of(named)}",
        merge=merge,
        point=named,
        rivals={alias: (merge.alone(alias), {}) for alias in merge.formula.models},
        base=merge.formula.models[0],
        objective=swept.search.objective,
        members=best.members if chosen else (),
        heat_map=best.heat_map if best.heat_map and best.heat_map.is_file() else None,
        origins=settings.origins,
    )


def _models(swept: SweepSettings, given: Mapping[str, str]) -> dict[str, Checkpoint]:
    """The sweep's models, from where it had them or from where they lie now."""
    for alias in given:
        if alias not in swept.models:
            raise UnknownName("models", alias, swept.models)
    sources = {alias: source for alias, source in {**swept.models, **given}.items() if source}
    needed = Formula.parse(swept.merge.formula, sources).models
    return {alias: open_checkpoint(find_file(sources[alias]), swept.family.name) for alias in needed}


def _of_file(settings: ReleasePipelineSettings, live: LiveNetworks) -> Subject:
    """A model file: with the recipe of its header, if it has one; beside it those of its parents that are at hand."""
    assert settings.model is not None
    path, about = find_file(settings.model), settings.release
    if path.is_dir():
        raise BadSetting(
            f"{path} is a folder, and a release holds one safetensors file.\nConvert it, and name the file."
        )
    model = open_checkpoint(path, settings.family.name)
    header = read_header(path)
    written = header_recipe(header.metadata) if RECIPE in header.metadata else None
    parents: dict[str, Path] = {}
    if written is not None and settings.inputs is not None:
        known = Digests(default_cache())
        wanted = {alias: written.model(alias) for alias in written.named}
        parents = dict(find_inputs(wanted, settings.inputs, known, skip=[path]).paths)
    own = settings.origins.get(RELEASED, Origin(license=about.license or UNKNOWN))
    origins = {**settings.origins, RELEASED: own}
    dtypes = {DTYPES[entry.dtype].short for entry in header.entries.values() if entry.size}
    found: Candidate | None = None
    if about.dtype is not None and dtypes != {about.dtype}:  # a merge of one model, which only rounds it
        sources = {RELEASED: path}
    elif written is None:
        sources = {}
        found = Candidate(model, model.digest, license=own.license, sha256=file_digest(path), as_it_is=True)
    else:
        sources = parents
        found = Candidate(
            checkpoint=model,
            identity=model.digest,
            recipe=recipe_of(path, origins),
            title=written.formula.text,
            point=dict(written.coefficients),
            inputs=dict(written.inputs),
            files=parents,
            sha256=file_digest(path),
        )
    licenses = {name: origins.get(name, Origin()).license for name in (found.parents if found else sources)}
    derive(licenses, about.license)  # before anything is drawn
    merge = LiveMerge(MergeFormula(RELEASED, {}, None if found else about.dtype), {RELEASED: model}, live)
    models = {name: open_checkpoint(file, settings.family.name) for name, file in parents.items()}
    rivals = {name: (LiveMerge(MergeFormula(name, {}), models, live), dict[str, float]()) for name in models}
    base = written.formula.models[0] if written is not None and written.formula.models[0] in rivals else None
    return Subject(f"released: {about.name}", merge, {}, rivals, base, origins=origins, found=found)


def _scored(
    context: Context, settings: ReleasePipelineSettings, scoring: Scoring, subject: Subject, folder: Path
) -> Finalists:
    prompts = read_prompts(settings.prompts, "heldout")
    return compare_finalists(
        context,
        scoring,
        (subject.label, subject.merge, subject.point),
        subject.rivals,
        subject.base,
        prompts,
        leaderboard=settings.leaderboard,
        objective=subject.objective or settings.leaderboard[0],
        kept=settings.sheet,
        title=f"{settings.release.name} {settings.release.version}",
        folder=folder,
        originals=find_originals(settings.prompts, "heldout", prompts.first(settings.sheet).prompts),
    )
