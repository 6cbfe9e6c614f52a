"""The actions of pipelines/evaluate.py: here generation, scoring, the journal and the report meet."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import stages
import torch
from PIL import Image
from recording import record

from ambergrade.errors import BadInput
from ambergrade.family import sdxl
from ambergrade.generate import stream
from ambergrade.generate.contact_sheet import write_png
from ambergrade.generate.fast import accelerate, drawn_ahead
from ambergrade.generate.post import postprocessor
from ambergrade.generate.texts import TextEncoder
from ambergrade.identity import digest, file_digest, random_seed
from ambergrade.nouns import Picture, Prompt, PromptSet
from ambergrade.score.adherence import per_tag
from ambergrade.score.choice import choose
from ambergrade.score.comparison import Noise, aggregates, differences, family, kernel_noise, remarks
from ambergrade.score.features import feature_source
from ambergrade.score.metrics.control_response import ControlResponse
from ambergrade.score.pictures import folder_pictures, folder_prompts
from ambergrade.score.reference import build_reference, listed, read_rgb
from ambergrade.score.report import html_choice, html_report
from ambergrade.score.scoring import load_metric, metric_class, score
from ambergrade.score.sheet import ScoreSheet, refuse_unlike
from ambergrade.score.tagger import Tagger, rates_of, write_rates
from ambergrade.store import Finished, Outputs, Store, find_file, link_or_copy
from ambergrade.track.journal import Journal, Run
from ambergrade.track.lookup import registered_checkpoint

Settings = dict[str, Any]
WHERE = ("root", "compute", "debug", "out", "name", "baseline", "primary")
"""Settings that change no number of a sheet."""


def score_pictures(settings: Settings) -> None:
    """Draw or read the pictures, score them, write the sheet and the report."""
    stages.use_threads(settings["compute"])
    root = Path(settings["root"])
    baseline = ScoreSheet.read(find_file(settings["baseline"])) if settings["baseline"] else None
    journal = Journal.open(root, settings["name"])
    prompts = read_prompts(settings)
    what = {key: value for key, value in settings.items() if key not in WHERE}
    with journal.run(_title(settings), key=digest([what, prompts.digest]), kind="chain") as parent:
        record(parent, settings)
        parent.datasets({"prompts": prompts.digest})
        chain = stages.Chain(settings, journal, parent)
        contrast, noise = None, {}
        if settings["model"]:
            subject = _Model(chain)
            done = subject.stage("score", prompts, chain.metrics)
            if "contrast" in settings["suite"]:
                control = load_metric(**settings["suite"]["contrast"], device=chain.device)
                assert isinstance(control, ControlResponse)
                drawn = subject.stage("control response", control.prompts(prompts), [control])
                contrast = ScoreSheet.read(drawn.files["scores"])
            if settings["noise_batch"]:
                noise = _kernel_noise(subject, prompts, done)
        else:
            done = _score_folder(chain, prompts)
        sheet = ScoreSheet.read(done.files["scores"])
        if baseline is not None:
            refuse_unlike(sheet, baseline)
        folder = Path(settings["out"] or root / "mlruns" / "reports" / done.identity[:12])
        for name in ("scores", "per_tag"):
            link_or_copy(done.files[name], folder / f"{name}{'.parquet' if name == 'scores' else '.csv'}")
        find = partial(_find, done.files, Path(settings["pictures"]) if settings["pictures"] else None)
        text = html_report(
            sheet,
            title=_title(settings),
            facts=_told(settings, sheet, prompts),
            primary=_primary(settings, sheet),
            prompts=prompts,
            find=find,
            baseline=baseline,
            contrast=contrast,
            noise=noise,
        )
        (folder / "report.html").write_text(text)
        parent.metrics(aggregates(sheet))
        parent.metrics({f"noise_{name}": found.largest for name, found in noise.items()})
        if not parent.done:
            parent.file(folder / "report.html")
            parent.file(folder / "per_tag.csv")
    _print(sheet, baseline)
    for name, found in noise.items():
        print(f"  another batch moves {name:<24}by {found.typical:.2g} (largest {found.largest:.2g})")
    print(f"report  {folder / 'report.html'}\nsheet   {folder / 'scores.parquet'}")
    for trouble in journal.troubles:
        print(f"not journaled: {trouble}")


class _Model:
    """A checkpoint whose pictures are drawn; it is loaded when the first picture is needed."""

    def __init__(self, chain: stages.Chain) -> None:
        self.chain, named = chain, chain.settings["model"]
        root = Path(chain.settings["root"])
        path = registered_checkpoint(root, named) if named.startswith("models:/") else find_file(named)
        self.checkpoint = stages.open_checkpoint(path, chain.settings["family"]["name"])
        usual = {"precision": "fp32", "compiled": False}
        self.how = {key: chain.settings[key] for key, value in usual.items() if chain.settings[key] != value}

    @cached_property
    def networks(self) -> sdxl.Networks:
        found = sdxl.load(self.checkpoint.path, self.chain.family_config, device=self.chain.device)
        if self.how:
            dtype = torch.bfloat16 if "precision" in self.how else torch.float32
            accelerate(found, dtype=dtype, compiled="compiled" in self.how)
        return found

    @cached_property
    def texts(self) -> TextEncoder:
        return TextEncoder(self.networks)

    def stage(
        self,
        title: str,
        prompts: PromptSet,
        metrics: list[Any],
        *,
        among: PromptSet | None = None,
        batch: int | None = None,
    ) -> Finished:
        """Pictures of every prompt, kept, and their scores; scoring runs while the next pictures are drawn.

        `among`: the set that the prompts are scored among (`clip_margin` compares with the others), by default they.
        """
        chain, post = self.chain, self.chain.settings["post"]
        sampler = replace(chain.sampler, batch=batch or chain.sampler.batch)

        def work(scratch: Path, run: Run) -> Outputs:
            drawn: Iterator[Picture] = drawn_ahead(
                stream.pictures(self.networks, prompts, sampler, progress=None, faulty=True, texts=self.texts),
                ahead=2 * sampler.batch,
            )
            if post:
                drawn = postprocessor(find_file(post), device=chain.device)(drawn)
            kept: dict[str, Path] = {}
            pictures = _kept(drawn, scratch, kept)
            known = _unique(among or prompts)
            sheet = score(pictures, known, metrics, sampler=sampler, how=self.how, progress=title)
            return _outputs(sheet, scratch, kept)

        about = {"sampler": asdict(sampler), "title": title, **self.how}
        scorers = digest({metric.name: metric.fingerprint for metric in metrics})
        inputs = {"model": self.checkpoint.digest, "prompts": prompts.digest, "scorers": scorers}
        if among:
            inputs["among"] = among.digest
        if post:
            inputs["post"] = file_digest(find_file(post))
        return chain.stage(title, "evaluation", 3, about, inputs, work, _journal)


def _kernel_noise(subject: _Model, prompts: PromptSet, done: Finished) -> dict[str, Noise]:
    """An A/A row: the first prompts drawn again in another batch."""
    settings, chain = subject.chain.settings, subject.chain
    some = prompts.first(settings["noise_count"])
    again = subject.stage("kernel noise", some, chain.metrics, among=prompts, batch=settings["noise_batch"])
    found = kernel_noise(*(ScoreSheet.read(one.files["scores"]) for one in (done, again)))
    keys = [f"{prompt.id} {prompt.seed}" for prompt in some.prompts]
    both = [key for key in keys if key in done.files and key in again.files]
    apart = [np.abs(_pixels(done.files[key]) - _pixels(again.files[key])) for key in both]
    moved = np.array([pixels.mean() for pixels in apart])
    print(f"  in a batch of {settings['noise_batch']} pixels move by {moved.mean():.3g} levels on average, ", end="")
    print(f"{max(pixels.max() for pixels in apart):.0f} at most ({len(both)} pictures)")
    return found


def _pixels(file: Path) -> Any:
    return read_rgb(file).astype(np.float64)


def _score_folder(chain: stages.Chain, prompts: PromptSet) -> Finished:
    folder = Path(chain.settings["pictures"])
    found = folder_pictures(folder, prompts)

    def read() -> Iterator[Picture]:
        for (key, seed), path in found.items():
            try:
                yield Picture(key, seed, read_rgb(path))
            except BadInput as error:
                yield Picture(key, seed, np.empty((0, 0, 3), np.uint8), fault=str(error))

    def work(scratch: Path, run: Run) -> Outputs:
        return _outputs(score(read(), prompts, chain.metrics, progress="score"), scratch, {})

    inputs = {
        "pictures": digest({f"{key} {seed}": file_digest(path) for (key, seed), path in found.items()}),
        "prompts": prompts.digest,
        "scorers": chain.scorers,
    }
    return chain.stage("score the folder", "evaluation", 3, {}, inputs, work, _journal)


def compare(settings: Settings) -> None:
    """Sheets against a baseline, paired; needs no model. Several sheets, or margins, are a choice."""
    if not isinstance(settings["sheet"], str) or settings["margins"]:
        _choose(settings)
        return
    sheet, baseline = (ScoreSheet.read(find_file(settings[name])) for name in ("sheet", "baseline"))
    refuse_unlike(sheet, baseline)
    name = digest([sheet.digest, baseline.digest])[:12]
    folder = Path(settings["out"] or Path(settings["root"]) / "mlruns" / "reports" / name)
    facts = {"sheet": settings["sheet"], "baseline": settings["baseline"], "pictures": f"{sheet.n} each"}
    folder.mkdir(parents=True, exist_ok=True)
    text = html_report(sheet, title="Two score sheets, paired", facts=facts, baseline=baseline)
    (folder / "comparison.html").write_text(text)
    _print(sheet, baseline)
    print(f"report  {folder / 'comparison.html'}")


def _choose(settings: Settings) -> None:
    files = [settings["sheet"]] if isinstance(settings["sheet"], str) else settings["sheet"]
    sheets = {label: ScoreSheet.read(find_file(file)) for label, file in zip(labels(files), files, strict=True)}
    baseline = ScoreSheet.read(find_file(settings["baseline"]))
    primary, margins = settings["primary"], settings["margins"]
    apart = family(sheets, baseline, primary)
    found = choose(sheets, baseline, primary=primary, margins=margins)
    name = digest([*(sheet.digest for sheet in sheets.values()), baseline.digest, margins])[:12]
    folder = Path(settings["out"] or Path(settings["root"]) / "mlruns" / "reports" / name)
    facts = {"baseline": settings["baseline"], "points": str(len(sheets)), "pictures": f"{baseline.n} each"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "choice.html").write_text(html_choice(found, apart, facts=facts, primary=primary, margins=margins))
    for label, d in apart.items():
        mark = "*" if label in found.winners else " "
        told = "misses " + ", ".join(found.failed[label]) if label in found.failed else "keeps the margins"
        front = ", Pareto front" if label in found.front else ""
        print(f"{mark} {label:<28}{primary} {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}] {d.verdict}; {told}{front}")
    print(f"* cannot be told from the best by {primary} among those that keep every margin; intervals hold all at once")
    print(f"report  {folder / 'choice.html'}")


def labels(files: Sequence[str]) -> list[str]:
    """A short name for every file: its last parts, as many as tell them apart."""
    parts = [Path(file).with_suffix("").parts for file in files]
    for count in range(1, max(map(len, parts)) + 1):
        found = ["/".join(some[-count:]) for some in parts]
        if len(set(found)) == len(files):
            return found
    raise BadInput("A sheet is named twice.\nGive every sheet once.")


def build_references(settings: Settings) -> None:
    """Statistics of real pictures for every extractor of the suite: <root>/mlruns/references/<name>/<extractor>.npz."""
    stages.use_threads(settings["compute"])
    root = Path(settings["root"]) / "mlruns"
    metrics = [one for one in settings["suite"]["metrics"].values() if "extractor" in one]
    if not metrics:
        raise BadInput("The suite has no metric that compares with real pictures.\nGive suite=full.")
    given, pictures = find_file(settings["reference"]), settings["reference_pictures"]
    if given.is_dir():
        files = [path for path in sorted(given.iterdir()) if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
    else:
        files = listed(given, find_file(pictures) if pictures else given.parent)
    for extractor in dict.fromkeys(one["extractor"] for one in metrics):
        source = feature_source(extractor, device=_device(settings))
        made = build_reference(source, files)
        aside = root / "references" / settings["name"] / f"{source.key}.npz"
        made.write(aside)
        sha256 = Store(root / "store").put(aside)
        print(f"{extractor:<24}{made.m} pictures, {made.d} features  sha256 {sha256}\n  {aside}")
    print(f"use it: reference={root / 'references' / settings['name']}")


def calibrate(settings: Settings) -> None:
    """The tagger's true and false positive rates on pictures whose tags are known: a rates.csv."""
    stages.use_threads(settings["compute"])
    prompts = read_prompts({**settings, "count": None})
    tagger = Tagger(settings["tagger"], device=_device(settings))
    found = list(folder_pictures(Path(settings["pictures"]), prompts).items())
    by_id = prompts.by_id()

    def batches() -> Iterator[tuple[list[Any], list[tuple[str, ...]]]]:
        for start in range(0, len(found), 32):
            some = found[start : start + 32]
            yield [read_rgb(path) for _, path in some], [by_id[key].tags for (key, _), _ in some]

    rows = rates_of(tagger, batches())
    folder = Path(settings["out"] or Path(settings["root"]) / "mlruns" / "references")
    write_rates(folder / f"{settings['name']}.rates.csv", rows)
    weak = sorted((row for row in rows if row["tpr"] - row["fpr"] < 0.3), key=lambda row: row["tag"])
    print(f"{len(rows)} tags measured on {len(found)} pictures; {len(weak)} with TPR - FPR < 0.3 are never corrected:")
    print("  " + (", ".join(row["tag"] for row in weak) or "none"))
    print(f"use it: suite.metrics.tag_adherence.rates={folder / settings['name']}.rates.csv")


def read_prompts(settings: Settings) -> PromptSet:
    """The prompts that are asked for; `seeds` above 1 repeats each with further seeds."""
    file, folder = settings["prompts"], settings["pictures"]
    if file:
        found = PromptSet.read(find_file(file))
    elif folder:
        metrics = settings["suite"]["metrics"].values() if settings["action"] == "score" else []
        needed = settings["action"] != "score" or any(metric_class(one["name"]).needs_prompts for one in metrics)
        found = folder_prompts(Path(folder), settings["captions"]["rating"], needed=needed)
    else:
        from ambergrade.world.booru import write_prompts

        path = Path(settings["root"]) / "mlruns" / "prompts" / f"world-{settings['count'] or 200}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_prompts(path, seed=random_seed(7, "evaluate"), count=settings["count"] or 200)
        found = PromptSet.read(path, "world")
    found = found.first(settings["count"])
    if settings["seeds"] == 1 or folder:
        return found
    return PromptSet(found.name, tuple(p for prompt in found.prompts for p in _reseeded(prompt, settings["seeds"])))


def _reseeded(prompt: Prompt, seeds: int) -> list[Prompt]:
    more = [random_seed(prompt.seed, "further seed", k) % 2**32 for k in range(1, seeds)]
    return [Prompt(**{**prompt.__dict__, "seed": seed}) for seed in (prompt.seed, *more)]


def _unique(prompts: PromptSet) -> PromptSet:
    """Each prompt once: several seeds of a prompt are rows of one."""
    return PromptSet(prompts.name, tuple(prompts.by_id().values()))


def _kept(pictures: Iterator[Picture], scratch: Path, kept: dict[str, Path]) -> Iterator[Picture]:
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


def _find(files: Mapping[str, Path], folder: Path | None, prompt_id: str, seed: int) -> Any:
    kept = files.get(f"{prompt_id} {seed}")
    if kept is not None:
        with Image.open(kept) as image:
            return np.asarray(image.convert("RGB"))
    if folder is not None:
        found = [path for path in sorted(folder.rglob("*")) if path.stem in (prompt_id, f"{prompt_id}-{seed}")]
        shown = [path for path in found if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
        return read_rgb(shown[0]) if shown else None
    return None


def _primary(settings: Settings, sheet: ScoreSheet) -> str:
    return settings["primary"] if settings["primary"] in sheet.columns else ""


def _title(settings: Settings) -> str:
    return Path(settings["model"] or settings["pictures"]).name


def _told(settings: Settings, sheet: ScoreSheet, prompts: PromptSet) -> dict[str, str]:
    sampler = ", ".join(f"{key} {value}" for key, value in sheet.sampler.items()) or "not drawn here"
    prompted = f"{len(set(sheet.prompt_ids))} of {prompts.name}, {sheet.n} pictures"
    told = {"scored": settings["model"] or settings["pictures"], "prompts": prompted, "sampler": sampler}
    if settings["baseline"]:
        told["baseline"] = settings["baseline"]
    return told


def _device(settings: Settings) -> str:
    chosen: str = settings["compute"]["device"]
    return ("cuda" if torch.cuda.is_available() else "cpu") if chosen == "auto" else chosen


def _print(sheet: ScoreSheet, baseline: ScoreSheet | None) -> None:
    found = aggregates(sheet)
    apart = differences(sheet, baseline) if baseline is not None else {}
    for name, value in found.items():
        line = f"  {name:<28}{value.value:9.3f}  [{value.low:.3f}, {value.high:.3f}]  n {value.n}"
        if name in apart:
            d = apart[name]
            line += f"   {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}] {d.verdict}"
        print(line)
    for line in remarks(sheet):
        print(f"  note: {line}")
