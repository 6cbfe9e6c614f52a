"""Gates at a chain's end: what was measured of the candidate is judged, written down, and moves the champion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stages import Chain, Merger, evaluate, open_checkpoint

from ambergrade.nouns import Checkpoint, Measurement, PromptSet
from ambergrade.release.gate import Evidence, Judgement, judge, load_gates
from ambergrade.score.comparison import aggregates, differences
from ambergrade.score.sheet import ScoreSheet
from ambergrade.store import Finished, Outputs
from ambergrade.track.journal import Run
from ambergrade.track.registry import Version


def gate(
    chain: Chain,
    candidate: Checkpoint,
    sheet: ScoreSheet,
    base: ScoreSheet,
    prompts: PromptSet,
    tiny: Mapping[str, bool],
) -> dict[str, Judgement]:
    """Ask every gate about a registered candidate, and move the alias `champion` by what they say, which is returned.

    The champion of this root, or the one before it if the candidate is champion already, is scored on the same held-out
    prompts, so that what a gate sees of it is paired like everything else. The verdict is a record (`records/gate`), a
    run, and tags of the version; it is no part of the release folder, which is the same on every machine, where
    champions and vetoes are not.
    """
    settings, name = chain.settings, chain.settings["release"]["name"]
    gates = load_gates(settings["gates"])
    whom = {chosen["than"] for chosen in settings["gates"].values() if "than" in chosen}
    apart: dict[str, Mapping[str, Measurement]] = {"base": _measured(differences(sheet, base))}
    inputs = {"weights": candidate.digest, "scores": sheet.digest, "base": base.digest}
    held = chain.journal.rival(name, candidate.digest) if "champion" in whom else None
    if held is not None:
        other = _scored(chain, held, prompts)
        apart["champion"] = {} if other is None else _measured(differences(sheet, other))
        inputs["champion"] = held.digest
    judged = chain.journal.version(name, candidate.digest)
    asked = {chosen["tag"] for chosen in settings["gates"].values() if "tag" in chosen}
    tags = {tag: value for tag, value in (judged.tags.items() if judged else ()) if tag in asked}

    def work(scratch: Path, run: Run) -> Outputs:
        family = settings["family"]["name"]
        made = judge(gates, Evidence(family, aggregates(sheet), apart, tiny, tags))
        return Outputs(values={"gates": {label: asdict(one) for label, one in made.items()}})

    def journal(run: Run, done: Finished) -> None:
        said = _said(done)
        run.tags({f"gate.{label}": f"{'pass' if one.passed else 'fail'}: {one.told}" for label, one in said.items()})
        run.metrics({"gates_passed": sum(one.passed for one in said.values()), "gates": len(said)})

    about = {"gates": settings["gates"], "tags": tags, "tiny": dict(tiny), "family": settings["family"]["name"]}
    done = chain.stage("gates", "gate", 1, about, inputs, work, journal)
    said = _said(done)
    for label, one in said.items():
        print(f"    {'pass' if one.passed else 'FAIL'}  {label:<26}{one.told}")
    told = {label: (one.passed, one.told) for label, one in said.items()}
    print(f"  {name}: {chain.journal.gated(name, candidate.digest, told)}", flush=True)
    return said


def _scored(chain: Chain, held: Version, prompts: PromptSet) -> ScoreSheet | None:
    """The champion's sheet on these prompts; None where its file is gone."""
    if held.path is None:
        print(
            f"    the champion, version {held.number}, cannot be scored: its checkpoint is not in the record any more"
        )
        return None
    model = open_checkpoint(held.path, chain.settings["family"]["name"])
    made = Merger(chain, {"champion": model}, formula="champion")
    done = evaluate(chain, made, {}, prompts, "champion", f"held out: champion, version {held.number}")
    return ScoreSheet.read(done.files["scores"])


def _measured(apart: Mapping[str, Any]) -> dict[str, Measurement]:
    """Paired differences as the numbers that gates take."""
    return {m: Measurement(d.value, d.low, d.high, d.n, d.higher_is_better) for m, d in apart.items()}


def _said(done: Finished) -> dict[str, Judgement]:
    return {label: Judgement(**one) for label, one in done.values["gates"].items()}
