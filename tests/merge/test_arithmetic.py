"""Weighted sums against fractions: every element is the exact value, rounded once, ties to even."""

import random
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from ambergrade.merge.arithmetic import Combiner
from ambergrade.merge.weights import Weights

Combine = Callable[[Weights, list[Tensor], Tensor, Tensor | None], bool]


def nearest(exact: Fraction) -> float:
    """Give the fp16 number nearest to the fraction among those around a float64 guess; of two the even one."""
    guess = np.float16(float(exact))
    near = [guess, np.nextafter(guess, np.float16(np.inf)), np.nextafter(guess, np.float16(-np.inf))]
    finite = [number for number in near if np.isfinite(number)]
    return float(min(finite, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.uint16)) & 1)))


@pytest.fixture(params=["sums", "anywhere"])
def combine(request: pytest.FixtureRequest) -> Combine:
    """The CPU's own way, and the one of other devices."""
    return Combiner().combine if request.param == "sums" else Combiner()._general


def wrong(combine: Combine, weights: tuple[Fraction, ...], xs: list[Tensor]) -> int:
    out = torch.empty_like(xs[0])
    assert combine(Weights(weights), xs, out, xs[0])
    rows = zip(*(x.double().tolist() for x in xs), strict=True)
    truths = [sum((w * Fraction(v) for w, v in zip(weights, row, strict=True)), Fraction(0)) for row in rows]
    return sum(found != nearest(truth) for found, truth in zip(out.tolist(), truths, strict=True))


@pytest.mark.parametrize("digits", [1, 2, 3, 4, 5, 9, 16])
@pytest.mark.parametrize("scale", [1e-7, 1e-5, 0.03, 30])
def test_sums_of_relatives_are_exact_values_rounded_once(combine: Combine, digits: int, scale: float) -> None:
    """Weights of one digit go the short way, of some the exact one, of many the careful one; zeros too."""
    draw, generator = random.Random(digits), torch.Generator().manual_seed(digits)
    for count in (2, 3, 4):
        base = torch.randn(250, generator=generator) * scale * torch.logspace(-2, 1, 250)
        xs = [(base + 0.03 * scale * torch.randn(250, generator=generator) * (k > 0)).half() for k in range(count)]
        weights = [Fraction(draw.randint(1, 10**digits), 10**digits) * draw.choice([1, -1]) for _ in range(count - 1)]
        last = 1 - sum(weights)
        if last:
            assert wrong(combine, (*weights, last), xs) == 0


@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("digits", [1, 4, 12])
def test_other_dtypes_are_exact_values_rounded_once(
    combine: Combine, dtype: torch.dtype, out: torch.dtype, digits: int
) -> None:
    """No number of the output's lies nearer to the fraction, and of two equally near the one with an even last bit."""
    generator = torch.Generator().manual_seed(digits)
    for scale, spread in ((1e-3, 0), (0.03, 0), (0.03, 30), (30, 3)):
        base = torch.randn(300, generator=generator) * scale * torch.logspace(-spread, 0, 300)
        xs = [(base + 0.03 * scale * torch.randn(300, generator=generator) * (k > 0)).to(dtype) for k in range(3)]
        xs[1][:20] = 0.0
        w = Fraction(10**digits // 3, 10**digits)
        weights = (1 - w / 2, w, -w / 2)
        made = torch.empty(300, dtype=out)
        assert combine(Weights(weights), xs, made, xs[0])
        kind = torch.int32 if out == torch.float32 else torch.int16
        for place, row in enumerate(zip(*(x.double().tolist() for x in xs), strict=True)):
            truth = sum((w * Fraction(v) for w, v in zip(weights, row, strict=True)), Fraction(0))
            size = int(made[place].abs().view(kind))
            away = abs(abs(Fraction(float(made[place]))) - abs(truth))
            assert truth == 0 or size == 0 or (truth > 0) == (float(made[place]) > 0)
            for other in (size + 1, abs(size - 1)):
                value = float(torch.tensor(other, dtype=kind).view(out))
                beside = abs(Fraction(value) - abs(truth))
                assert away < beside or (away == beside and size % 2 == 0), (row, made[place], value)


def test_ties_go_to_the_even_one(combine: Combine) -> None:
    """Half of neighbours lies midway between two numbers: of every fp16 and the next, subnormal ones included."""
    every = torch.arange(0x7BFE, dtype=torch.int16).view(torch.float16)
    following = (torch.arange(0x7BFE, dtype=torch.int16) + 1).view(torch.float16)
    out = torch.empty_like(every)
    for exact in ((Fraction(1, 2), Fraction(1, 2)), (Fraction(4999, 10**4), Fraction(5001, 10**4))):
        combine(Weights(exact), [every, following], out, every)
        if exact[0] == Fraction(1, 2):
            assert bool(((out.view(torch.int16) & 1) == 0).all())
        else:  # a little above the middle
            assert torch.equal(out, following)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e5m2])
def test_zeros_have_the_sign_of_a_base_that_is_no_operand(dtype: torch.dtype) -> None:
    """As where a method's results alone are summed."""
    xs = [torch.tensor([1.0, 1.0, 0.0, 2.0]).to(dtype), torch.tensor([1.0, 1.0, 0.0, 1.0]).to(dtype)]
    base, out = torch.tensor([-0.0, 0.0, -0.0, -0.0]).to(dtype), torch.empty(4)
    Combiner().combine(Weights((Fraction(1), Fraction(-1))), xs, out, base)
    assert out.tolist() == [0, 0, 0, 1]
    assert torch.signbit(out).tolist() == [True, False, True, False]
