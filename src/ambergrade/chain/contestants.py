"""Brings the pictures that a vote is on: folders of pictures as they are, models and points of a sweep drawn anew.

A sweep keeps a few pictures of each point only, on the prompts that it was chosen by. People vote on held-out ones, so
points are merged live again from what their records say; what was drawn for an earlier ballot is not drawn again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ambergrade.chain.context import Context, Stage
from ambergrade.chain.point import LiveMerge, LiveNetworks, Point, open_checkpoint
from ambergrade.chain.settings import FamilySettings, MergeFormula, SweepSettings
from ambergrade.chain.vote import Contestant
from ambergrade.errors import BadInput, BadSetting, MissingObject, UnknownName
from ambergrade.generate import stream
from ambergrade.generate.contact_sheet import write_png
from ambergrade.identity import digest, file_digest
from ambergrade.merge.files import RecipeFile, read_recipe
from ambergrade.merge.find import find_inputs
from ambergrade.merge.formula import Formula
from ambergrade.merge.inputs import Digests, default_cache
from ambergrade.nouns import Checkpoint, PromptSet, SamplerSettings
from ambergrade.score.pictures import SUFFIXES, folder_pictures, folder_prompts
from ambergrade.search.folder import read_outcome
from ambergrade.store import BUILTIN, Outputs, find_file, read_json, write_json
from ambergrade.track.journal import Run
from ambergrade.typed import settings

DRAWN = Stage("drawn", 1)
"""Pictures of one model for people to look at."""
DRAWING = "drawing.json"
"""The file of a sweep's folder that says what its points are drawn from."""
MOST_BYTES = 1 << 20


@dataclass(frozen=True)
class Drawing:
    """What a sweep's points are drawn from, beside what their records say."""

    experiment: str
    """Of MLflow."""
    key: str
    """Of the run in MLflow that shows the sweep."""
    objective: str
    higher_is_better: bool
    family: FamilySettings
    models: Mapping[str, str | None]
    """Alias to file."""
    heldout: str
    """The file of prompts that nothing was chosen on."""
    heldout_count: int | None = None


@dataclass(frozen=True)
class Chosen:
    """Whose pictures are laid side by side, and what they are of."""

    contestants: tuple[Contestant, ...]
    prompts: PromptSet
    how: Mapping[str, Any]
    """The sampler; empty for pictures that came as files."""


def is_pictures(folder: Path) -> bool:
    """Say whether a folder holds pictures to vote on, and is neither a model nor a release."""
    models = ("model_index.json", "MANIFEST.json", DRAWING)
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
) -> tuple[Chosen, Drawing]:
    """Draw points of a sweep: those named as tables name them, else the `most` best by the sweep's objective.

    prompts: in place of the sweep's held-out ones. Raises MissingObject for records or models that are gone.
    """
    about = read_drawing(folder)
    ranked = _ranked(folder, about.higher_is_better)
    unknown = [label for label in points if label not in ranked]
    if unknown:
        raise UnknownName("Point", unknown[0], ranked, "Points are named as the leaderboard names them.")
    records = {label: ranked[label] for label in points or list(ranked)[:most]}
    shown = (prompts or PromptSet.read(find_file(about.heldout), "heldout").first(about.heldout_count)).first(count)
    live, how = LiveNetworks(about.family, context.device), None
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
            alias: _opened(about, alias, recipe["inputs"][alias]) for alias in formula.models if alias not in opened
        }
        chosen = MergeFormula(recipe["formula"], recipe["coefficients"], recipe["dtype"], recipe["policies"])
        merge = LiveMerge(chosen, opened, live)
        made.append(_drawn(context, merge, recipe["coefficients"], digest(recipe), label, shown, sampler))
    assert how is not None, folder
    return Chosen(tuple(made), shown, asdict(how)), about


def keep_drawing(context: Context, folder: Path, sweep: SweepSettings) -> None:
    """Write down beside a sweep what its points are drawn from; the run above shows it."""
    about = Drawing(
        experiment=context.journal.name,
        key=context.parent.key,
        objective=sweep.search.objective,
        higher_is_better=sweep.search.higher_is_better,
        family=sweep.family,
        models=sweep.models,
        heldout=sweep.prompts.heldout,
        heldout_count=sweep.prompts.heldout_count,
    )
    write_json(folder / DRAWING, asdict(about))


def read_drawing(folder: Path) -> Drawing:
    """Read what a sweep's points are drawn from. Raises BadInput for a folder that does not say it."""
    found = read_json(folder / DRAWING)
    if not isinstance(found, Mapping):
        raise BadInput(f"{folder} is no sweep that can be drawn again: it has no {DRAWING}.\nRun its command again.")
    return settings(Drawing, found)


@dataclass(frozen=True)
class Released:
    """What a release folder says for a vote; it may come from anybody."""

    label: str
    model: Path
    recipe: RecipeFile
    sampler: SamplerSettings
    prompts: PromptSet | None
    family: str | None
    manifest: str
    """sha256 of its MANIFEST.json, by which its run in MLflow is found."""

    @classmethod
    def read(cls, folder: Path) -> Released:
        """Raises BadInput for a folder that is no release."""
        recipe = read_recipe(folder / "recipe.yaml")
        name = str(recipe.result.get("name", ""))
        model = folder / name
        if not name or Path(name).name != name or not model.is_file():
            raise BadInput(f"{folder} is no release: its recipe.yaml names no file that lies beside it.")
        prompts, facts = folder / "prompts.jsonl", _object(folder / "release.json")
        family = facts.get("family")
        return cls(
            label=folder.resolve().name,
            model=model,
            recipe=recipe,
            sampler=settings(SamplerSettings, _object(folder / "evaluation.json").get("sampler") or {}, "sampler"),
            prompts=PromptSet.read(prompts, "prompts") if prompts.is_file() else None,
            family=family if isinstance(family, str) else None,
            manifest=file_digest(folder / "MANIFEST.json"),
        )

    def base(self, folders: Sequence[Path]) -> tuple[str, Path]:
        """Find the first model of its formula, by digest. Raises MissingObject with where it was looked for."""
        alias = self.recipe.formula.models[0]
        if alias in self.recipe.paths:
            return alias, self.recipe.paths[alias]
        wanted = {alias: self.recipe.digests[alias]}
        known = Digests(default_cache())
        places = [folder for folder in (self.model.parent / "parents", *folders, BUILTIN) if folder.is_dir()]
        for folder in places:
            try:
                return alias, find_inputs(wanted, folder, known, names=[f"{alias}.safetensors"]).paths[alias]
            except MissingObject:
                continue
        raise MissingObject(
            f"The release is voted against its base {alias}, sha256 {digest_told(wanted[alias])}, which is in none of "
            f"{', '.join(map(str, places))}.\nGive the folder that holds it: --models DIR, or name another model."
        )


def digest_told(digests: Mapping[str, str]) -> str:
    """The shorter of what a file is known by, to be read."""
    return next(iter(digests.values()))[:12] + "…"


def _object(file: Path) -> Mapping[str, Any]:
    """A JSON object of a folder that may come from anybody; an empty one where there is none."""
    if not file.is_file() or file.stat().st_size > 16 * MOST_BYTES:
        return {}
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file} is no JSON: {str(error)[:120]}.") from None
    return found if isinstance(found, dict) else {}


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


def _opened(about: Drawing, alias: str, weights: str) -> Checkpoint:
    """Open a model of a sweep. Raises MissingObject where its file is gone or has changed since."""
    found = open_checkpoint(find_file(about.models.get(alias) or ""), about.family.name)
    if found.digest != weights:
        raise MissingObject(f"{found.path} has changed since the sweep: {alias} was {weights[:12]}….\nPut it back.")
    return found


def _ranked(folder: Path, higher_is_better: bool) -> dict[str, tuple[str, str]]:
    """The points that were scored to the end, best first: label to kind and identity of the record.

    Of a race, those that were drawn on the most prompts; the record is that of the first rung.
    """
    found: list[tuple[int, float, str, tuple[str, str]]] = []
    for file in sorted(folder.glob("*/point.json")):
        point = read_json(file)
        rungs = sorted(file.parent.glob("prompts-*"), key=lambda path: int(path.name.split("-")[1]))
        outcomes = [outcome for place in (rungs or [file.parent]) if (outcome := read_outcome(place))]
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
