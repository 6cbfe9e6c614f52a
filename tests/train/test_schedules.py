"""Schedules against torch's own, step by step."""

import pytest
import torch

from ambergrade.train.schedules import constant, cosine

BATCH, STEPS, WARMUP = 32, 50, 10


def ours(factor, **parameters):
    return [factor(BATCH * (step + 1), BATCH * STEPS, **parameters) for step in range(STEPS)]


def torchs(make):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule, rates = make(optimizer), []
    for _ in range(STEPS):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def warmup(optimizer):
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, 1.0, WARMUP - 1)


def test_constant_after_a_linear_warmup():
    assert ours(constant.factor, warmup=WARMUP * BATCH) == pytest.approx(torchs(warmup))
    assert set(ours(constant.factor)) == {1.0}


def test_cosine_is_torchs_annealing_after_a_linear_warmup():
    def make(optimizer):
        annealing = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS - WARMUP, eta_min=0.1)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup(optimizer), annealing], [WARMUP - 1])

    assert ours(cosine.factor, warmup=WARMUP * BATCH, floor=0.1) == pytest.approx(torchs(make))


@pytest.mark.parametrize("factor", [constant.factor, cosine.factor])
def test_warmup_does_not_depend_on_the_batch(factor):
    # The same images seen, by steps of 32 and of 128.
    fine = [factor(seen, 6400, warmup=1280) for seen in range(32, 6401, 32)]
    coarse = [factor(seen, 6400, warmup=1280) for seen in range(128, 6401, 128)]
    assert fine[3::4] == coarse
