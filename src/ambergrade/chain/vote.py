"""Asks people which pictures they prefer, blindly: makes the ballot, counts what comes back, and keeps it.

A **ballot** is a page and its key: which contestant's picture lies on which side. The page does not hold the key; its
record does (`records/ballot/<identity>.json`), under the identity that the page's answers name. A **vote** is one
person's answers, read with the key. Gates find votes by the weights that were voted on (`votes_between`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ambergrade.chain.context import Context, Stage
from ambergrade.errors import BadInput, BadSetting, MissingObject
from ambergrade.identity import digest, file_digest
from ambergrade.nouns import Measurement, Prompt
from ambergrade.pictures import open_picture
from ambergrade.score.vote_page import Answers, Shown, vote_page
from ambergrade.score.votes import Pair, Preference, Vote, pairs_of, preference, strengths
from ambergrade.store import Finished, Ledger, Outputs
from ambergrade.track.journal import Run

BALLOT = Stage("ballot", 1)
"""A page to vote on, and its key."""
VOTE = Stage("vote", 1)
"""One person's answers."""


@dataclass(frozen=True)
class Contestant:
    """Whose pictures are voted on."""

    label: str
    digest: str
    """sha256 of the weights; of the pictures where they came as files."""
    pictures: Mapping[str, Path]
    """Prompt id to file."""


@dataclass(frozen=True)
class Ballot:
    """A page and its key."""

    identity: str
    page: Path
    contestants: Mapping[str, str]
    """Label to digest."""
    pairs: tuple[Pair, ...]
    prompts: tuple[str, ...]
    """Names prompt and sampler; equal in every ballot on the same ones."""
    question: str
    subject: Mapping[str, str]
    """The run in MLflow that votes are shown on: experiment, tag, value; empty for none."""


def make_ballot(
    context: Context,
    contestants: Sequence[Contestant],
    prompts: Sequence[Prompt],
    *,
    how: Mapping[str, Any],
    question: str,
    most: int,
    seed: int,
    subject: Mapping[str, str],
) -> Ballot:
    """Lay pictures of the same prompts in pairs on a page. Raises BadSetting for fewer than two contestants.

    how: the sampler that drew them; empty where they came as files. most: pairs at most. subject: `Ballot.subject`.
    """
    labels = [one.label for one in contestants]
    if len(set(labels)) < 2 or len(set(labels)) < len(labels):
        raise BadSetting(f"A vote is between two contestants at least, each of its own name; found {labels}.")
    missing = {one.label: [p.id for p in prompts if p.id not in one.pictures] for one in contestants}
    lacking = [f"{label} lacks {', '.join(ids[:4])}" for label, ids in missing.items() if ids]
    if lacking or not prompts:
        raise BadInput("Every contestant needs a picture of every prompt:\n  " + "\n  ".join(lacking or ["no prompt"]))
    pairs = pairs_of(labels, len(prompts), most=most, seed=seed)
    named = [digest([prompt, how]) for prompt in prompts]
    settings = {"prompts": named, "question": question, "most": most, "seed": seed, "labels": labels}
    task = BALLOT.task(settings, {one.label: _pictures_digest(one, prompts) for one in contestants})

    def work(scratch: Path, run: Run) -> Outputs:
        by_label = {one.label: one.pictures for one in contestants}

        def pixels(label: str, prompt: int) -> npt.NDArray[np.uint8]:
            return np.asarray(open_picture(by_label[label][prompts[prompt].id]).convert("RGB"))

        shown = [
            Shown(pixels(pair.left, pair.prompt), pixels(pair.right, pair.prompt), prompts[pair.prompt].text)
            for pair in pairs
        ]
        page = scratch / "vote.html"
        page.write_text(vote_page(task.identity, question, shown), "utf-8")
        key = {
            "contestants": [[one.label, one.digest] for one in contestants],  # in their order
            "pairs": [asdict(pair) for pair in pairs],
            "prompts": named,
            "question": question,
            "subject": dict(subject),
        }
        return Outputs({"page": page}, key)

    return _ballot(context.run(task, "ballot", work))


def find_ballot(ledger: Ledger, identity: str) -> Ballot:
    """Return the ballot that a page's answers name. Raises MissingObject for one that was not made in this root."""
    done = ledger.find(BALLOT.kind, identity) if identity.isalnum() else None
    if done is None:
        raise MissingObject(
            f"The ballot {identity[:12]}… is not in the records of {ledger.root}.\n"
            "Give the result where its page was made (--root DIR): only there is the key to its sides."
        )
    return _ballot(done)


def count(context: Context, ballot: Ballot, answers: Answers) -> Finished:
    """Keep one person's answers as a record and a run. Raises BadInput for more answers than there are pairs."""
    if len(answers.answers) > len(ballot.pairs):
        raise BadInput(f"{len(answers.answers)} answers to {len(ballot.pairs)} pairs: the result is not this ballot's.")

    def work(scratch: Path, run: Run) -> Outputs:
        given = zip(ballot.pairs, answers.answers, strict=False)
        rows = [asdict(_read(ballot, pair, answer)) for pair, answer in given]
        return Outputs(values={"contestants": dict(ballot.contestants), "rows": rows, "pairs": len(ballot.pairs)})

    def journal(run: Run, done: Finished) -> None:
        votes = [Vote(**row) for row in done.values["rows"]]
        run.metrics(measured(votes, tuple(ballot.contestants)))
        run.tags({"vote.question": ballot.question, "vote.by": answers.voter or "somebody"})

    task = VOTE.task({"answers": answers.answers, "voter": answers.voter}, {"ballot": ballot.identity})
    return context.run(task, f"vote: {answers.voter or 'somebody'}", work, journal=journal)


def votes_on(ledger: Ledger, ballot: Ballot) -> list[Vote]:
    """Return every answer that came back to a ballot, by whomever."""
    return [
        vote
        for record in ledger.records(VOTE.kind)
        if record["inputs"].get("ballot") == ballot.identity
        for vote in _votes(record)
    ]


def votes_between(ledger: Ledger, one: str, other: str) -> Preference | None:
    """Return how often the weights `one` were preferred to `other`, over all ballots; None where nobody voted."""
    votes = []
    for record in ledger.records(VOTE.kind):
        contestants = record["values"]["contestants"]
        votes += [
            Vote(vote.prompt, contestants[vote.one], contestants[vote.other], contestants.get(vote.won, ""))
            for vote in _votes(record)
            if {contestants[vote.one], contestants[vote.other]} == {one, other}
        ]
    return preference(votes, one, other) if votes else None


def measured(votes: Sequence[Vote], labels: Sequence[str]) -> dict[str, Measurement]:
    """What a run shows of votes: the share over each other contestant for two, the strength of each for more."""
    if len(labels) == 2:
        return {f"preferred_over/{labels[1]}": preference(votes, *labels).share}
    return {f"vote_strength/{label}": found for label, found in strengths(votes, labels).items()}


def _ballot(done: Finished) -> Ballot:
    key = done.values
    return Ballot(
        identity=done.identity,
        page=done.files["page"],
        contestants=dict(key["contestants"]),
        pairs=tuple(Pair(**pair) for pair in key["pairs"]),
        prompts=tuple(key["prompts"]),
        question=key["question"],
        subject=key["subject"],
    )


def _read(ballot: Ballot, pair: Pair, answer: str) -> Vote:
    """One answer with its sides taken off."""
    won = {"left": pair.left, "right": pair.right, "tie": ""}[answer]
    one, other = sorted((pair.left, pair.right), key=list(ballot.contestants).index)
    return Vote(ballot.prompts[pair.prompt], one, other, won)


def _pictures_digest(one: Contestant, prompts: Sequence[Prompt]) -> str:
    files = {prompt.id: file_digest(one.pictures[prompt.id]) for prompt in prompts}
    return digest([one.digest, files])


def _votes(record: Mapping[str, Any]) -> list[Vote]:
    return [Vote(**row) for row in record["values"]["rows"]]


def tell(votes: Sequence[Vote], ballot: Ballot, say: Callable[[str], None] = print) -> None:
    """Print who is preferred to whom: wins, losses, ties, the exact interval of the share; strengths for several."""
    labels = list(ballot.contestants)
    couples = [(one, other) for k, one in enumerate(labels) for other in labels[k + 1 :]]
    say(f"{ballot.question}  ({len({vote.prompt for vote in votes})} prompts)")
    for one, other in couples:
        found = preference(votes, one, other)
        share = found.share
        counted = f"{found.wins} to {found.losses}, {found.ties} ties"
        if share.n:
            counted += f"; {share.value:.0%} of the decided [{share.low:.0%}, {share.high:.0%}], p {found.p:.3f}"
        say(f"  {one} over {other}: {counted}")
    if len(labels) > 2:
        say("Chance to be preferred to an average rival (Bradley–Terry; a tie is half a win):")
        ranked = strengths(votes, labels)
        for label, value in sorted(ranked.items(), key=lambda item: -item[1].value):
            limits = "" if value.low != value.low else f"  [{value.low:.2f}, {value.high:.2f}]"
            say(f"  {label:<32}{value.value:.2f}{limits}")
