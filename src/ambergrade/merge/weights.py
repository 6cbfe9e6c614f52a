"""What a linear formula comes to for one tensor: rational weights, as whole numbers over one divisor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

MOST_P, MOST_Q = 1 << 12, 1 << 11
"""With sum(|P|) and Q up to these, sums of fp16 are exact in float64, and no quotient but a midpoint rounds to one."""


@dataclass(frozen=True)
class Weights:
    """One rational weight per tensor, none of them zero: `sum(P[i] * x[i]) / Q`."""

    exact: tuple[Fraction, ...]

    @cached_property
    def q(self) -> int:
        return math.lcm(*(weight.denominator for weight in self.exact))

    @cached_property
    def p(self) -> tuple[int, ...]:
        return tuple(int(weight * self.q) for weight in self.exact)

    @cached_property
    def size(self) -> int:
        """sum(|P|)."""
        return sum(map(abs, self.p))

    @cached_property
    def short(self) -> bool:
        """Few enough digits for an exact sum of small inputs."""
        return self.size <= MOST_P and self.q <= MOST_Q

    @cached_property
    def affine(self) -> bool:
        """Whether they sum to 1, as a model's do."""
        return sum(self.exact) == 1

    @cached_property
    def light(self) -> bool:
        """Few enough digits for `halves` alone: short ones, or a model's of up to six digits or so."""
        return self.short or (self.affine and max(self.size, self.q) <= 1 << 20)

    @cached_property
    def groups(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Each factor among P, and the numbers of the tensors that have it."""
        return tuple((p, tuple(i for i, other in enumerate(self.p) if other == p)) for p in dict.fromkeys(self.p))

    @cached_property
    def differences(self) -> tuple[tuple[float, int, int], ...]:
        """Of weights that sum to 1: (w, i, j) so that the sum is `x[0] + sum(w * (x[i] - x[j]))`; j may be 0."""
        assert self.affine, self
        left = list(range(1, len(self.exact)))
        found = []
        while left:
            i = left.pop(0)
            j = next((j for j in left if self.exact[j] == -self.exact[i]), 0)
            if j:
                left.remove(j)
            found.append((float(self.exact[i]), i, j))
        return tuple(found)

    @cached_property
    def scaled(self) -> tuple[tuple[float, ...], float, bool]:
        """Factors and divisor as floats, and whether they are exact."""
        if self.q < 2**53 and max(map(abs, self.p)) < 2**53:
            return tuple(map(float, self.p)), float(self.q), True
        return tuple(map(float, self.exact)), 1.0, False
