"""A person must agree: without their tag on the model's version in MLflow it stays a candidate."""

from __future__ import annotations

from ambergrade.release.gate import Evidence, Judgement


def gate(evidence: Evidence, *, tag: str) -> Judgement:
    """Pass where the version carries the tag with a value (who, or why); then the same command again promotes it."""
    by = evidence.tags.get(tag, "").strip()
    if not by:
        return Judgement(False, f"set the tag {tag} on the version, then run the same command again")
    return Judgement(True, f"{tag}: {by}"[:500].replace("\n", " "))
