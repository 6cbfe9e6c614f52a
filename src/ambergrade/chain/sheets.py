"""Works on what evaluations leave: compares score sheets, builds reference statistics, calibrates a tagger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ambergrade.chain.context import torch_device, use_threads
from ambergrade.chain.evaluation import print_scores, read_prompts
from ambergrade.chain.settings import EvaluateSettings
from ambergrade.errors import BadInput
from ambergrade.identity import digest
from ambergrade.pictures import SUFFIXES, read_rgb
from ambergrade.score.choice import choose
from ambergrade.score.comparison import family
from ambergrade.score.features import feature_source
from ambergrade.score.pictures import folder_pictures
from ambergrade.score.reference import build_reference, listed
from ambergrade.score.report import html_choice, html_report
from ambergrade.score.sheet import ScoreSheet, refuse_unlike
from ambergrade.score.statistics import interval_text
from ambergrade.score.tagger import Tagger, rates_of, write_rates
from ambergrade.store import Store, find_file, written_aside


def compare(settings: EvaluateSettings) -> None:
    """Compare sheets with a baseline, paired; needs no model. Several sheets, or margins, are a choice."""
    assert settings.sheet is not None
    assert settings.baseline is not None
    if not isinstance(settings.sheet, str) or settings.margins:
        _choose(settings, (settings.sheet,) if isinstance(settings.sheet, str) else settings.sheet, settings.baseline)
        return
    sheet, baseline = ScoreSheet.read(find_file(settings.sheet)), ScoreSheet.read(find_file(settings.baseline))
    refuse_unlike(sheet, baseline)
    folder = settings.out or settings.root / "mlruns" / "reports" / digest([sheet.digest, baseline.digest])[:12]
    facts = {"sheet": settings.sheet, "baseline": settings.baseline, "pictures": f"{sheet.n} each"}
    text = html_report(sheet, title="Two score sheets, paired", facts=facts, baseline=baseline)
    with written_aside(folder / "comparison.html") as aside:
        aside.write_text(text)
    print_scores(sheet, baseline)
    print(f"report  {folder / 'comparison.html'}")


def _choose(settings: EvaluateSettings, files: Sequence[str], base: str) -> None:
    """Choose among several sheets of one baseline: the best by the primary metric that keep every margin."""
    sheets = {label: ScoreSheet.read(find_file(file)) for label, file in zip(labels(files), files, strict=True)}
    baseline = ScoreSheet.read(find_file(base))
    primary, margins = settings.primary, settings.margins
    apart = family(sheets, baseline, primary)
    found = choose(sheets, baseline, primary=primary, margins=margins)
    name = digest([*(sheet.digest for sheet in sheets.values()), baseline.digest, margins])[:12]
    folder = settings.out or settings.root / "mlruns" / "reports" / name
    facts = {"baseline": base, "points": str(len(sheets)), "pictures": f"{baseline.n} each"}
    with written_aside(folder / "choice.html") as aside:
        aside.write_text(html_choice(found, apart, facts=facts, primary=primary, margins=margins))
    for label, d in apart.items():
        mark = "*" if label in found.winners else " "
        kept = "misses " + ", ".join(found.failed[label]) if label in found.failed else "keeps the margins"
        front = ", Pareto front" if label in found.front else ""
        print(
            f"{mark} {label:<28}{primary} {d.value:+.3f} {interval_text(d.low, d.high, '+.3f')} {d.verdict}; "
            f"{kept}{front}"
        )
    print(
        f"* not significantly different from the best by {primary} among those that keep every margin; intervals hold"
    )
    print(f"  all at once\nreport  {folder / 'choice.html'}")


def labels(files: Sequence[str]) -> list[str]:
    """A short name for every file: its last parts, as many as tell them apart."""
    parts = [Path(file).with_suffix("").parts for file in files]
    for count in range(1, max(map(len, parts)) + 1):
        found = ["/".join(some[-count:]) for some in parts]
        if len(set(found)) == len(files):
            return found
    raise BadInput("A sheet is named twice.\nGive every sheet once.")


def build_references(settings: EvaluateSettings) -> None:
    """Write statistics of real pictures for every extractor: <root>/mlruns/references/<name>/<extractor>.npz."""
    use_threads(settings.compute)
    assert settings.reference is not None
    root = settings.root / "mlruns"
    metrics = settings.suite.metrics.values()
    extractors = [str(one.parameters["extractor"]) for one in metrics if "extractor" in one.parameters]
    if not extractors:
        raise BadInput("The suite has no metric that compares with real pictures.\nGive suite=full.")
    given, pictures = find_file(settings.reference), settings.reference_pictures
    if given.is_dir():
        files = [path for path in sorted(given.iterdir()) if path.suffix.lower() in SUFFIXES]
    else:
        files = listed(given, find_file(pictures) if pictures else given.parent)
    for extractor in dict.fromkeys(extractors):
        source = feature_source(extractor, device=torch_device(settings.compute))
        made = build_reference(source, files)
        file = root / "references" / settings.name / f"{source.key}.npz"
        made.write(file)
        sha256 = Store(root / "store").put(file)
        print(f"{extractor:<24}{made.m} pictures, {made.d} features  sha256 {sha256}\n  {file}")
    print(f"use it: reference={root / 'references' / settings.name}")


def calibrate(settings: EvaluateSettings) -> None:
    """Write the tagger's true and false positive rates on pictures whose tags are known: a rates.csv."""
    use_threads(settings.compute)
    prompts = read_prompts(replace(settings, count=None))
    tagger = Tagger(settings.tagger, device=torch_device(settings.compute))
    found = list(folder_pictures(Path(settings.pictures or ""), prompts).items())
    by_id = prompts.by_id()

    def batches() -> Iterator[tuple[list[npt.NDArray[np.uint8]], list[tuple[str, ...]]]]:
        for start in range(0, len(found), 32):
            some = found[start : start + 32]
            yield [read_rgb(path) for _, path in some], [by_id[key].tags for (key, _), _ in some]

    rows = rates_of(tagger, batches())
    folder = settings.out or settings.root / "mlruns" / "references"
    write_rates(folder / f"{settings.name}.rates.csv", rows)
    weak = sorted((row for row in rows if row["tpr"] - row["fpr"] < 0.3), key=lambda row: row["tag"])
    print(f"{len(rows)} tags measured on {len(found)} pictures; {len(weak)} with TPR - FPR < 0.3 are never corrected:")
    print("  " + (", ".join(row["tag"] for row in weak) or "none"))
    print(f"use it: suite.metrics.tag_adherence.rates={folder / settings.name}.rates.csv")
