"""People must have preferred the candidate's pictures, blindly, to another model's."""

from __future__ import annotations

from ambergrade.release.gate import Evidence, Judgement, told


def gate(evidence: Evidence, *, than: str, share: float) -> Judgement:
    """Pass where the low end of the share of prompts won lies above `share`; half of them is a draw.

    The interval is exact (Clopper-Pearson) over the prompts that were decided: ties are in none of its numbers.
    """
    found = evidence.votes.get(than)
    if found is None:
        return Judgement(False, f"nobody voted against {than}: ambergrade vote RELEASE")
    return Judgement(found.low > share, f"{told('preferred', found)} decided, over {than}; > {share:g} is asked")
