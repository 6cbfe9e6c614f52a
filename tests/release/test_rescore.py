"""A release is drawn and scored again: with the shipped base, at two steps a picture."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from ambergrade.chain.numbers import numbers
from ambergrade.chain.rescoring import rescored
from ambergrade.errors import BadInput
from ambergrade.family.load import family
from ambergrade.generate import stream
from ambergrade.identity import digest
from ambergrade.nouns import Prompt, PromptSet, SamplerSettings
from ambergrade.release.facts import ReleaseFacts, Scorer, read_facts
from ambergrade.score.scoring import load_metric, score
from ambergrade.score.sheet import ScoreSheet
from ambergrade.store import BUILTIN

SAMPLER = SamplerSettings("euler", 2, 2.0, 96, 96, batch=5)


@pytest.fixture(scope="module")
def drawn(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReleaseFacts]:
    """A release's folder with weights that draw, and its facts."""
    folder = Path(shutil.copytree(sound, tmp_path_factory.mktemp("drawn") / "gamma"))
    facts = read_facts(folder)
    shutil.copyfile(BUILTIN / "beta7.safetensors", folder / facts.file)
    shutil.rmtree(folder / "config")
    shutil.copytree(BUILTIN / "sdxl_tiny", folder / "config")
    prompts = PromptSet("heldout", tuple(Prompt(str(k), f"1girl, {k} hats", k) for k in range(10)))
    prompts.write(folder / "prompts.jsonl")
    networks = family("sdxl_tiny").networks.load(folder / facts.file, folder / "config")
    pictures = stream.pictures(networks, prompts, SAMPLER, progress=None)
    file = folder / facts.evaluation.sheets["gamma"]
    score(pictures, prompts, [load_metric("mosaic")], sampler=SAMPLER).write(file)
    scores, _ = numbers({"gamma": ScoreSheet.read(file)})
    made = {"mosaic": Scorer(digest("mosaic"), settings={}), "fid": Scorer(digest("fid"), settings=None)}
    return folder, replace(facts, evaluation=replace(facts.evaluation, sampler=SAMPLER, scores=scores, scorers=made))


def test_scores_lie_within_their_intervals_and_what_cannot_be_loaded_is_named(
    drawn: tuple[Path, ReleaseFacts],
) -> None:
    outside, told = rescored(*drawn)
    assert outside == []
    assert "10 of 10 pictures score the same to the last bit" in told
    assert told.endswith("not scored again: fid")


def test_a_number_that_the_model_does_not_draw_is_named(drawn: tuple[Path, ReleaseFacts]) -> None:
    folder, facts = drawn
    said = facts.evaluation.scores["mosaic"]["gamma"]
    assert said.low is not None
    forged = {"mosaic": {"gamma": replace(said, value=said.low / 3, low=said.low / 4, high=said.low / 2)}}
    outside, _ = rescored(folder, replace(facts, evaluation=replace(facts.evaluation, scores=forged)))
    (line,) = outside
    assert line.startswith("mosaic is ")
    assert "outside of" in line


def test_too_few_prompts_for_intervals_are_compared_to_the_last_bit(drawn: tuple[Path, ReleaseFacts]) -> None:
    folder, facts = drawn
    said = facts.evaluation.scores["mosaic"]["gamma"]
    bare = {"mosaic": {"gamma": replace(said, low=None, high=None)}}
    told = rescored(folder, replace(facts, evaluation=replace(facts.evaluation, scores=bare)))
    assert told == ([], "10 of 10 pictures score the same to the last bit; not scored again: fid")
    prompts = (folder / "prompts.jsonl").read_bytes()
    rows = PromptSet.read(folder / "prompts.jsonl").prompts
    PromptSet("heldout", (*rows[:-1], replace(rows[-1], seed=99))).write(folder / "prompts.jsonl")
    with pytest.raises(BadInput, match="cannot be compared"):
        rescored(folder, replace(facts, evaluation=replace(facts.evaluation, scores=bare)))
    (folder / "prompts.jsonl").write_bytes(prompts)


def test_what_no_machine_should_draw_is_refused(drawn: tuple[Path, ReleaseFacts]) -> None:
    folder, facts = drawn
    for sampler in (replace(SAMPLER, steps=10**9), replace(SAMPLER, width=1 << 20), replace(SAMPLER, batch=0)):
        with pytest.raises(BadInput, match="that is not drawn"):
            rescored(folder, replace(facts, evaluation=replace(facts.evaluation, sampler=sampler)))
    unknown = {"fid": Scorer(digest("fid"), settings=None)}
    with pytest.raises(BadInput, match="None of the release's scorers"):
        rescored(folder, replace(facts, evaluation=replace(facts.evaluation, scorers=unknown)))
    for place in (
        str(folder / "config"),
        "../scorer",
        "~/scorer",
    ):  # a path of this machine is not a stranger's to name
        foreign = {"mosaic": Scorer(digest("mosaic"), settings={"model": place})}
        with pytest.raises(BadInput, match="None of the release's scorers"):
            rescored(folder, replace(facts, evaluation=replace(facts.evaluation, scorers=foreign)))
