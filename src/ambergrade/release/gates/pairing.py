"""A comparison must be one of the same prompts, seeds and sampler; else its interval says nothing."""

from __future__ import annotations

from ambergrade.release.gate import Evidence, Judgement


def gate(evidence: Evidence, *, than: str) -> Judgement:
    """Pass where the candidate's pictures and those of `than` share prompts, seeds and sampler; fail where none do."""
    if than not in evidence.pairing:
        return Judgement(False, f"the candidate was not compared with {than}")
    unlike = evidence.pairing[than]
    if unlike:
        return Judgement(False, f"unlike {than}: {unlike}"[:500].replace("\n", " "))
    return Judgement(True, f"the same prompts, seeds and sampler as {than}")
