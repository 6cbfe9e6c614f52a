"""A person must agree: by a tag on the model's version in MLflow, or by a blind vote that was won."""

from __future__ import annotations

from ambergrade.release.gate import Evidence, Judgement, told


def gate(evidence: Evidence, *, tag: str, vote: str | None) -> Judgement:
    """Pass where the version carries the tag with a value (who, or why), or a vote against `vote` was won.

    A vote is won where more than half of the decided prompts are, beyond doubt. Without either the candidate stays
    one; then the same command again promotes it.
    """
    by = evidence.tags.get(tag, "").strip()
    if by:
        return Judgement(True, f"{tag}: {by}"[:500].replace("\n", " "))
    found = evidence.votes.get(vote) if vote else None
    if found is not None and found.low > 0.5:
        return Judgement(True, f"{told('preferred', found)} decided, over {vote}")
    lost = f"{told('preferred', found)} decided, over {vote}, is no clear win; " if found is not None else ""
    return Judgement(False, f"{lost}set the tag {tag} on the version, then run the same command again")
