"""Scores a model, or a folder of pictures: draws or reads, scores, and writes the sheet and a report."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from ambergrade.chain.context import Context, Stage, open_journal, record_command, use_threads
from ambergrade.chain.point import Scoring, open_checkpoint
from ambergrade.chain.settings import EvaluateSettings, Invocation
from ambergrade.errors import BadInput, BadSetting
from ambergrade.family.load import family
from ambergrade.generate import stream
from ambergrade.generate.contact_sheet import write_png
from ambergrade.generate.fast import accelerate, drawn_ahead
from ambergrade.generate.post import postprocessor
from ambergrade.generate.texts import TextEncoder
from ambergrade.identity import digest, file_digest, random_seed
from ambergrade.nouns import Picture, Prompt, PromptSet
from ambergrade.pictures import SUFFIXES, read_rgb
from ambergrade.score.adherence import per_tag
from ambergrade.score.comparison import Noise, aggregates, differences, kernel_noise, remarks
from ambergrade.score.metrics.control_response import ControlResponse
from ambergrade.score.pictures import folder_pictures, folder_prompts
from ambergrade.score.report import html_report
from ambergrade.score.scoring import Metric, load_metric, metric_class, score
from ambergrade.score.sheet import ScoreSheet, refuse_unlike
from ambergrade.score.statistics import interval_text
from ambergrade.store import Finished, Outputs, copy_file, find_file, written_aside
from ambergrade.track.journal import Run
from ambergrade.track.lookup import registered_checkpoint

if TYPE_CHECKING:
    from ambergrade.family.networks import Networks

EVALUATION = Stage("evaluation", 5)


def run(settings: EvaluateSettings, invocation: Invocation) -> None:
    """Do `settings.action`."""
    from ambergrade.chain import sheets

    other = {"compare": sheets.compare, "reference": sheets.build_references, "calibrate": sheets.calibrate}
    if settings.action == "score":
        score_pictures(settings, invocation)
    else:
        other[settings.action](settings)


def score_pictures(settings: EvaluateSettings, invocation: Invocation) -> None:
    """Draw or read the pictures, score them, write the sheet and the report."""
    use_threads(settings.compute)
    baseline = ScoreSheet.read(find_file(settings.baseline)) if settings.baseline else None
    journal = open_journal(settings.root, settings.name, settings, invocation)
    prompts = read_prompts(settings)
    what = settings.what("out", "name", "baseline", "primary")
    title = Path(settings.model or settings.pictures or "").name
    with journal.run(title, key=digest([what, prompts.digest]), kind="chain") as parent:
        record_command(parent, settings, invocation)
        parent.datasets({"prompts": prompts.digest})
        context = Context(settings.root, journal, parent, settings.compute)
        scoring = Scoring(settings.sampler, settings.suite, context.device)
        contrast, noise = None, {}
        if settings.model:
            subject = _Subject(context, settings, scoring)
            done = subject.score("score", prompts, scoring.metrics)
            if settings.suite.contrast:
                contrast = _contrast(subject, settings, prompts, context.device)
            if settings.noise_batch:
                noise = _kernel_noise(subject, prompts, done)
        else:
            done = _score_folder(context, settings, scoring, prompts)
        sheet = ScoreSheet.read(done.files["scores"])
        if baseline is not None:
            refuse_unlike(sheet, baseline)
        folder = settings.out or settings.root / "mlruns" / "reports" / done.identity[:12]
        copy_file(done.files["scores"], folder / "scores.parquet")
        copy_file(done.files["per_tag"], folder / "per_tag.csv")
        pictures = Path(settings.pictures) if settings.pictures else None
        text = html_report(
            sheet,
            title=title,
            facts=_facts(settings, sheet, prompts),
            primary=settings.primary if settings.primary in sheet.columns else "",
            prompts=prompts,
            find=partial(_find, done.files, pictures),
            baseline=baseline,
            contrast=contrast,
            noise=noise,
        )
        with written_aside(folder / "report.html") as aside:
            aside.write_text(text)
        parent.metrics(aggregates(sheet))
        parent.metrics({f"noise_{name}": found.largest for name, found in noise.items()})
        if not parent.done:
            parent.file(folder / "report.html")
            parent.file(folder / "per_tag.csv")
    print_scores(sheet, baseline)
    for name, found in noise.items():
        print(f"  another batch moves {name:<24}by {found.typical:.2g} (largest {found.largest:.2g})")
    print(f"report  {folder / 'report.html'}\nsheet   {folder / 'scores.parquet'}")
    context.close()


@dataclass(frozen=True)
class _Subject:
    """A checkpoint whose pictures are drawn; it is loaded when the first picture is needed."""

    context: Context
    settings: EvaluateSettings
    scoring: Scoring

    @cached_property
    def how(self) -> dict[str, object]:
        """What else moves pictures a little, and is in a sheet's identity where it is not usual."""
        usual: dict[str, object] = {"precision": "fp32", "compiled": False}
        given: dict[str, object] = {"precision": self.settings.precision, "compiled": self.settings.compiled}
        return {key: given[key] for key in usual if given[key] != usual[key]}

    @cached_property
    def path(self) -> Path:
        named = self.settings.model
        assert named is not None
        return registered_checkpoint(self.settings.root, named) if named.startswith("models:/") else find_file(named)

    @cached_property
    def digest(self) -> str:
        return open_checkpoint(self.path, self.settings.family.name).digest

    @cached_property
    def networks(self) -> Networks:
        chosen = self.settings.family
        found = family(chosen.name).networks.load(self.path, find_file(chosen.config), device=self.context.device)
        if self.how:
            dtype = torch.bfloat16 if self.settings.precision == "bf16" else torch.float32
            accelerate(found, dtype=dtype, compiled=self.settings.compiled)
        return found

    @cached_property
    def texts(self) -> TextEncoder:
        return TextEncoder(self.networks)

    def score(
        self,
        title: str,
        prompts: PromptSet,
        metrics: list[Metric],
        *,
        among: PromptSet | None = None,
        batch: int | None = None,
    ) -> Finished:
        """Keep the pictures of every prompt, and their scores; scoring runs while the next pictures are drawn.

        `among`: the set that the prompts are scored among (`clip_margin` compares with the others), by default they.
        """
        settings, post = self.settings, self.settings.post
        sampler = replace(settings.sampler, batch=batch or settings.sampler.batch)

        def work(scratch: Path, run: Run) -> Outputs:
            drawn: Iterator[Picture] = drawn_ahead(
                stream.pictures(self.networks, prompts, sampler, progress=None, faulty=True, texts=self.texts),
                ahead=2 * sampler.batch,
            )
            if post:
                drawn = postprocessor(find_file(post), device=self.context.device)(drawn)
            kept: dict[str, Path] = {}
            pictures = _kept(drawn, scratch, kept)
            known = _unique(among or prompts)
            sheet = score(pictures, known, metrics, sampler=sampler, how=self.how, progress=title)
            return _outputs(sheet, scratch, kept)

        inputs = {
            "model": self.digest,
            "prompts": prompts.digest,
            "scorers": digest({metric.name: metric.fingerprint for metric in metrics}),
        }
        if among:
            inputs["among"] = among.digest
        if post:
            inputs["post"] = file_digest(find_file(post))
        task = EVALUATION.task({"sampler": asdict(sampler), "title": title, **self.how}, inputs)
        return self.context.run(task, title, work, journal=_journal)


def _contrast(subject: _Subject, settings: EvaluateSettings, prompts: PromptSet, device: str) -> ScoreSheet:
    """Draw what the control response asks for, and score it."""
    chosen = settings.suite.contrast
    assert chosen is not None
    control = load_metric(chosen.name, **chosen.parameters, device=device)
    if not isinstance(control, ControlResponse):
        raise BadSetting(f"suite.contrast is {chosen.name}, where only control_response draws its own pictures.")
    drawn = subject.score("control response", control.prompts(prompts), [control])
    return ScoreSheet.read(drawn.files["scores"])


def _kernel_noise(subject: _Subject, prompts: PromptSet, done: Finished) -> dict[str, Noise]:
    """Draw the first prompts again in another batch: what rounding alone does to pictures and scores."""
    settings = subject.settings
    some = prompts.first(settings.noise_count)
    again = subject.score("kernel noise", some, subject.scoring.metrics, among=prompts, batch=settings.noise_batch)
    found = kernel_noise(*(ScoreSheet.read(one.files["scores"]) for one in (done, again)))
    keys = [f"{prompt.id} {prompt.seed}" for prompt in some.prompts]
    both = [key for key in keys if key in done.files and key in again.files]
    apart = [np.abs(_pixels(done.files[key]) - _pixels(again.files[key])) for key in both]
    moved = np.array([pixels.mean() for pixels in apart])
    print(f"  in a batch of {settings.noise_batch} pixels move by {moved.mean():.3g} levels on average, ", end="")
    print(f"{max(pixels.max() for pixels in apart):.0f} at most ({len(both)} pictures)")
    return found


def _pixels(file: Path) -> npt.NDArray[np.float64]:
    return read_rgb(file).astype(np.float64)


def _score_folder(context: Context, settings: EvaluateSettings, scoring: Scoring, prompts: PromptSet) -> Finished:
    """Score pictures that are there already."""
    found = folder_pictures(Path(settings.pictures or ""), prompts)
    post = find_file(settings.post) if settings.post else None

    def pictures() -> Iterator[Picture]:
        for (key, seed), path in found.items():
            try:
                yield Picture(key, seed, read_rgb(path))
            except BadInput as error:
                yield Picture(key, seed, np.empty((0, 0, 3), np.uint8), fault=str(error))

    def work(scratch: Path, run: Run) -> Outputs:
        read = pictures() if post is None else postprocessor(post, device=context.device)(pictures())
        return _outputs(score(read, prompts, scoring.metrics, progress="score"), scratch, {})

    inputs = {
        "pictures": digest({f"{key} {seed}": file_digest(path) for (key, seed), path in found.items()}),
        "prompts": prompts.digest,
        "scorers": scoring.fingerprint,
    }
    if post is not None:
        inputs["post"] = file_digest(post)
    return context.run(EVALUATION.task({}, inputs), "score the folder", work, journal=_journal)


def read_prompts(settings: EvaluateSettings) -> PromptSet:
    """The prompts that are asked for; `seeds` above 1 repeats each with further seeds."""
    file, folder, count = settings.prompts_path, settings.pictures, settings.count
    if file:
        found = PromptSet.read(find_file(file))
    elif folder:
        metrics = settings.suite.metrics.values() if settings.action == "score" else []
        needed = settings.action != "score" or any(metric_class(one.name).needs_prompts for one in metrics)
        found = folder_prompts(Path(folder), settings.captions.rating, needed=needed)
    else:
        from ambergrade.world.booru import write_prompts

        path = settings.root / "mlruns" / "prompts" / f"world-{count or 200}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as aside:
            write_prompts(aside, seed=random_seed(7, "evaluate"), count=count or 200)
        found = PromptSet.read(path, "world")
    found = found.first(count)
    if settings.seeds == 1 or folder:
        return found
    return PromptSet(found.name, tuple(p for prompt in found.prompts for p in _reseeded(prompt, settings.seeds)))


def _reseeded(prompt: Prompt, seeds: int) -> list[Prompt]:
    more = [random_seed(prompt.seed, "further seed", k) % 2**32 for k in range(1, seeds)]
    return [replace(prompt, seed=seed) for seed in (prompt.seed, *more)]


def _unique(prompts: PromptSet) -> PromptSet:
    """Each prompt once: several seeds of a prompt are rows of one."""
    return PromptSet(prompts.name, tuple(prompts.by_id().values()))


def _kept(pictures: Iterator[Picture], scratch: Path, kept: dict[str, Path]) -> Iterator[Picture]:
    """Pass pictures on, writing each as a PNG that `kept` names."""
    folder = scratch / "pictures"
    folder.mkdir(exist_ok=True)
    for number, picture in enumerate(pictures):
        if picture.fault:
            yield picture
            continue
        path = folder / f"{number:05}.png"
        write_png(path, picture.pixels)
        kept[f"{picture.prompt_id} {picture.seed}"] = path
        yield picture


def _outputs(sheet: ScoreSheet, scratch: Path, kept: Mapping[str, Path]) -> Outputs:
    sheet.write(scratch / "scores.parquet")
    rows = per_tag(sheet) if "tag_adherence" in sheet.fingerprints else []
    with (scratch / "per_tag.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]) if rows else ["tag"], lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    files = {"scores": scratch / "scores.parquet", "per_tag": scratch / "per_tag.csv", **kept}
    return Outputs(files, {"remarks": remarks(sheet)})


def _journal(run: Run, done: Finished) -> None:
    sheet = ScoreSheet.read(done.files["scores"])
    run.metrics(aggregates(sheet))
    run.text("\n".join(remarks(sheet)), "remarks.txt")


def _find(files: Mapping[str, Path], folder: Path | None, prompt_id: str, seed: int) -> npt.NDArray[np.uint8] | None:
    """The picture of a prompt: one that was drawn, or one of the folder."""
    kept = files.get(f"{prompt_id} {seed}")
    if kept is not None:
        return read_rgb(kept)
    if folder is not None:
        found = [path for path in sorted(folder.rglob("*")) if path.stem in (prompt_id, f"{prompt_id}-{seed}")]
        shown = [path for path in found if path.suffix.lower() in SUFFIXES]
        return read_rgb(shown[0]) if shown else None
    return None


def _facts(settings: EvaluateSettings, sheet: ScoreSheet, prompts: PromptSet) -> dict[str, str]:
    """What the report says of where the numbers come from."""
    sampler = ", ".join(f"{key} {value}" for key, value in sheet.sampler.items()) or "not drawn here"
    prompted = f"{len(set(sheet.prompt_ids))} of {prompts.name}, {sheet.n} pictures"
    facts = {"scored": settings.model or settings.pictures or "", "prompts": prompted, "sampler": sampler}
    return {**facts, "baseline": settings.baseline} if settings.baseline else facts


def print_scores(sheet: ScoreSheet, baseline: ScoreSheet | None) -> None:
    """Print every aggregate with its interval, beside the paired difference from a baseline."""
    apart = differences(sheet, baseline) if baseline is not None else {}
    for name, value in aggregates(sheet).items():
        line = f"  {name:<28}{value.value:9.3f}  {interval_text(value.low, value.high)}  n {value.n}"
        if name in apart:
            d = apart[name]
            line += f"   {d.value:+.3f} {interval_text(d.low, d.high, '+.3f')} {d.verdict}"
        print(line)
    for line in remarks(sheet):
        print(f"  note: {line}")
