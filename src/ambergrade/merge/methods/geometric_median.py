"""The point whose distances to the models sum to the least: an average that one outlier cannot drag away."""

from __future__ import annotations

import math

from torch import Tensor

from ambergrade.merge.method import Context
from ambergrade.merge.reduce import dot

STEPS = 1000
Matrix = list[list[float]]


def geometric_median(*models: Tensor, tolerance: float, context: Context) -> Tensor:
    """Weiszfeld's iteration. Every iterate is an average of the models, so it runs on the averages' weights and the
    models' inner products alone, and the tensors are read once.

    A model that is itself the median is found first, by the condition of Vardi and Zhang 2000, equation 2.6.
    """
    differences = [model - models[0] for model in models]
    products = [[dot(x, y) for y in differences] for x in differences]
    weights = _vertex(products) or _weiszfeld(products, tolerance)
    found = models[0]
    for weight, difference in zip(weights, differences, strict=True):
        found = found + weight * difference
    return found


def _distance(products: Matrix, x: list[float], y: list[float]) -> float:
    """Between two averages of the models, given by their weights."""
    gap = [a - b for a, b in zip(x, y, strict=True)]
    return math.sqrt(max(0.0, math.fsum(a * b * products[i][j] for i, a in enumerate(gap) for j, b in enumerate(gap))))


def _unit(index: int, count: int) -> list[float]:
    return [float(other == index) for other in range(count)]


def _vertex(products: Matrix) -> list[float] | None:
    """The weights of a model where the pull of all others is less than its own multiplicity."""
    count = len(products)
    for index in range(count):
        here = _unit(index, count)
        distances = [_distance(products, here, _unit(other, count)) for other in range(count)]
        same = sum(distance == 0 for distance in distances)
        pull = [1 / distance if distance else 0.0 for distance in distances]
        # |sum of pull_i * (x_i - x)|, written as a distance of two weightings with one total
        moved = [weight - math.fsum(pull) * unit for weight, unit in zip(pull, here, strict=True)]
        if _distance(products, moved, [0.0] * count) < same - 1e-9:
            return here
    return None


def _weiszfeld(products: Matrix, tolerance: float) -> list[float]:
    count = len(products)
    weights = [1 / count] * count
    scale = max(products[i][i] for i in range(count)) ** 0.5
    for _ in range(STEPS):
        distances = [_distance(products, weights, _unit(other, count)) for other in range(count)]
        pull = [1 / max(distance, 1e-12 * scale) for distance in distances]
        following = [weight / math.fsum(pull) for weight in pull]
        moved = _distance(products, following, weights)
        weights = following
        if moved <= tolerance * scale:
            break
    return weights
