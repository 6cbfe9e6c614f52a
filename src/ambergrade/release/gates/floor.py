"""How good a metric must be at least: the whole interval lies on the good side of a bound."""

from __future__ import annotations

from ambergrade.release.gate import Evidence, Judgement, told


def gate(evidence: Evidence, *, metric: str, bound: float) -> Judgement:
    """Pass where the low end of the 95 % interval is at least `bound`; of a distance, the high end at most."""
    found = evidence.scores.get(metric)
    if found is None:
        return Judgement(False, f"{metric} was not scored")
    passed = found.low >= bound if found.higher_is_better else found.high <= bound  # False for NaN
    return Judgement(passed, f"{told(metric, found)}; {'≥' if found.higher_is_better else '≤'} {bound:g} is asked")
