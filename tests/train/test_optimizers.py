"""Optimizers against torch's own and the papers' formulas; bf16 that learns, and bf16 that would not."""

import math

import pytest
import timm.optim
import torch
import transformers

from ambergrade.errors import BadSetting
from ambergrade.train.optimizers import adafactor, adamw, adamw8bit, adamw_sr, lion
from ambergrade.train.rounding import lost_share, write_back


def groups(parameters, lr=1e-2, decayed=True):
    return [{"params": parameters, "lr": lr, "decayed": decayed}]


def gradients(shape, steps, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draw) for _ in range(steps)]


def stepped(make, start, given):
    parameter = torch.nn.Parameter(start.clone())
    optimizer = make([parameter])
    for gradient in given:
        parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()
    return parameter.detach()


def test_adamw_sr_on_fp32_weights_is_torchs_adamw():
    start, given = torch.randn(7, 5, generator=torch.Generator().manual_seed(9)), gradients((7, 5), 12)
    ours = stepped(lambda p: adamw_sr.optimizer(groups(p), weight_decay=0.1), start, given)
    stock = stepped(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1), start, given)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)


def test_adamw_is_torchs_also_where_a_gradient_comes_late_or_is_absent():
    """Parameter 1 of three has no gradient at steps 0–3, parameter 2 none at 6 and 7: each counts its own steps."""
    starts = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    given = [gradients((4, 3), 10, seed) for seed in range(3)]
    makers = (
        lambda p: adamw.optimizer(groups(p[:2]) + groups(p[2:], lr=3e-2, decayed=False), weight_decay=0.1),
        lambda p: torch.optim.AdamW(
            [{"params": p[:2], "lr": 1e-2}, {"params": p[2:], "lr": 3e-2, "weight_decay": 0.0}],
            weight_decay=0.1,
            foreach=False,
        ),
    )
    ends = []
    for make in makers:
        parameters = [torch.nn.Parameter(start.clone()) for start in starts]
        optimizer = make(parameters)
        for step in range(10):
            for number, parameter in enumerate(parameters):
                absent = (number == 1 and step < 4) or (number == 2 and step in (6, 7))
                parameter.grad = None if absent else given[number][step].clone()
            optimizer.step()
        assert [int(optimizer.state[p]["step"]) for p in parameters] == [10, 6, 8]
        ends.append([parameter.detach() for parameter in parameters])
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


def test_lion_is_its_algorithm():
    start, given = torch.tensor([1.0, -2.0, 0.5]), gradients((3,), 5)
    found = stepped(lambda p: lion.optimizer(groups(p), betas=(0.9, 0.99), weight_decay=0.1), start, given)
    weight, momentum = start.clone(), torch.zeros(3)
    for gradient in given:
        update = torch.sign(0.9 * momentum + 0.1 * gradient)
        weight -= 1e-2 * (update + 0.1 * weight)
        momentum = 0.99 * momentum + 0.01 * gradient
    torch.testing.assert_close(found, weight)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(40, 30), (50,), (6, 4, 3, 3)])
def test_lion_is_timm_s_at_equal_precision(shape, weight_decay):
    start, given = torch.randn(shape, generator=torch.Generator().manual_seed(4)), gradients(shape, 20)
    ours = stepped(lambda p: lion.optimizer(groups(p, 1e-3), weight_decay=weight_decay), start, given)
    theirs = stepped(lambda p: timm.optim.Lion(p, lr=1e-3, betas=(0.9, 0.99), weight_decay=weight_decay), start, given)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_lion_s_momentum_is_fp32_for_bf16_weights():
    """Which is why it differs from libraries that keep it in bf16: there 2^-9 vanishes beside 1, here it is kept."""
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = lion.optimizer(groups([parameter]))
    for value in (1.0, 1.0 + 2**-7):
        parameter.grad = torch.full((4,), value, dtype=torch.bfloat16)
        optimizer.step()
    momentum = optimizer.state[parameter]["exp_avg"]
    assert momentum.dtype == torch.float32
    torch.testing.assert_close(momentum, torch.full((4,), 0.99 * 0.01 + 0.01 * (1 + 2**-7)))
    assert not torch.equal(momentum, momentum.bfloat16().float())


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(40, 30), (50,), (6, 4, 3, 3)])
def test_adafactor_is_transformers_and_a_convolution_is_its_matrix_of_filters(shape, weight_decay):
    start, given = torch.randn(shape, generator=torch.Generator().manual_seed(4)), gradients(shape, 20)
    known = {"lr": 1e-2, "scale_parameter": False, "relative_step": False, "weight_decay": weight_decay}
    ours = stepped(lambda p: adafactor.optimizer(groups(p), weight_decay=weight_decay), start, given)
    flat = (start, given) if start.ndim < 3 else (start.flatten(1), [gradient.flatten(1) for gradient in given])
    theirs = stepped(lambda p: transformers.Adafactor(p, **known), *flat)
    torch.testing.assert_close(ours, theirs.view(shape), rtol=1e-5, atol=1e-6)
    if start.ndim > 2:  # as documented: the libraries factor the kernel's two axes
        kernels = stepped(lambda p: transformers.Adafactor(p, **known), start, given)
        assert float((ours - kernels).abs().max()) > 1e-3


@pytest.mark.parametrize("shape", [(6, 4), (5,), (3, 2, 2, 2)])
def test_adafactor_is_the_paper_s_algorithms_4_and_5(shape):
    start, given = torch.randn(shape, generator=torch.Generator().manual_seed(3)), gradients(shape, 6)
    found = stepped(lambda p: adafactor.optimizer(groups(p)), start, given)
    weight = start.double()
    rows = columns = square = 0.0
    for step, gradient in enumerate(given, start=1):
        g = gradient.double().flatten(1) if gradient.ndim > 1 else gradient.double()
        beta = 1 - step**-0.8
        if g.ndim > 1:
            rows = beta * rows + (1 - beta) * g.square().sum(1)
            columns = beta * columns + (1 - beta) * g.square().sum(0)
            second = torch.outer(rows, columns) / rows.sum() / 1.0  # V = R C / 1ᵀR, of sums
        else:
            square = beta * square + (1 - beta) * g.square()
            second = square
        update = g / second.sqrt()
        update /= max(1.0, float(update.square().mean().sqrt()))
        weight = weight - 1e-2 * update.view(weight.shape)
    torch.testing.assert_close(found.double(), weight, rtol=1e-4, atol=1e-5)


def test_stochastic_rounding_is_right_on_average_and_repeatable():
    value = torch.full((200_000,), 1.0 + 2**-7 * 0.3)  # three tenths of the way between two bf16 numbers
    stored = torch.zeros(200_000, dtype=torch.bfloat16)
    write_back(stored, value, 1, 5)
    assert set(stored.float().unique().tolist()) == {1.0, 1.0078125}
    share = float((stored > 1).float().mean())
    assert abs(share - 0.3) < 4 * math.sqrt(0.21 / 200_000)
    again = torch.zeros_like(stored)
    write_back(again, value, 1, 5)
    assert torch.equal(again, stored)
    write_back(again, value, 1, 6)
    assert not torch.equal(again, stored)
    negative = torch.zeros(4, dtype=torch.bfloat16)
    write_back(negative, torch.tensor([-1.0, -0.5, 0.0, 3.0]), 1, 5)  # what bf16 holds stays
    assert negative.tolist() == [-1.0, -0.5, 0.0, 3.0]


@pytest.mark.parametrize("make", [adamw_sr.optimizer, adafactor.optimizer, lion.optimizer])
def test_bf16_weights_follow_fp32_where_plain_rounding_stands_still(make):
    start, given = torch.full((64, 64), 0.05), [torch.ones(64, 64)] * 300
    decay = {"weight_decay": 0.0}
    fp32 = stepped(lambda p: make(groups(p, 8e-6), **decay), start, given)
    rounded = stepped(lambda p: make(groups(p, 8e-6), **decay), start.bfloat16(), given).float()
    plain = stepped(lambda p: torch.optim.AdamW(p, lr=8e-6, weight_decay=0), start.bfloat16(), given).float()
    moved = float((fp32 - start).mean())
    assert moved == pytest.approx(-300 * 8e-6, rel=0.01)
    begun = start.bfloat16().float()
    assert float((rounded - begun).mean()) == pytest.approx(moved, rel=0.1)
    assert torch.equal(plain, begun)


def test_how_many_weights_would_not_feel_a_step():
    # spacing of bf16 at 0.02 is 2^-13: a step below 2^-14 = 6.1e-5 is lost there, one above is not
    weights = [torch.full((10,), 0.02)]
    assert lost_share(weights, 6.0e-5) == 1.0
    assert lost_share(weights, 6.2e-5) == 0.0
    assert lost_share([torch.tensor([0.02, 0.001, 0.0, -0.02])], 8e-6) == 0.5
    step = torch.tensor(0.02).bfloat16()
    assert step - torch.tensor(6.0e-5).bfloat16() == step
    assert step - torch.tensor(6.2e-5).bfloat16() != step


def test_a_missing_package_is_told():
    with pytest.raises(BadSetting, match=r"bitsandbytes[\s\S]*pip install bitsandbytes"):
        adamw8bit.optimizer([])
