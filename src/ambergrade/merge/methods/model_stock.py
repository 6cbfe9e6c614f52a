"""Model stock: between the base and the average of fine-tuned models, as far as the angle between them says."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ambergrade.merge.method import Context
from ambergrade.merge.reduce import dot


def model_stock(base: Tensor, *models: Tensor, context: Context) -> Tensor:
    """base + t * (mean - base) with t = N cos / (1 + (N - 1) cos): equation 2 of the paper for two models, its
    appendix for N. cos is the mean over pairs of differences from the base; below 0 it counts as 0, which is the base.
    """
    differences = [model - base for model in models]
    lengths = [math.sqrt(dot(difference, difference)) for difference in differences]
    cosines = [
        dot(differences[i], differences[j]) / (lengths[i] * lengths[j]) if lengths[i] and lengths[j] else 0.0
        for i, j in itertools.combinations(range(len(models)), 2)
    ]
    cosine = max(0.0, math.fsum(cosines) / len(cosines))
    total = torch.zeros_like(base)
    for difference in differences:
        total = total + difference
    return base + len(models) * cosine / (1 + (len(models) - 1) * cosine) * (total / len(models))
