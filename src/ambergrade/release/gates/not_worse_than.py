"""The candidate must not fall behind another model, by default the champion, by more than a margin."""

from __future__ import annotations

from ambergrade.release.gate import Evidence, Judgement, told


def gate(evidence: Evidence, *, metric: str, than: str, margin: float) -> Judgement:
    """Pass where even the bad end of the paired 95 % interval loses at most `margin`, in units of the metric.

    A wide interval fails: it does not show that nothing was lost. Where there is no such model yet, nothing can be.
    """
    if than not in evidence.differences:
        return Judgement(True, f"there is no {than} to fall behind")
    found = evidence.differences[than].get(metric)
    if found is None:
        return Judgement(False, f"{metric} was not compared with {than}")
    passed = found.low >= -margin if found.higher_is_better else found.high <= margin
    return Judgement(passed, f"{told(metric, found, '+')} against {than}; {margin:g} may be lost")
