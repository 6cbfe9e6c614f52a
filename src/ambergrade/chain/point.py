"""Scores one point of a merge: merged live, drawn on given prompts and seeds, and scored as it is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image

from ambergrade.chain.context import Context, Stage, Task
from ambergrade.chain.settings import FamilySettings, MergeFormula, PromptFiles, Suite
from ambergrade.errors import UnknownName
from ambergrade.family.load import family
from ambergrade.generate import stream
from ambergrade.generate.contact_sheet import write_png
from ambergrade.generate.texts import TextEncoder
from ambergrade.identity import digest
from ambergrade.merge.engine import merge as merge_files
from ambergrade.merge.formula import Formula
from ambergrade.merge.inputs import Digests, default_cache
from ambergrade.merge.job import Job, open_job
from ambergrade.merge.lora import lora_weights, read_lora
from ambergrade.merge.passes import placed
from ambergrade.merge.recipe import Recipe
from ambergrade.merge.resident import ResidentMerge
from ambergrade.nouns import Checkpoint, Picture, Prompt, PromptSet, SamplerSettings
from ambergrade.pictures import SUFFIXES, read_rgb
from ambergrade.score.comparison import aggregates, remarks
from ambergrade.score.scoring import Metric, load_metric, score
from ambergrade.score.sheet import ScoreSheet
from ambergrade.store import Finished, Outputs, copy_file, find_file
from ambergrade.track.journal import Run

if TYPE_CHECKING:
    from ambergrade.family.networks import Networks

Point = Mapping[str, float]

POINT = Stage("point", 2)
"""A point of a sweep on all of the sweep's prompts."""
RUNG = Stage("rung", 2)
"""A point of a race on the prompts that a rung adds."""
HELDOUT = Stage("heldout", 1)
"""A model on prompts that nothing was chosen on."""
MERGED = Stage("merge", 3)
"""A merge written as one file."""


@dataclass(frozen=True)
class Scoring:
    """What pictures are drawn and scored with."""

    sampler: SamplerSettings
    suite: Suite
    device: str

    @cached_property
    def metrics(self) -> list[Metric]:
        """The suite's scorers, loaded when first needed and then kept."""
        chosen = self.suite.metrics.values()
        return [load_metric(one.name, **one.parameters, device=self.device) for one in chosen]

    def at(self, sampler: SamplerSettings) -> Scoring:
        """The same scorers, loaded once, for pictures of another sampler."""
        if sampler == self.sampler:
            return self
        other = replace(self, sampler=sampler)
        vars(other)["metrics"] = self.metrics
        return other

    @cached_property
    def fingerprint(self) -> str:
        """Digest of what every scorer says it is made of."""
        return digest({metric.name: metric.fingerprint for metric in self.metrics})


class LiveNetworks:
    """The one set of networks that pictures are drawn with; a merge changes its weights in place."""

    def __init__(self, family: FamilySettings, device: str) -> None:
        self.family, self.device = family, device
        self._networks: Networks | None = None
        self._texts: tuple[object, TextEncoder] | None = None

    def filled(self, merge: ResidentMerge, point: Point, first: Path) -> Networks:
        """The networks with this point's weights; they are built from the file `first` the first time."""
        if self._networks is None:
            chosen = family(self.family.name).networks
            self._networks = chosen.load(first, find_file(self.family.config), device=self.device)
        merge.assign(self._networks.modules(), point)
        return self._networks

    def texts(self, key: object) -> TextEncoder:
        """The text encoder, with the prompts that it encoded while `key` (what made it and them) stayed the same."""
        if self._texts is None or self._texts[0] != key:
            assert self._networks is not None
            self._texts = (key, TextEncoder(self._networks))
        return self._texts[1]


class LiveMerge:
    """A formula over its models: read once, then merged in memory at any point."""

    def __init__(self, chosen: MergeFormula, models: Mapping[str, Checkpoint], live: LiveNetworks) -> None:
        self.chosen, self.live, self._models = chosen, live, models
        self.formula = Formula.parse(chosen.formula, models)
        self.loras = {alias: find_file(path) for alias, path in self.formula.lora_paths.items()}
        self.inputs = {alias: models[alias].digest for alias in self.formula.models}
        known = Digests(default_cache())
        self.inputs |= {alias: lora_weights(path, known) for alias, path in self.loras.items()}
        known.save()

    @cached_property
    def resident(self) -> ResidentMerge:
        read = family(self.live.family.name).read_checkpoint
        inputs = {alias: read(self._models[alias].path) for alias in self.formula.models}
        inputs |= {alias: read_lora(path) for alias, path in self.loras.items()}
        inputs = placed(inputs, self.live.device)
        return ResidentMerge(self.formula, inputs, dtype=self.chosen.dtype, policies=self.chosen.policies)

    def recipe(self, point: Point) -> Recipe:
        return Recipe(self.formula, point, self.inputs, self.chosen.dtype, self.chosen.policies)

    @property
    def paths(self) -> dict[str, Path]:
        """The file or folder of every input, by alias."""
        return {alias: self._models[alias].path for alias in self.formula.models} | self.loras

    def job(self, point: Point) -> Job:
        """The same merge over files, for writing it down."""
        dtype, policies = self.chosen.dtype, self.chosen.policies
        return open_job(self.formula, self.paths, coefficients=point, dtype=dtype, policies=policies)

    def alone(self, alias: str) -> LiveMerge:
        """One of its models by itself."""
        return LiveMerge(MergeFormula(alias, {}, self.chosen.dtype, self.chosen.policies), self._models, self.live)

    def of_dtype(self, dtype: str | None) -> LiveMerge:
        """The same merge, rounded to another precision; None keeps its own. What lies in memory of this one is left."""
        if dtype in (None, self.chosen.dtype):
            return self
        vars(self).pop("resident", None)  # one merge in memory
        return LiveMerge(replace(self.chosen, dtype=dtype), self._models, self.live)

    def networks(self, point: Point) -> Networks:
        """The live networks with this point's weights in them; no file is written."""
        return self.live.filled(self.resident, point, self._models[self.formula.models[0]].path)

    def texts(self, point: Point, prompts: PromptSet, batch: int) -> TextEncoder:
        """The point's text encoder, after `networks`.

        It keeps encoded prompts between points whose text encoders are equal. The prompts and the batch are in the key
        too: in another batch the last bits of a text may differ, and with them a picture.
        """
        made_of = self.resident.made_of(point, "te1", "te2")
        return self.live.texts((self.inputs, self.chosen.dtype, made_of, prompts.digest, batch))


def open_checkpoint(path: Path, name: str) -> Checkpoint:
    """A checkpoint of the family `name`, with the digest of its weights."""
    return Checkpoint(path, name, family(name).weights_digest(path))


def read_prompts(files: PromptFiles, which: str) -> PromptSet:
    """The prompts of `sweep` or `heldout`."""
    chosen = {"sweep": (files.sweep, files.sweep_count), "heldout": (files.heldout, files.heldout_count)}
    if which not in chosen:
        raise UnknownName("prompt set", which, chosen)
    file, count = chosen[which]
    return PromptSet.read(find_file(file), which).first(count)


def find_originals(files: PromptFiles, which: str, prompts: Sequence[Prompt]) -> dict[str, Path]:
    """Find real pictures of what prompts ask for: `heldout/<id>.png` (or .jpg, .webp) beside `heldout.jsonl`."""
    folder = find_file({"sweep": files.sweep, "heldout": files.heldout}[which]).with_suffix("")
    known = {file.stem: file for file in sorted(folder.glob("*")) if file.suffix.lower() in SUFFIXES}
    return {prompt.id: known[prompt.id] for prompt in prompts if prompt.id in known}


def point_task(
    merge: LiveMerge,
    scoring: Scoring,
    point: Point,
    prompts: PromptSet,
    stage: Stage = POINT,
    among: PromptSet | None = None,
) -> Task:
    """What a point's scores are made of.

    `among`: the prompts among which these are scored, where they are not all: a rung's sheet must know every tag that
    the others ask for.
    """
    settings = {"recipe": merge.recipe(point).document, "sampler": asdict(scoring.sampler)}
    inputs = {"prompts": prompts.digest, "scorers": scoring.fingerprint}
    return stage.task(settings, inputs if among is None else {**inputs, "among": among.digest})


def score_point(
    context: Context,
    merge: LiveMerge,
    scoring: Scoring,
    point: Point,
    prompts: PromptSet,
    title: str,
    *,
    stage: Stage = POINT,
    among: PromptSet | None = None,
    kept: int = 8,
    line: str = "",
    journaled_as: str = "",
    params: Mapping[str, object] | None = None,
) -> Finished:
    """Draw and score one point. Its files: `scores` (parquet), `pictures` (the first `kept`, side by side).

    `params`: of its run, beside the point's own numbers.
    """

    def work(scratch: Path, run: Run) -> Outputs:
        shown: list[Picture] = []

        def remembered(pictures: Iterator[Picture]) -> Iterator[Picture]:
            for picture in pictures:
                if len(shown) < kept:
                    shown.append(picture)
                yield picture

        networks = merge.networks(point)
        texts = merge.texts(point, prompts, scoring.sampler.batch)
        drawn = stream.pictures(networks, prompts, scoring.sampler, progress=None, texts=texts)
        sheet = score(remembered(drawn), among or prompts, scoring.metrics, sampler=scoring.sampler, progress=title)
        sheet.write(scratch / "scores.parquet")
        write_png(scratch / "pictures.png", np.concatenate([picture.pixels for picture in shown], axis=1))
        found = {name: asdict(value) for name, value in aggregates(sheet).items()}
        files = {"scores": scratch / "scores.parquet", "pictures": scratch / "pictures.png"}
        return Outputs(files, {"aggregates": found, "remarks": remarks(sheet)})

    def journal(run: Run, done: Finished) -> None:
        run.metrics(aggregates(ScoreSheet.read(done.files["scores"])))
        show_pictures(run, done, prompts, scoring.sampler.width)

    task = point_task(merge, scoring, point, prompts, stage, among)
    shown = {**point, **(params or {})}
    return context.run(task, title, work, journal=journal, params=shown, line=line, journaled_as=journaled_as)


def write_merge(context: Context, merge: LiveMerge, point: Point, file: Path) -> tuple[Checkpoint, Finished]:
    """Write the merge of one point as one file, once, and put a copy at `file`."""

    def work(scratch: Path, run: Run) -> Outputs:
        # From the files, so that the header names them by sha256 and `verify` rebuilds it; the bits are the live ones.
        merge_files(merge.job(point), scratch / "merged.safetensors", threads=context.compute.threads)
        return Outputs({"checkpoint": scratch / "merged.safetensors"})

    task = MERGED.task(merge.recipe(point).document, merge.inputs)
    done = context.run(task, "merge the winner", work, params=dict(point))
    copy_file(done.files["checkpoint"], file)
    return open_checkpoint(file, merge.live.family.name), done


def show_pictures(run: Run, done: Finished, prompts: PromptSet, width: int) -> None:
    """Put a point's kept pictures on a run's page, one by one, so that the UI lays points side by side."""
    for prompt, pixels in zip(prompts.prompts, cut(done.files["pictures"], width), strict=False):
        run.picture(f"{prompts.name}/{prompt.id}", Image.fromarray(pixels))


def cut(strip: Path, width: int) -> list[npt.NDArray[np.uint8]]:
    """The pictures that lie side by side in a file, each `width` pixels wide."""
    pixels = read_rgb(strip)
    return [pixels[:, start : start + width] for start in range(0, pixels.shape[1], width)]


def label_of(point: Mapping[str, float | str | bool]) -> str:
    """Name a point as tables do: `a 0.8, b 0.5`."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in point.items()
    )
