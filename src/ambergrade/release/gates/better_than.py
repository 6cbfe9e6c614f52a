"""The candidate must be better than another model beyond doubt: the paired difference's interval excludes zero."""

from __future__ import annotations

from ambergrade.release.gate import Evidence, Judgement, told


def gate(evidence: Evidence, *, metric: str, than: str) -> Judgement:
    """Pass where candidate minus `than`, paired by prompt and seed, has all of its 95 % on the good side of zero."""
    found = evidence.differences.get(than, {}).get(metric)
    if found is None:
        return Judgement(False, f"{metric} was not compared with {than}")
    passed = found.low > 0 if found.higher_is_better else found.high < 0
    return Judgement(passed, f"{told(metric, found, '+')} against {than}")
