"""A real family's release must not rest on the tiny scorers of the embedded world."""

from __future__ import annotations

from collections.abc import Sequence

from ambergrade.release.gate import Evidence, Judgement


def gate(evidence: Evidence, *, tiny_families: Sequence[str]) -> Judgement:
    """Pass for a family of the embedded world, and where every scorer is of full size; fail without any scorer."""
    if evidence.family in tiny_families:
        return Judgement(True, f"{evidence.family} is of the embedded world")
    if not evidence.scorers:
        return Judgement(False, "it is not known which scorers judged it")
    tiny = sorted(name for name, is_tiny in evidence.scorers.items() if is_tiny)
    if tiny:
        return Judgement(False, f"tiny scorers judged a model of {evidence.family}: {', '.join(tiny)}")
    return Judgement(True, f"{len(evidence.scorers)} scorers of full size")
