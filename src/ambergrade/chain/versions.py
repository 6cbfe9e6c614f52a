"""Compares two releases, or two versions of one: what they are made of, their scores, their pictures side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ambergrade.errors import BadInput
from ambergrade.generate.contact_sheet import contact_sheet, write_png
from ambergrade.merge.plan import POLICIES
from ambergrade.nouns import Measurement
from ambergrade.pictures import read_rgb
from ambergrade.release.facts import ReleaseFacts, Sample, read_facts
from ambergrade.release.sums import inside, shown
from ambergrade.score.comparison import aggregates, differences
from ambergrade.score.sheet import ScoreSheet, suspected
from ambergrade.score.statistics import PairedDifference, interval_text

MOST_PICTURES = 8


@dataclass(frozen=True)
class Version:
    """One of the two releases."""

    folder: Path
    facts: ReleaseFacts

    @property
    def label(self) -> str:
        """Return its name and version."""
        return f"{self.facts.name} {self.facts.version}"

    @property
    def sheet(self) -> ScoreSheet:
        """Return the released model's scores. Raises BadInput where they are missing or damaged."""
        evaluation = self.facts.evaluation
        return ScoreSheet.read(inside(self.folder, evaluation.sheets[evaluation.released]))

    @property
    def about(self) -> dict[str, str]:
        """Return what it is made of and how it was scored, one text a line of the table."""
        facts, recipe, sampler = self.facts, self.facts.recipe, self.facts.evaluation.sampler
        made = {"formula": " ".join(recipe.formula.split()) if recipe else "nobody knows"}
        made |= {name: f"{value:g}" for name, value in sorted(recipe.coefficients.items())} if recipe else {}
        made |= {alias: _parent(parent.digests) for alias, parent in sorted(facts.parents.items())}
        made["dtype"] = (recipe.dtype if recipe else None) or "its base's"
        made |= {f"policy {name}": value for name, value in _chosen(recipe.policies)} if recipe else {}
        made |= {"licence": facts.license, "weights": facts.weights.weights[:12], "file": facts.weights.file[:12]}
        if facts.training:
            made["trained"] = f"{facts.training.name} from {facts.training.base}, {facts.training.captions.recipe}"
        prompts = facts.evaluation.prompts
        made["prompts"] = f"{prompts.name}, {prompts.count:,}"
        made["sampler"] = f"{sampler.name}, {sampler.steps} steps, guidance {sampler.guidance:g}"
        made["size"] = f"{sampler.width}×{sampler.height} px"
        return made


def _chosen(policies: Mapping[str, str]) -> list[tuple[str, str]]:
    return sorted((name, value) for name, value in policies.items() if POLICIES.get(name) != value)


def _parent(digests: Mapping[str, str]) -> str:
    return next((f"{kind} {digests[kind][:12]}" for kind in ("weights", "file") if kind in digests), "not known")


def compare_releases(one: Path, other: Path, out: Path | None = None) -> str:
    """Compare two release folders; return plain text, and write their common pictures to the PNG `out`.

    Scores are paired, `other` minus `one`, where both were drawn from the same prompts, seeds and sampler and scored by
    the same scorers. Raises BadInput for what is no release, and for `out` where they have no picture in common.
    """
    versions = Version(one, read_facts(one)), Version(other, read_facts(other))
    lines = [f"A  {shown(versions[0].label)}", f"B  {shown(versions[1].label)}", "", *_made_of(*versions), ""]
    lines += _scored(*versions)
    if out is not None:
        count = write_pictures(*versions, out)
        lines += ["", f"pictures  {out}  {count} side by side"]
    return "\n".join(lines)


def _made_of(one: Version, other: Version) -> Iterator[str]:
    """Yield the table of what both are made of; what both have in common stands once."""
    ours, theirs = one.about, other.about
    width = max(len(name) for name in [*ours, *theirs])
    for name in dict.fromkeys([*ours, *theirs]):
        left, right = shown(ours.get(name, "–")), shown(theirs.get(name, "–"))
        label = shown(name).ljust(width)
        if left == right:
            yield f"{label}  A B  {left}"
        else:
            yield f"{label}  A    {left}"
            yield f"{' ' * width}    B  {right}"


def _scored(one: Version, other: Version) -> Iterator[str]:
    """Yield the scores of both and the paired differences, or why there are none."""
    sheets = {"A": one.sheet, "B": other.sheet}
    with suspected("The score sheets"):
        found = {label: aggregates(sheet) for label, sheet in sheets.items()}
    unlike, apart = "", {}
    try:
        with suspected("The pair of score sheets"):
            apart = differences(sheets["B"], sheets["A"])
    except BadInput as error:
        unlike = str(error)
    columns = dict.fromkeys([*one.facts.evaluation.columns, *other.facts.evaluation.columns])
    rows = [("", "A", "B", "B minus A, paired" if apart else "")]
    for name in columns:
        scores = [found[label].get(name) for label in sheets]
        known = [score for score in scores if score is not None]
        if known:
            arrow = "↑" if known[0].higher_is_better else "↓"
            difference = f"{_told(apart[name], '+')}  {apart[name].verdict}" if name in apart else ""
            rows.append((f"{name} {arrow}", _told(scores[0]), _told(scores[1]), difference))
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    yield from ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    yield "Brackets are 95 % intervals; ↑ higher is better, ↓ lower."
    if unlike:
        yield from ["", "Not paired, so only intervals that lie apart tell the two apart.", *unlike.splitlines()]


def _told(found: Measurement | PairedDifference | None, sign: str = "") -> str:
    if found is None or math.isnan(found.value):
        return "–"
    return f"{found.value:{sign}.3f} {interval_text(found.low, found.high, f'{sign}.3f')}"


def _drawn(version: Version) -> dict[tuple[object, ...], Sample]:
    """Return its sample pictures by what two of them must have in common to stand side by side."""
    sampler = version.facts.evaluation.sampler
    size = (sampler.name, sampler.steps, sampler.guidance, sampler.width, sampler.height)
    return {(sample.text, sample.negative, sample.seed, *size): sample for sample in version.facts.samples}


def write_pictures(one: Version, other: Version, out: Path) -> int:
    """Write the pictures that both drew from the same prompt, seed and sampler, a column each; return their number."""
    ours, theirs = _drawn(one), _drawn(other)
    both = [key for key in ours if key in theirs][:MOST_PICTURES]
    if not both:
        raise BadInput(
            f"{one.label} and {other.label} have no sample of the same prompt, seed and sampler: "
            "there is nothing to lay side by side."
        )
    rows = {
        f"{label}: {version.label}": {
            str(number): read_rgb(inside(version.folder, drawn[key].file)) for number, key in enumerate(both)
        }
        for label, version, drawn in (("A", one, ours), ("B", other, theirs))
    }
    captions = {str(number): f"{key[0]} (seed {key[2]})" for number, key in enumerate(both)}
    sampler = one.facts.evaluation.sampler
    told = f"same prompts and seeds, {sampler.steps} {sampler.name} steps, guidance {sampler.guidance:g}"
    write_png(out, contact_sheet(rows, title=f"{one.label} and {other.label}", subtitle=told, captions=captions))
    return len(both)
