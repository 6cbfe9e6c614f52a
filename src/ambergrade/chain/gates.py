"""Lets gates judge a candidate by what was measured of it, writes the verdict down, and moves the champion by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from ambergrade.chain.context import Context, Stage
from ambergrade.chain.numbers import measured
from ambergrade.chain.point import HELDOUT, LiveMerge, LiveNetworks, Scoring, open_checkpoint, score_point
from ambergrade.chain.settings import MergeFormula
from ambergrade.chain.vote import votes_between
from ambergrade.errors import BadInput
from ambergrade.nouns import Checkpoint, Measurement, PromptSet, Release
from ambergrade.release.facts import read_facts
from ambergrade.release.gate import Evidence, Judgement, judge, load_gates
from ambergrade.release.licenses import UNKNOWN
from ambergrade.score.comparison import aggregates, differences
from ambergrade.score.sheet import ScoreSheet
from ambergrade.store import Finished, Outputs
from ambergrade.track.journal import Run
from ambergrade.track.registry import Version
from ambergrade.typed import Plugin

GATE = Stage("gate", 1)


def judge_candidate(
    context: Context,
    gates: Mapping[str, Plugin],
    name: str,
    candidate: Checkpoint,
    base_weights: str | None,
    licence: Judgement,
    sheet: ScoreSheet,
    base: ScoreSheet | None,
    scoring: Scoring,
    live: LiveNetworks,
    prompts: PromptSet,
) -> dict[str, Judgement]:
    """Ask every gate about a registered candidate, and move the alias `champion` by what they say, which is returned.

    name: of the registered model. base_weights: digest of what it is compared with as `base`, if anything.
    licence: whether its parents' licences allow its own. sheet, base: scores of the candidate and of its base, if it
    has one, on `prompts`.

    The champion of this root, or the one before it if the candidate is champion already, is scored on the same
    prompts, so that what a gate sees of it is paired like everything else. The verdict is a record (`records/gate`), a
    run, and tags of the version; it is no part of the release folder, which is the same on every machine, where
    champions and vetoes are not.
    """
    loaded = load_gates({label: one.as_mapping for label, one in gates.items()})
    family = live.family.name
    rivals = {one.parameters.get(key) for one in gates.values() for key in ("than", "vote")}
    compared = {"base": compare(sheet, base)} if base is not None else {}
    inputs = {"weights": candidate.digest, "scores": sheet.digest}
    inputs |= {"base": base.digest} if base is not None else {}
    champion = context.journal.rival(name, candidate.digest) if "champion" in rivals else None
    if champion is not None:
        other = _champion_sheet(context, champion, scoring, live, prompts)
        compared["champion"] = Compared({}, "it could not be scored") if other is None else compare(sheet, other)
        inputs["champion"] = champion.digest
    opponents = {"base": base_weights, "champion": champion.digest if champion is not None else None}
    found = {whom: votes_between(context.ledger, candidate.digest, other) for whom, other in opponents.items() if other}
    votes = {whom: one.share for whom, one in found.items() if one is not None}
    judged = context.journal.version(name, candidate.digest)
    asked = {one.parameters["tag"] for one in gates.values() if "tag" in one.parameters}
    tags = {tag: value for tag, value in (judged.tags.items() if judged else ()) if tag in asked}
    tiny = tiny_scorers(scoring.suite.metrics, sheet)

    def work(scratch: object, run: Run) -> Outputs:
        apart = {whom: one.differences for whom, one in compared.items()}
        pairing = {whom: one.unlike for whom, one in compared.items()}
        made = judge(loaded, Evidence(family, aggregates(sheet), apart, tiny, tags, pairing, votes, licence))
        return Outputs(values={"gates": {label: asdict(one) for label, one in made.items()}})

    def journal(run: Run, done: Finished) -> None:
        verdict = _verdict(done)
        run.tags({f"gate.{label}": f"{'pass' if one.passed else 'fail'}: {one.told}" for label, one in verdict.items()})
        run.metrics({"gates_passed": sum(one.passed for one in verdict.values()), "gates": len(verdict)})

    settings = {"gates": {label: one.as_mapping for label, one in gates.items()}, "tags": tags, "tiny": tiny}
    settings |= {"votes": votes, "licence": licence}
    done = context.run(GATE.task({**settings, "family": family}, inputs), "gates", work, journal=journal)
    verdict = _verdict(done)
    for label, one in verdict.items():
        print(f"    {'pass' if one.passed else 'FAIL'}  {label:<26}{one.told}")
    lines = {label: (one.passed, one.told) for label, one in verdict.items()}
    print(f"  {name}: {context.journal.gated(name, candidate.digest, lines)}", flush=True)
    return verdict


@dataclass(frozen=True)
class Compared:
    """The candidate less another model."""

    differences: Mapping[str, Measurement]
    """None where the two cannot be paired."""
    unlike: str = ""
    """Why they cannot."""


def compare(sheet: ScoreSheet, other: ScoreSheet) -> Compared:
    """Compare two sheets, paired; sheets that are no pair give the reason instead of numbers."""
    try:
        return Compared(measured(differences(sheet, other)))
    except BadInput as error:
        return Compared({}, "; ".join(line.strip() for line in str(error).splitlines()[1:-1]))


def licence_of(made: Release) -> Judgement:
    """Say whether the licence of a release is known and its parents' licences allow it, as its facts have it."""
    facts = read_facts(made.path)
    return Judgement(facts.license != UNKNOWN, f"{facts.license}: {facts.license_why}")


def tiny_scorers(metrics: Mapping[str, Plugin], sheet: ScoreSheet) -> dict[str, bool]:
    """Scorer to whether it is one of the embedded world's."""
    return {
        name: any(str(value).startswith("builtin://") for value in metrics[name].parameters.values())
        for name in sheet.fingerprints
    }


def _champion_sheet(
    context: Context, champion: Version, scoring: Scoring, live: LiveNetworks, prompts: PromptSet
) -> ScoreSheet | None:
    """The champion's scores on these prompts; None where its file is gone."""
    if champion.path is None:
        print(f"    the champion, version {champion.number}, cannot be scored: its checkpoint is gone from the record")
        return None
    model = open_checkpoint(champion.path, live.family.name)
    merge = LiveMerge(MergeFormula("champion", {}), {"champion": model}, live)
    line = f"held out: champion, version {champion.number}"
    done = score_point(
        context, merge, scoring, {}, prompts, "champion", stage=HELDOUT, line=line, journaled_as="evaluation"
    )
    return ScoreSheet.read(done.files["scores"])


def _verdict(done: Finished) -> dict[str, Judgement]:
    return {label: Judgement(**one) for label, one in done.values["gates"].items()}
