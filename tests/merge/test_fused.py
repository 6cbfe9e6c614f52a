"""The GPU's kernel in Triton's interpreter: the bits of the CPU's sums, zeros and overflow included."""

import os
import subprocess
import sys
from fractions import Fraction

import pytest
import torch

from ambergrade.errors import BadSetting
from ambergrade.merge.arithmetic import Combiner
from ambergrade.merge.weights import Weights

pytest.importorskip("triton")
HALF, FIFTHS = Fraction(1, 2), Fraction(4, 5)
CHOICES = (
    (HALF, HALF, -FIFTHS, FIFTHS),
    (Fraction(1, 3), Fraction(2, 3)),
    (Fraction(1),),
    (Fraction(3), Fraction(-2)),
    (Fraction(-2), Fraction(3)),
)


def compare() -> int:
    """Elements that differ, over weights and magnitudes; run where TRITON_INTERPRET is set."""
    from ambergrade.merge.fused import combine

    generator, wrong = torch.Generator().manual_seed(0), 0
    for exact in CHOICES:
        for scale in (1e-6, 0.03, 3e4):
            base = torch.randn(3000, generator=generator) * scale
            xs = [(base + 0.03 * scale * torch.randn(3000, generator=generator)).half() for _ in exact]
            xs[0][:99] = -0.0
            xs[0][99:150] = 0.0
            xs[-1][60:120] = -0.0
            ours, bad = torch.empty(3000, dtype=torch.float16), torch.zeros(1, dtype=torch.int32)
            truth = torch.empty_like(ours)
            finite = Combiner().combine(Weights(exact), xs, truth, xs[0])
            combine(Weights(exact), xs, ours, bad)
            known = ~truth.isnan()
            wrong += int((ours.view(torch.int16) != truth.view(torch.int16))[known].sum())
            wrong += bool(int(bad)) == finite
    return wrong


def test_the_kernel_has_the_cpus_bits() -> None:
    code = f"import runpy; print(runpy.run_path({__file__!r})['compare']())"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert answer.stdout.strip() == "0", answer.stderr[-500:]


def test_what_one_pass_cannot_do_is_refused() -> None:
    from ambergrade.merge.fused import combine

    x, bad = torch.zeros(8, dtype=torch.float16), torch.zeros(1, dtype=torch.int32)
    for weights, inputs in (((Fraction(1, 10**6), 1 - Fraction(1, 10**6)), [x, x]), ((Fraction(1),), [x.float()])):
        with pytest.raises(BadSetting, match="same bits"):
            combine(Weights(weights), inputs, torch.empty_like(inputs[0]), bad)
