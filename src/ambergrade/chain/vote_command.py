"""Runs a vote as a command does: reads what is voted on, makes the page, and brings the answers back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from ambergrade.chain.context import Context, open_journal
from ambergrade.chain.settings import Compute, FamilySettings, Invocation
from ambergrade.chain.vote import Ballot, count, find_ballot, make_ballot, measured, tell, votes_on
from ambergrade.errors import BadSetting, MissingObject, UnknownName
from ambergrade.identity import file_digest
from ambergrade.nouns import PromptSet, SamplerSettings
from ambergrade.places import CONF, project
from ambergrade.release.facts import FACTS
from ambergrade.release.sums import MANIFEST
from ambergrade.score.vote_page import Answers
from ambergrade.store import Ledger, find_file
from ambergrade.track.journal import Run
from ambergrade.track.lookup import run_tagged
from ambergrade.typed import settings

if TYPE_CHECKING:
    from ambergrade.chain.contestants import Chosen, Released

QUESTION = "Which picture do you prefer?"


@dataclass(frozen=True)
class VoteOptions:
    """What a vote is on, and how it is asked."""

    root: Path
    subjects: tuple[str, ...]
    """A sweep's folder or its first letters; a release; or two and more of releases, models and picture folders."""
    question: str = QUESTION
    pairs: int = 60
    """At most so many pairs are asked."""
    prompts: Path | None = None
    """In place of the subject's own prompts."""
    count: int = 32
    """The first so many prompts."""
    point: tuple[str, ...] = ()
    """Points of a sweep; none: the best ones."""
    points: int = 3
    """How many of the best."""
    models: Path | None = None
    """A folder that holds a release's base."""
    family: str | None = None
    """A yaml of conf/family; none: the release's own, else sdxl."""
    sampler: str | None = None
    """A yaml of conf/sampler; none: the release's own."""
    device: str = "cpu"
    seed: int = 0
    """Shuffles the sides and the order."""

    def __post_init__(self) -> None:
        for name, least in (("pairs", 1), ("count", 1), ("points", 2)):
            if getattr(self, name) < least:
                raise BadSetting(f"--{name} is {getattr(self, name)}, at least {least} is needed.")


def ask(options: VoteOptions) -> Ballot:
    """Draw what has to be drawn, and make the page. Raises AmbergradeError for what cannot be voted on."""
    from ambergrade.chain.contestants import BEST, Released  # torch, which a result does not need
    from ambergrade.chain.sweep import read_best

    if not options.subjects:
        raise BadSetting("What is voted on?\nGive a sweep, a release, or two and more models or picture folders.")
    paths = [_path(options.root, subject) for subject in options.subjects]
    if len({path.resolve() for path in paths}) < len(paths):
        raise BadSetting("A contestant is named twice.\nName each once.")
    releases = [Released.read(path) for path in paths if (path / FACTS).is_file()]
    subject: dict[str, str] = {}  # the run that votes are shown on: the sweep's, or the first release's
    if len(paths) == 1 and (paths[0] / BEST).is_file():
        subject = {"tag": "ag.key", "value": read_best(paths[0]).key}
    elif releases:
        subject = {"tag": "release.manifest_sha256", "value": file_digest(releases[0].folder / MANIFEST)}
    with _context(options.root, subject, options.device) as context:
        chosen = _chosen(context, options, paths, releases)
        return make_ballot(
            context,
            chosen.contestants,
            chosen.prompts.prompts,
            how=chosen.how,
            question=options.question,
            most=options.pairs,
            seed=options.seed,
            subject=subject,
        )


def bring_back(root: Path, answers: Answers) -> None:
    """Count one person's answers: a record, a run, and metrics of the release's or the sweep's own run; print them."""
    ledger = Ledger(root / "mlruns")
    ballot = find_ballot(ledger, answers.ballot)
    with _context(root, ballot.subject, "cpu") as context:
        count(context, ballot, answers)
        votes = votes_on(ledger, ballot)
        context.parent.metrics(measured(votes, tuple(ballot.contestants)))
        context.parent.flush()
        if ballot.subject and not context.parent.id:
            print("  MLflow has no run of what was voted on; the record holds the vote.")
    tell(votes, ballot)


def _chosen(context: Context, options: VoteOptions, paths: Sequence[Path], releases: Sequence[Released]) -> Chosen:
    """Whose pictures, of which prompts."""
    from ambergrade.chain.contestants import BEST, is_pictures, of_folders, of_models, of_sweep
    from ambergrade.chain.sheets import labels as labels_of

    prompts = PromptSet.read(find_file(str(options.prompts))) if options.prompts else None
    if len(paths) == 1 and (paths[0] / BEST).is_file():
        return of_sweep(context, paths[0], options.point, options.points, prompts, options.count)
    if len(paths) > 1 and all(is_pictures(path) for path in paths):
        return of_folders(paths, labels_of([str(path) for path in paths]), prompts, options.count)
    mixed = [str(path) for path in paths if is_pictures(path)]
    if mixed:
        raise BadSetting(f"{mixed[0]} holds pictures, and others are to be drawn.\nGive folders of pictures alone.")
    released = {one.folder: one.model for one in releases}
    named = zip(labels_of([str(path.resolve()) for path in paths]), paths, strict=True)
    models = {label: released.get(path, path) for label, path in named}
    if len(models) == 1 and releases:
        models |= dict([releases[0].base([options.models] if options.models else [])])
    shown = prompts or next((one.prompts for one in releases), None)
    if shown is None:
        raise BadSetting("Which prompts shall be drawn?\nGive --prompts FILE.jsonl (keys: id, text, seed).")
    family = _yaml("family", options.family or next((one.facts.family for one in releases), "sdxl"))
    sampler = settings(SamplerSettings, _yaml("sampler", options.sampler)) if options.sampler else None
    sampler = sampler or next((one.facts.evaluation.sampler for one in releases), None)
    if sampler is None:
        raise BadSetting("How shall they be drawn?\nGive --sampler, one of conf/sampler.")
    return of_models(context, models, settings(FamilySettings, family), shown.first(options.count), sampler)


def _path(root: Path, subject: str) -> Path:
    """A file or folder; or the folder of a sweep that is named by the first letters of its key."""
    from ambergrade.chain.contestants import BEST

    if subject.startswith("builtin://"):
        return find_file(subject)
    path = Path(subject).expanduser()
    if path.exists():
        return path
    sweeps = [*(root / "mlruns" / "sweeps").glob(f"*/{BEST}"), *(root / "mlruns" / "hydra").glob(f"*/*/{BEST}")]
    known = {file.parent.name: file.parent for file in sorted(sweeps)}
    found = [folder for name, folder in known.items() if len(subject) >= 4 and name.startswith(subject)]
    if len(found) == 1:
        return found[0]
    if known and "/" not in subject and not path.suffix:
        raise UnknownName("Sweep", subject, known)
    raise MissingObject(f"Nothing at {path}.\nGive a sweep's folder, a release, a model, or a folder of pictures.")


@contextmanager
def _context(root: Path, subject: Mapping[str, str], device: str) -> Iterator[Context]:
    """A journal in the experiment of what is voted on, below its run; in the experiment `vote` where there is none."""
    known = run_tagged(root, subject["tag"], subject["value"]) if subject else None
    journal = open_journal(root, known.experiment if known else "vote", {}, Invocation())
    above = journal.attached(known.id, known.name, known.key) if known else None
    nobody = Run(journal, "", "", "", done=False, resumed=False)
    compute = settings(Compute, {"device": device})
    context = Context(root, journal, above or nobody, compute)
    yield context
    context.close()


def _yaml(kind: str, name: str) -> dict[str, object]:
    """A member of conf/, the project's own first. Raises UnknownName with the nearest."""
    mine = project()
    folders = [*([mine / "conf" / kind] if mine else []), CONF / kind]
    known = {path.stem: path for folder in reversed(folders) for path in sorted(folder.glob("*.yaml"))}
    if name not in known:
        raise UnknownName(kind, name, known)
    found: dict[str, object] = yaml.safe_load(known[name].read_text("utf-8"))
    return found
