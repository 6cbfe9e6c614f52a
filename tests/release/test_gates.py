"""The gates' verdicts, worked out by hand."""

import math

import pytest

from ambergrade.errors import UnknownName
from ambergrade.nouns import Measurement
from ambergrade.release.gate import Evidence, Judgement, Refused, insist, judge, load_gate, load_gates


def found(low: float, high: float, higher: bool = True) -> Measurement:
    return Measurement((low + high) / 2, low, high, 40, higher)


@pytest.mark.parametrize(
    ("measured", "bound", "passed"),
    [
        (found(0.80, 0.90), 0.80, True),  # the low end counts, and the bound itself is enough
        (found(0.79, 0.95), 0.80, False),
        (found(20.0, 24.0, higher=False), 25.0, True),  # of a distance the high end counts
        (found(20.0, 26.0, higher=False), 25.0, False),
    ],
)
def test_floor(measured: Measurement, bound: float, passed: bool) -> None:
    gate = load_gate("floor", metric="m", bound=bound)
    assert gate(Evidence("sdxl", {"m": measured})).passed == passed


@pytest.mark.parametrize(
    ("apart", "passed"),
    [
        (found(0.01, 0.09), True),
        (found(0.0, 0.09), False),  # zero is not excluded
        (found(-0.01, 0.09), False),
        (found(-5.0, -1.0, higher=False), True),  # a shorter distance is better
        (found(1.0, 5.0, higher=False), False),
    ],
)
def test_better_than(apart: Measurement, passed: bool) -> None:
    gate = load_gate("better_than", metric="m", than="base")
    assert gate(Evidence("sdxl", {}, {"base": {"m": apart}})).passed == passed
    assert not gate(Evidence("sdxl", {}, {"champion": {"m": apart}})).passed


@pytest.mark.parametrize(
    ("apart", "passed"),
    [
        (found(-0.02, 0.09), True),
        (found(-0.03, 0.09), False),  # it may have lost more than the margin
        (found(-1.0, 2.0, higher=False), False),
        (found(-1.0, 0.02, higher=False), True),
    ],
)
def test_not_worse_than(apart: Measurement, passed: bool) -> None:
    gate = load_gate("not_worse_than", metric="m", than="champion", margin=0.02)
    assert gate(Evidence("sdxl", {}, {"champion": {"m": apart}})).passed == passed


def test_the_first_release_has_no_champion_to_fall_behind() -> None:
    said = load_gate("not_worse_than", metric="m", than="champion", margin=0.0)(Evidence("sdxl", {}))
    assert (said.passed, said.told) == (True, "there is no champion to fall behind")


@pytest.mark.parametrize(
    ("family", "scorers", "passed"),
    [
        ("sdxl_tiny", {"clip_score": True}, True),
        ("sdxl", {"clip_score": False, "fid": False}, True),
        ("sdxl", {"clip_score": False, "fid": True}, False),
        ("sdxl", {}, False),
    ],
)
def test_no_tiny_scorers(family: str, scorers: dict[str, bool], passed: bool) -> None:
    said = load_gate("no_tiny_scorers", tiny_families=["sdxl_tiny"])(Evidence(family, {}, {}, scorers))
    assert said.passed == passed
    assert passed or "fid" in said.told or "not known" in said.told


def test_a_persons_no_and_yes() -> None:
    veto, approval = load_gate("veto", tag="veto"), load_gate("approval", tag="approved_by", vote="base")
    untouched, both = Evidence("sdxl", {}), Evidence("sdxl", {}, tags={"veto": "bad\nhands", "approved_by": "Kay"})
    assert veto(untouched).passed
    assert not approval(untouched).passed
    assert (veto(both).passed, veto(both).told) == (False, "veto: bad hands")
    assert approval(both).passed
    assert not veto(Evidence("sdxl", {}, tags={"veto": ""})).passed
    assert not approval(Evidence("sdxl", {}, tags={"approved_by": " "})).passed


@pytest.mark.parametrize(
    ("share", "passed"),
    [(found(0.51, 0.9), True), (found(0.5, 0.9), False), (found(0.1, 0.4), False), (found(math.nan, math.nan), False)],
)
def test_a_vote_approves_where_it_is_won_beyond_doubt(share: Measurement, passed: bool) -> None:
    preferred, approval = (
        load_gate("preferred", than="base", share=0.5),
        load_gate("approval", tag="approved_by", vote="base"),
    )
    evidence = Evidence("sdxl", {}, votes={"base": share})
    assert (preferred(evidence).passed, approval(evidence).passed) == (passed, passed)
    assert not load_gate("preferred", than="champion", share=0.5)(evidence).passed
    assert not load_gate("approval", tag="approved_by", vote=None)(evidence).passed
    assert not load_gate("preferred", than="base", share=0.6)(
        Evidence("sdxl", {}, votes={"base": found(0.6, 1)})
    ).passed


def test_pairing_tells_what_is_unlike() -> None:
    gate = load_gate("pairing", than="base")
    assert gate(Evidence("sdxl", {}, pairing={"base": ""})).passed
    said = gate(Evidence("sdxl", {}, pairing={"base": "sampler: steps 20 / 28"}))
    assert (said.passed, said.told) == (False, "unlike base: sampler: steps 20 / 28")
    assert not gate(Evidence("sdxl", {}, pairing={"champion": ""})).passed


def test_the_licence_s_verdict_is_what_the_papers_say() -> None:
    gate, verdict = load_gate("licence"), Judgement(False, "anxl3 is share-alike: fair-ai-1.0-sd; asked: apache-2.0")
    assert not gate(Evidence("sdxl", {})).passed
    assert gate(Evidence("sdxl", {}, licence=verdict)) == verdict
    assert gate(Evidence("sdxl", {}, licence=Judgement(True, "apache-2.0"))).passed


def test_every_gate_is_asked_and_one_module_may_be_two_gates() -> None:
    settings = {
        "low": {"name": "floor", "metric": "m", "bound": 0.1},
        "high": {"name": "floor", "metric": "m", "bound": 0.9},
    }
    said = judge(load_gates(settings), Evidence("sdxl", {"m": found(0.4, 0.6)}))
    assert {name: one.passed for name, one in said.items()} == {"low": True, "high": False}
    assert said["high"].told == "m 0.500 [0.400, 0.600], n 40; ≥ 0.9 is asked"


def test_an_unknown_gate_is_told_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'floor'"):
        load_gate("flor")


def test_a_refused_candidate_is_told_with_every_reason() -> None:
    said = {
        "floor": Judgement(False, "fid 30"),
        "veto": Judgement(True, "no tag veto"),
        "yes": Judgement(False, "no tag"),
    }
    with pytest.raises(Refused) as refused:
        insist("gamma rev1", said)
    told = str(refused.value).splitlines()
    assert told[:3] == ["gamma rev1 stays a candidate: 2 of 3 gates did not pass.", "  floor: fid 30", "  yes: no tag"]
    insist("gamma rev1", {"veto": Judgement(True, "no tag veto")})  # nothing to tell
