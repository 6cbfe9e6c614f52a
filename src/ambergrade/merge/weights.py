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
        """Few enough digits for exact sums of fp16 below hundreds: short ones, or a model's of up to six digits."""
        return self.short or (self.affine and max(self.size, self.q) <= 1 << 20)

    @cached_property
    def scaled(self) -> tuple[tuple[float, ...], float, bool]:
        """Factors and divisor as floats, and whether they are exact."""
        if self.q < 2**53 and max(map(abs, self.p)) < 2**53:
            return tuple(map(float, self.p)), float(self.q), True
        return tuple(map(float, self.exact)), 1.0, False
