"""Crossover: the low frequencies of one tensor and the high ones of another, as in an audio crossover."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ambergrade.errors import BadSetting
from ambergrade.merge.method import Context


def crossover(x: Tensor, y: Tensor, *, cutoff: float, ramp: float, context: Context) -> Tensor:
    """`x` below and `y` above `cutoff`, over all axes of the tensor.

    A frequency is the root mean square over the axes of the fraction of that axis' highest: 0 is the mean, 1 the
    highest of all. `y`'s share rises from 0 to 1 over `ramp`, centred at `cutoff`. numpy's transform runs on one thread
    in float64; it may differ in float64's last bits between kinds of processor, which hardly ever shows in fp16.
    """
    if ramp < 0:
        raise BadSetting(f"crossover(ramp={ramp}): ramp is a width in frequency, 0 or more.")
    if x.ndim == 0:
        return y.clone() if cutoff <= 0 else x.clone()
    difference = (y - x).double().cpu().numpy()
    squares = [np.square(np.fft.fftfreq(length) / max(length // 2 / length, 1e-300)) for length in x.shape]
    frequency = np.sqrt(sum(np.ix_(*squares)) / x.ndim)
    share = np.clip((frequency - cutoff) / ramp + 0.5, 0, 1) if ramp else (frequency >= cutoff).astype(float)
    high = np.fft.ifftn(np.fft.fftn(difference) * share).real
    return x + torch.from_numpy(high).to(x.device, torch.float32)
