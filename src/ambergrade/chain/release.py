"""Makes the winner's release: the merged file, its folder, and its version in the registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ambergrade.chain.context import Context
from ambergrade.chain.gates import measured, tiny_scorers
from ambergrade.chain.heldout import Finalists
from ambergrade.chain.point import LiveMerge, Point, Scoring, label_of, write_merge
from ambergrade.chain.settings import FamilySettings, ReleaseSettings
from ambergrade.identity import digest
from ambergrade.merge.files import recipe_document
from ambergrade.nouns import CaptionSet, Checkpoint, Release
from ambergrade.release.build import build_release
from ambergrade.release.contents import Evaluation, Prompts, ReleaseContents, Scorer
from ambergrade.score.comparison import aggregates
from ambergrade.train.settings import TrainSettings


@dataclass(frozen=True)
class Winner:
    """The point that is released, and the points that are not significantly different from it."""

    merge: LiveMerge
    point: Point
    members: tuple[Point, ...]
    heat_map: Path | None


@dataclass(frozen=True)
class Training:
    """What the release says of the training before the merge."""

    name: str
    base: str
    base_digest: str
    trainer: TrainSettings
    captions: CaptionSet

    @property
    def facts(self) -> dict[str, object]:
        """Learning rates, batch and length, as a model card prints them."""
        trainer = self.trainer
        return {
            "trained": f"{self.name} from {self.base}",
            "learning rates": dict(trainer.lr),
            "schedule": dict(trainer.schedule),
            "batch": f"{trainer.batch} = micro {trainer.micro} × accumulation {trainer.accumulation(1)} × 1 process",
            "images seen": trainer.images,
            "pictures": len(self.captions.pictures),
            "optimizer": dict(trainer.optimizer),
            "precision": trainer.precision,
        }


def publish(
    context: Context,
    about: ReleaseSettings,
    family: FamilySettings,
    scoring: Scoring,
    winner: Winner,
    final: Finalists,
    training: Training,
    objective: str,
) -> tuple[Release, Checkpoint]:
    """Write the winner's checkpoint once, build its release folder, and register the model as a candidate."""
    merge, point = winner.merge, winner.point
    merged, done = write_merge(context, merge, point, final.folder / "merged.safetensors")
    recipe = recipe_document(merged.path, formula=merge.chosen.formula)
    made = build_release(
        about.folder,
        ReleaseContents(
            name=about.name,
            version=about.version,
            license=about.license,
            family=family.name,
            config=family.config,
            checkpoint=merged.path,
            checkpoint_sha256=done.digests["checkpoint"],
            recipe=recipe,
            evaluation=_evaluation(scoring, winner, final, objective),
            training=training.facts,
            captions={"recipe": training.captions.recipe, "manifest": training.captions.digest},
            contact_sheet=final.contact_sheet,
            heat_map=winner.heat_map,
            lineage={
                training.name: {"base": training.base_digest, "captions": training.captions.digest},
                "inputs": recipe["models"],
            },
            summary=about.summary,
        ),
    )
    _register(context, about, made, merged, merge, point, final, digest([made.digest, done.identity]))
    context.tell("release", None if not done.fresh else done.seconds, made.digest)
    return made, merged


def _evaluation(scoring: Scoring, winner: Winner, final: Finalists, objective: str) -> Evaluation:
    """What the release says of its scores."""
    sheet = final.sheets[final.winner]
    scored = {label: aggregates(found) for label, found in final.sheets.items()}
    tiny = tiny_scorers(scoring.suite.metrics, sheet)
    named = final.leaderboard
    apart = measured({name: final.apart[name] for name in named})
    return Evaluation(
        prompts=Prompts(final.prompts.name, sheet.n, final.prompts.digest),
        sampler=scoring.sampler,
        objective=objective,
        scores={name: {label: scores[name] for label, scores in scored.items()} for name in named},
        differences={name: {final.base: found} for name, found in apart.items()},
        winner_set=winner.members,
        scorers={name: Scorer(digest(made_of), tiny[name]) for name, made_of in sheet.fingerprints.items()},
    )


def _register(
    context: Context,
    about: ReleaseSettings,
    made: Release,
    merged: Checkpoint,
    merge: LiveMerge,
    point: Mapping[str, float],
    final: Finalists,
    identity: str,
) -> None:
    """Enter the release in the journal and the model in the registry, under the alias `candidate`."""
    title = f"release {about.version}"
    with context.journal.run(title, key=identity, kind="release", parent=context.parent, params=dict(point)) as run:
        if run.done:
            return
        scores = aggregates(final.sheets[final.winner])
        run.metrics(scores)
        run.tags({"release.manifest_sha256": made.digest})
        for name in ("README.md", "recipe.yaml", "evaluation.json", "MANIFEST.json"):
            run.file(made.path / name)
        run.picture("contact sheet", final.contact_sheet)
        card = (made.path / "README.md").read_text().partition("---\n\n")[2]
        run.note("\n".join(line for line in card.splitlines() if not line.startswith("![")))
        run.model(
            about.name,
            merged.path,
            merged.digest,
            parents=merge.inputs,
            registered_as=about.name,
            aliases=["candidate"],
            note=f"{about.version}: {merge.formula.text} at {label_of(point)}",
            params=dict(point),
            metrics=scores,
        )
