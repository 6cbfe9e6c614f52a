"""The parents' licences must allow the release under its own one."""

from __future__ import annotations

from ambergrade.release.gate import Evidence, Judgement


def gate(evidence: Evidence) -> Judgement:
    """Pass where the verdict on the licences says so; fail where there is none."""
    return evidence.licence or Judgement(False, "it is not known under which licences the parents are")
