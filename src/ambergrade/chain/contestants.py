"""Brings the pictures that a vote is on: folders of pictures as they are, models and points of a sweep drawn anew.

A sweep keeps a few pictures of each point only, on the prompts that it was chosen by. People vote on held-out ones, so
points are merged live again from what their records say; what was drawn for an earlier ballot is not drawn again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ambergrade.chain.context import Context, Stage
from ambergrade.chain.point import LiveMerge, LiveNetworks, Point, open_checkpoint, read_prompts
from ambergrade.chain.settings import FamilySettings, MergeFormula, SweepSettings
from ambergrade.chain.sweep import read_best
from ambergrade.chain.vote import Contestant
from ambergrade.errors import BadInput, BadSetting, MissingObject, UnknownName
from ambergrade.generate import stream
from ambergrade.generate.contact_sheet import write_png
from ambergrade.identity import digest, file_digest
from ambergrade.merge.find import find_inputs
from ambergrade.merge.formula import Formula
from ambergrade.merge.inputs import Digests, default_cache
from ambergrade.nouns import Checkpoint, PromptSet, SamplerSettings
from ambergrade.pictures import SUFFIXES
from ambergrade.release.facts import FACTS, ReleaseFacts, read_facts
from ambergrade.score.pictures import folder_pictures, folder_prompts
from ambergrade.search.folder import read_outcome
from ambergrade.store import BUILTIN, Outputs, find_file, read_json
from ambergrade.track.journal import Run
from ambergrade.typed import settings

DRAWN = Stage("drawn", 1)
"""Pictures of one model for people to look at."""
BEST = "best.json"


@dataclass(frozen=True)
class Chosen:
    """Whose pictures are laid side by side, and what they are of."""

    contestants: tuple[Contestant, ...]
    prompts: PromptSet
    how: Mapping[str, Any]
    """The sampler; empty for pictures that came as files."""


def is_pictures(folder: Path) -> bool:
    """Say whether a folder holds pictures to vote on, and is neither a model nor a release."""
    models = ("model_index.json", FACTS, BEST)
    if not folder.is_dir() or any((folder / name).exists() for name in models):
        return False
    return any(path.suffix.lower() in SUFFIXES for path in folder.iterdir())


def of_folders(folders: Sequence[Path], labels: Sequence[str], prompts: PromptSet | None, count: int) -> Chosen:
    """Take pictures as they are: `<prompt id>.png` in every folder, with prompts.jsonl or .txt files in the first.

    Raises BadInput naming pictures of no prompt and prompts without a picture, and for more than one picture a prompt.
    """
    known = prompts or folder_prompts(folders[0], {}, needed=False)
    found = []
    for label, folder in zip(labels, folders, strict=True):
        files = folder_pictures(folder, known)
        pictures = {prompt_id: path for (prompt_id, _), path in files.items()}
        if len(pictures) < len(files):
            raise BadInput(f"{folder} holds several pictures of one prompt.\nKeep one of each for a vote.")
        made_of = digest({name: file_digest(path) for name, path in pictures.items()})
        found.append(Contestant(label, made_of, pictures))
    return Chosen(tuple(found), known.first(count), {})


def of_models(
    context: Context,
    models: Mapping[str, Path],
    family: FamilySettings,
    prompts: PromptSet,
    sampler: SamplerSettings,
) -> Chosen:
    """Draw files or diffusers folders, by label."""
    live = LiveNetworks(family, context.device)
    opened = {label: open_checkpoint(find_file(str(path)), family.name) for label, path in models.items()}
    alone = {label: LiveMerge(MergeFormula("model", {}), {"model": model}, live) for label, model in opened.items()}
    drawn = [
        _drawn(context, alone[label], {}, model.digest, label, prompts, sampler) for label, model in opened.items()
    ]
    return Chosen(tuple(drawn), prompts, asdict(sampler))


def of_sweep(
    context: Context, folder: Path, points: Sequence[str], most: int, prompts: PromptSet | None, count: int
) -> Chosen:
    """Draw points of a sweep: those named as tables name them, else the `most` best by the sweep's objective.

    prompts: in place of the sweep's held-out ones. Raises MissingObject for records or models that are gone.
    """
    swept = read_best(folder).settings
    known = ranked(folder, swept.search.higher_is_better)
    unknown = [label for label in points if label not in known]
    if unknown:
        raise UnknownName("Point", unknown[0], known, "Points are named as the leaderboard names them.")
    records = {label: known[label] for label in points or list(known)[:most]}
    shown = (prompts or read_prompts(swept.prompts, "heldout")).first(count)
    live, how = LiveNetworks(swept.family, context.device), None
    opened: dict[str, Checkpoint] = {}
    made: list[Contestant] = []
    for label, (kind, identity) in records.items():
        row = read_json(context.ledger.root / "records" / kind / f"{identity}.json")
        if row is None:
            raise MissingObject(f"The record of the point {label} is gone.\nRun the sweep's command again.")
        recipe, sampler = row["settings"]["recipe"], settings(SamplerSettings, row["settings"]["sampler"])
        if how not in (None, sampler):
            raise BadSetting("The points were drawn by different samplers, so people would judge those.\nName others.")
        how, formula = sampler, Formula.parse(recipe["formula"], recipe["inputs"])
        opened |= {
            alias: _opened(swept, alias, recipe["inputs"][alias]) for alias in formula.models if alias not in opened
        }
        chosen = MergeFormula(recipe["formula"], recipe["coefficients"], recipe["dtype"], recipe["policies"])
        merge = LiveMerge(chosen, opened, live)
        made.append(_drawn(context, merge, recipe["coefficients"], digest(recipe), label, shown, sampler))
    assert how is not None, folder
    return Chosen(tuple(made), shown, asdict(how))


@dataclass(frozen=True)
class Released:
    """A release folder as a vote takes it; it may come from anybody."""

    folder: Path
    facts: ReleaseFacts
    prompts: PromptSet

    @classmethod
    def read(cls, folder: Path) -> Released:
        """Raises BadInput for a folder that is no release."""
        return cls(folder, read_facts(folder), PromptSet.read(folder / "prompts.jsonl", folder.resolve().name))

    @property
    def model(self) -> Path:
        """The file of its weights."""
        return self.folder / self.facts.file

    def base(self, folders: Sequence[Path]) -> tuple[str, Path]:
        """Find the first model of its formula, by digest. Raises MissingObject with where it was looked for."""
        recipe = self.facts.recipe
        if recipe is None:
            raise BadSetting("Nobody knows what the release was merged from.\nName a model that it is voted against.")
        alias = Formula.parse(recipe.formula, recipe.models).models[0]
        digests = {key: text for key, text in recipe.models[alias].digests.items() if key != "name"}
        places = [folder for folder in (self.folder / "parents", *folders, BUILTIN) if folder.is_dir()]
        for place in places:
            try:
                found = find_inputs({alias: digests}, place, Digests(default_cache()), names=[f"{alias}.safetensors"])
            except MissingObject:
                continue
            return alias, found.paths[alias]
        told = next(iter(digests.values()), "unknown")[:12]
        raise MissingObject(
            f"The release is voted against its base {alias}, sha256 {told}…, which is in none of "
            f"{', '.join(map(str, places))}.\nGive the folder that holds it: --models DIR, or name another model."
        )


def _drawn(
    context: Context,
    merge: LiveMerge,
    point: Point,
    made_of: str,
    label: str,
    prompts: PromptSet,
    sampler: SamplerSettings,
) -> Contestant:
    """Draw one contestant's pictures, once."""

    def work(scratch: Path, run: Run) -> Outputs:
        networks = merge.networks(point)
        texts = merge.texts(point, prompts, sampler.batch)
        files: dict[str, Path] = {}
        for picture in stream.pictures(networks, prompts, sampler, progress=label, texts=texts):
            files[picture.prompt_id] = scratch / f"{len(files):05}.png"
            write_png(files[picture.prompt_id], picture.pixels)
        return Outputs(files)

    settled = {"recipe": merge.recipe(point).document, "sampler": asdict(sampler)}
    done = context.run(DRAWN.task(settled, {"prompts": prompts.digest}), f"draw {label}", work)
    return Contestant(label, made_of, done.files)


def _opened(swept: SweepSettings, alias: str, weights: str) -> Checkpoint:
    """Open a model of a sweep. Raises MissingObject where its file is gone or has changed since."""
    found = open_checkpoint(find_file(swept.models.get(alias) or ""), swept.family.name)
    if found.digest != weights:
        raise MissingObject(f"{found.path} has changed since the sweep: {alias} was {weights[:12]}….\nPut it back.")
    return found


def ranked(folder: Path, higher_is_better: bool) -> dict[str, tuple[str, str]]:
    """The points that were scored to the end, best first: label to kind and identity of the record.

    Of a race, those that were drawn on the most prompts; the record is that of the first rung.
    """
    found: list[tuple[int, float, str, tuple[str, str]]] = []
    for place in sorted(path for path in folder.glob("*/") if path.is_dir()):
        rungs = sorted(place.glob("prompts-*"), key=lambda path: int(path.name.split("-")[1])) or [place]
        point = read_json(rungs[0] / "point.json")
        outcomes = [outcome for rung in rungs if (outcome := read_outcome(rung))]
        values = [outcome.value for outcome in outcomes if outcome.done and isinstance(outcome.value, Mapping)]
        rows = [row for value in values for row in value["rows"]]
        known = [row for row in rows if row == row]
        if point and known and not point["cheap"]:
            mean = sum(known) / len(known) * (1 if higher_is_better else -1)
            found.append((len(rows), mean, point["label"], (values[0]["kind"], values[0]["identity"])))
    if not found:
        raise BadInput(f"{folder} holds no point that was scored to the end.")
    longest = max(found)[0]
    kept = [one for one in found if one[0] == longest]
    return {label: record for _, _, label, record in sorted(kept, key=lambda one: (-one[1], one[2]))}
