"""A person can stop a release: by a tag on the model's version in MLflow."""

from __future__ import annotations

from ambergrade.release.gate import Evidence, Judgement


def gate(evidence: Evidence, *, tag: str) -> Judgement:
    """Fail where the version carries the tag, whatever its value: the value is the reason that is shown."""
    if tag in evidence.tags:
        return Judgement(False, f"{tag}: {evidence.tags[tag]}"[:500].replace("\n", " "))
    return Judgement(True, f"no tag {tag}")
