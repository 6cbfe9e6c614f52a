"""Makes a release of a candidate: its weights, its folder, and its version in the registry."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ambergrade.captions.recipe import CaptionRecipe
from ambergrade.chain.context import Context
from ambergrade.chain.environment import environment
from ambergrade.chain.gates import tiny_scorers
from ambergrade.chain.heldout import Finalists
from ambergrade.chain.numbers import numbers
from ambergrade.chain.point import LiveMerge, Point, Scoring, cut, label_of, write_merge
from ambergrade.chain.settings import FamilySettings, ReleaseSettings, Suite
from ambergrade.errors import BadInput
from ambergrade.family.load import family as load_family
from ambergrade.identity import digest, file_digest
from ambergrade.merge.files import recipe_document
from ambergrade.nouns import RATINGS, CaptionSet, Checkpoint, Release
from ambergrade.release import facts
from ambergrade.release.build import Payload, build_release
from ambergrade.release.facts import Draft, Evaluation, Origin, Parent, Prompts, Recipe, Sample, Scorer
from ambergrade.release.licenses import derive, load_license
from ambergrade.release.private import refuse_private
from ambergrade.release.sums import MANIFEST
from ambergrade.score.comparison import aggregates
from ambergrade.store import find_file
from ambergrade.train.settings import TrainSettings
from ambergrade.typed import plain


@dataclass(frozen=True)
class Candidate:
    """What is released: one file of weights, and what is known of how it was made."""

    checkpoint: Checkpoint
    identity: str
    """Identifies what made the file: a record's identity, or a digest."""
    recipe: Recipe | None = None
    """None where nobody knows how it was made."""
    title: str = ""
    """What made it, in one line, for the registry."""
    point: Point = field(default_factory=dict)
    members: tuple[Point, ...] = ()
    """The points of its sweep that are not significantly different from it."""
    objective: str = ""
    """What its sweep chose by."""
    heat_map: Path | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Alias of each parent to the digest of its weights."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Alias of each parent to its file, where it is at hand."""
    license: str | None = None
    """Names the file's own licence, where nothing is known of parents."""
    sha256: str | None = None
    as_it_is: bool = False
    """The file keeps its header: it was made elsewhere, and is known by its digest."""

    @property
    def parents(self) -> Mapping[str, Parent]:
        """What it was merged from; nothing where nobody knows."""
        return self.recipe.models if self.recipe else {}


def merged(context: Context, merge: LiveMerge, point: Point, origins: Mapping[str, Origin], folder: Path) -> Candidate:
    """Write the merge of one point as a file, once, and say what it was made of."""
    checkpoint, done = write_merge(context, merge, point, folder / "merged.safetensors")
    return Candidate(
        checkpoint,
        done.identity,
        recipe=recipe_of(checkpoint.path, origins, formula=merge.chosen.formula),
        title=f"{merge.formula.text} at {label_of(point)}",
        point=point,
        inputs=merge.inputs,
        files=merge.paths,
        sha256=done.digests["checkpoint"],
    )


def recipe_of(file: Path, origins: Mapping[str, Origin], *, formula: str = "") -> Recipe:
    """Read the recipe in a merged file's header, with where its inputs come from. Raises BadInput for none."""
    document = recipe_document(file, formula=formula)
    parents = {
        alias: Parent(row.get("weights"), row.get("file"), f"{alias}.safetensors", origins.get(alias, Origin()))
        for alias, row in document["models"].items()
    }
    keys = ("formula", "coefficients", "dtype", "policies")
    return Recipe(**{key: document[key] for key in keys}, models=parents, ancestors=document.get("ancestors", {}))


def training(
    name: str, base: str, base_digest: str, trainer: TrainSettings, captions: CaptionSet, rules: CaptionRecipe
) -> facts.Training:
    """Say what was trained, as Gamma's card prints it, and the words that its captions taught."""
    rates = [trainer.lr[part] for part in ("unet", "te1", "te2") if part in trainer.lr]
    accumulation = trainer.accumulation(1)
    shown = {
        "trained": f"{name} from {base}",
        "LR": "/".join(dict.fromkeys(_number(rate) for rate in rates)),
        "Scheduler": trainer.schedule["name"] + (" with warmup" if trainer.schedule.get("warmup") else ""),
        "Batch size": f"{trainer.batch} (batch size {trainer.micro} * grad acc {accumulation})",
        "images seen": trainer.images,
        "pictures": len(captions.pictures),
        "optimizer": dict(trainer.optimizer),
        "precision": trainer.precision,
    }
    words = facts.Captions(
        recipe=captions.recipe,
        manifest=captions.digest,
        pictures=len(captions.pictures),
        order=rules.parts,
        rating={rating: rules.rating[rating] for rating in RATINGS if rating in rules.rating},
        quality=(*sorted(rules.quality_above, key=lambda tag: -rules.quality_above[tag]), rules.quality_else),
        year=tuple(dict.fromkeys(band.tag for band in reversed(rules.year))),
    )
    return facts.Training(name, base, base_digest, shown, plain(trainer), words)


def _number(value: float) -> str:
    """
    >>> _number(8e-6), _number(0.001)
    ('8e-6', '0.001')
    """
    return re.sub(r"e([+-])0", r"e\1", f"{value:g}")


def publish(
    context: Context,
    about: ReleaseSettings,
    family: FamilySettings,
    scoring: Scoring,
    candidate: Candidate,
    final: Finalists,
    trained: facts.Training | None = None,
) -> Release:
    """Build the release folder of a candidate that was scored, and register the model under the alias `candidate`."""
    strip = cut(final.done[final.winner].files["pictures"], scoring.sampler.width)
    shown = list(zip(final.prompts.prompts, strip, strict=False))
    samples = tuple(
        Sample(f"samples/{number:02}.png", prompt.text, prompt.negative, prompt.seed)
        for number, (prompt, _) in enumerate(shown, 1)
    )
    config = find_file(family.config)
    licenses = {alias: parent.origin.license for alias, parent in candidate.parents.items()}
    derived = derive(licenses, about.license or candidate.license)
    evaluation, sheets = _evaluation(scoring, candidate, final)
    draft = Draft(
        name=about.name,
        version=str(about.version),
        summary=about.summary,
        author=about.author,
        license=derived.name,
        license_why=derived.why,
        licenses={name: load_license(name) for name in dict.fromkeys([derived.name, *licenses.values()])},
        family=family.name,
        architecture=load_family(family.name).architecture,
        pipeline=json.loads((config / "model_index.json").read_text())["_class_name"],
        resolution=family.resolution,
        recipe=candidate.recipe,
        training=trained,
        evaluation=evaluation,
        samples=samples,
        environment=environment(),
    )
    files = {**sheets, "contact_sheet.png": final.contact_sheet}
    files |= {"heat_map.png": candidate.heat_map} if candidate.heat_map else {}
    files |= _bundled(candidate) if about.parents else {}
    payload = Payload(
        checkpoint=candidate.checkpoint.path,
        config=config,
        prompts=final.prompts,
        checkpoint_sha256=candidate.sha256,
        as_it_is=candidate.as_it_is,
        files=files,
        samples=[np.ascontiguousarray(pixels) for _, pixels in shown],
        diffusers=about.diffusers,
    )
    start, manifest = time.monotonic(), about.folder / MANIFEST
    before = file_digest(manifest) if manifest.is_file() else ""
    made = build_release(about.folder, draft, payload)
    _register(context, about, made, candidate, final)
    context.tell("release", None if made.digest == before else time.monotonic() - start, made.digest)
    return made


def _bundled(candidate: Candidate) -> dict[str, Path]:
    """The parents' files by their names in the release. Raises BadInput for a parent that is no file at hand."""
    parents = candidate.parents
    lost = [alias for alias in parents if alias not in candidate.files or candidate.files[alias].is_dir()]
    if lost:
        raise BadInput(
            f"release.parents is true, and {', '.join(lost)} cannot go into the release: a single file is needed.\n"
            "Give the folder that holds the parents (inputs=DIR), or release.parents=false."
        )
    return {f"parents/{parent.name}": candidate.files[alias] for alias, parent in parents.items()}


def _evaluation(scoring: Scoring, candidate: Candidate, final: Finalists) -> tuple[Evaluation, dict[str, Path]]:
    """What the release says of its scores, and the sheets that it says it by, by their names in the release."""
    sheet = final.sheets[final.winner]
    names = {label: f"scores/{_file_name(label)}.parquet" for label in final.sheets}
    names[final.winner] = "scores/released.parquet"
    tiny = tiny_scorers(scoring.suite.metrics, sheet)
    for label, one in final.sheets.items():
        refuse_private(plain([one.fingerprints, one.constants, one.faults]), names[label])
    scores, apart = numbers(final.sheets)
    mosaic = ("mosaic",) if "mosaic" in scores and "mosaic" not in final.leaderboard else ()
    found = Evaluation(
        prompts=Prompts(final.prompts.name, sheet.n, final.prompts.digest),
        sampler=scoring.sampler,
        objective=candidate.objective,
        columns=(*final.leaderboard, *mosaic),
        sheets=names,
        scores=scores,
        differences=apart,
        winner_set=candidate.members,
        scorers={
            name: Scorer(digest(made_of), tiny[name], _anywhere(scoring.suite, name))
            for name, made_of in sheet.fingerprints.items()
        },
    )
    return found, {name: final.done[label].files["scores"] for label, name in names.items()}


def _anywhere(suite: Suite, name: str) -> Mapping[str, Any] | None:
    """The settings of a scorer that a stranger can load too; None where they name a file of this machine."""
    settings = next((one.parameters for one in suite.metrics.values() if one.name == name), None)
    texts = [value for value in (settings or {}).values() if isinstance(value, str)]
    ours = [text for text in texts if "/" in text and not text.startswith(("builtin://", "hub://"))]
    return None if ours else settings


def _file_name(label: str) -> str:
    """
    >>> _file_name("card: a 0.8, b 0.5")
    'card-a-0.8-b-0.5'
    """
    return re.sub(r"[^\w.]+", "-", label).strip("-.") or digest(label)[:12]


def _register(context: Context, about: ReleaseSettings, made: Release, candidate: Candidate, final: Finalists) -> None:
    """Enter the release in the journal and the model in the registry, under the alias `candidate`."""
    title, point = f"release {about.version}", candidate.point
    key = digest([made.digest, candidate.identity])
    with context.journal.run(title, key=key, kind="release", parent=context.parent, params=dict(point)) as run:
        if run.done:
            return
        scores = aggregates(final.sheets[final.winner])
        run.metrics(scores)
        run.tags({"release.manifest_sha256": made.digest})
        for name in ("README.md", "recipe.yaml", "evaluation.json", "release.json", "MANIFEST.json"):
            if (made.path / name).is_file():
                run.file(made.path / name)
        run.picture("contact sheet", final.contact_sheet)
        card = (made.path / "README.md").read_text().partition("---\n\n")[2]
        run.note("\n".join(line for line in card.splitlines() if "![" not in line))
        run.model(
            about.name,
            candidate.checkpoint.path,
            candidate.checkpoint.digest,
            parents=candidate.inputs,
            registered_as=about.name,
            aliases=["candidate"],
            note=f"{about.version}: {candidate.title or 'of unknown origin'}",
            params=dict(point),
            metrics=scores,
        )
