"""The loss and the forward process against stock diffusers and closed forms."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from ambergrade.errors import BadSetting
from ambergrade.nouns import Caption, CaptionedPicture
from ambergrade.train.diffusion import (
    add_noise,
    alpha_bars,
    draw_noise,
    draw_timesteps,
    generator,
    input_noise,
    offset_noise,
    pyramid_noise,
    target,
    time_ids,
)
from ambergrade.train.losses import eps, v

CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
TIMESTEPS = torch.tensor([0, 1, 250, 500, 999])


@pytest.fixture(scope="module")
def pair():
    draw = torch.Generator().manual_seed(0)
    return torch.randn(5, 4, 6, 6, generator=draw), torch.randn(5, 4, 6, 6, generator=draw)


def test_alpha_bars_are_the_product_of_one_minus_beta():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(alpha_bars(CONFIG).double(), (1 - betas).cumprod(0), rtol=1e-4, atol=1e-8)


def test_add_noise_equals_stock_ddpm(pair):
    clean, noise = pair
    expected = DDPMScheduler.from_config(CONFIG).add_noise(clean, noise, TIMESTEPS)
    torch.testing.assert_close(add_noise(clean, noise, alpha_bars(CONFIG)[TIMESTEPS]), expected)


def test_the_plain_loss_is_the_mean_squared_error(pair):
    predicted, noise = pair
    found = eps.loss(predicted, noise, alpha_bars(CONFIG)[TIMESTEPS])
    assert found.shape == (5,)
    torch.testing.assert_close(found.mean(), torch.nn.functional.mse_loss(predicted, noise))


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_the_closed_form(pair, gamma):
    predicted, noise = pair
    found = eps.loss(predicted, noise, alpha_bars(CONFIG)[TIMESTEPS], min_snr=gamma)
    snr = compute_snr(DDPMScheduler.from_config(CONFIG), TIMESTEPS)
    weight = torch.tensor([min(float(s), gamma) / float(s) for s in snr])
    error = (predicted - noise).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, weight * error)
    assert weight[0] < 0.01  # almost clean: nearly ignored
    assert weight[-1] == 1.0


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(BadSetting, match="'sample'; known: epsilon, v_prediction"):
        alpha_bars({**CONFIG, "prediction_type": "sample"})
    with pytest.raises(BadSetting, match="loss=v"):
        alpha_bars({**CONFIG, "rescale_betas_zero_snr": True})


def test_zero_terminal_snr_is_lin_et_al_algorithm_1():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    root = (1 - betas).cumprod(0).sqrt()
    expected = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    found = alpha_bars({**CONFIG, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)
    assert found[-1] == 0
    weights = v.loss(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), found[-1:], min_snr=5, debiased=True)
    assert weights.tolist() == [0.0]  # min(0, 5) / 1: whole, not 0 / 0


def test_the_velocity_is_stock_ddpms(pair):
    clean, noise = pair
    alpha_bar = alpha_bars(CONFIG)[TIMESTEPS]
    stock = DDPMScheduler.from_config(CONFIG).get_velocity(clean, noise, TIMESTEPS)
    torch.testing.assert_close(target("v_prediction", clean, noise, alpha_bar), stock)
    assert target("epsilon", clean, noise, alpha_bar) is noise


@pytest.mark.parametrize("loss", [eps, v])
@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("debiased", [False, True])
def test_weights_of_both_targets_are_the_closed_forms(pair, loss, gamma, debiased):
    """An error of the predicted clean picture counts alike however it is expressed, so the weights are related."""
    predicted, wanted = pair
    alpha_bar = alpha_bars(CONFIG)[TIMESTEPS]
    found = loss.loss(predicted, wanted, alpha_bar, min_snr=gamma, debiased=debiased)
    error = (predicted - wanted).square().mean(dim=(1, 2, 3))
    for value, plain, a in zip(found.tolist(), error.tolist(), alpha_bar.tolist(), strict=True):
        snr = a / (1 - a)
        if gamma:
            plain *= min(snr, gamma) / (snr if loss is eps else snr + 1)
        if debiased:
            plain *= min(snr, 1000) ** -0.5 if loss is eps else 1 / (min(snr, 1000) + 1)
        assert value == pytest.approx(plain, rel=1e-4)


def test_offset_noise_has_its_variance_and_is_shared_by_a_channel():
    images = range(300)
    noise = draw_noise((4, 16, 16), 1, images)
    shift = offset_noise(noise, 0.5, 1, images) - noise
    torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift), atol=1e-6, rtol=1e-5)
    assert float(shift[..., 0, 0].std()) == pytest.approx(0.5, rel=4 / (2 * 1200) ** 0.5)
    whole = offset_noise(noise, 0.5, 1, images)
    assert float(whole.var()) == pytest.approx(1.25, abs=0.05)
    assert torch.equal(whole[7:8], offset_noise(noise[7:8], 0.5, 1, [7]))


def test_input_noise_has_its_variance_and_is_not_the_target():
    noise = draw_noise((4, 16, 16), 1, range(64))
    mixed = input_noise(noise, 0.1, 1, range(64))
    assert float((mixed - noise).std()) == pytest.approx(0.1, rel=0.02)
    assert float(mixed.var()) == pytest.approx(1.01, abs=0.02)


def test_pyramid_noise_is_the_sum_of_its_levels_at_unit_variance():
    noise = draw_noise((4, 16, 24), 1, [3])
    found = pyramid_noise(noise, 0.3, 1, [3])
    draw = generator(1, "pyramid noise", 3)
    total, shrink = noise[0].clone(), 1.0
    for level in range(1, 11):
        shrink *= 2 + 2 * float(torch.rand((), generator=draw))
        height, width = max(1, int(16 / shrink)), max(1, int(24 / shrink))
        coarse = torch.randn(1, 4, height, width, generator=draw)
        total += 0.3**level * torch.nn.functional.interpolate(coarse, (16, 24), mode="bilinear")[0]
        if 1 in (height, width):
            break
    torch.testing.assert_close(found[0], total / total.std())
    assert float(found.std()) == pytest.approx(1)
    # what is coarse stays when neighbours are averaged: more than white noise leaves
    many = pyramid_noise(draw_noise((4, 32, 32), 2, range(50)), 0.6, 2, range(50))
    left = torch.nn.functional.avg_pool2d(many, 8).var()
    assert float(left) > 3 / 64


def test_noise_and_timesteps_are_each_images_own():
    many = draw_noise((4, 8, 8), 3, range(100))
    assert torch.equal(many[40:43], draw_noise((4, 8, 8), 3, [40, 41, 42]))
    assert abs(many.mean()) < 4 / many.numel() ** 0.5
    assert abs(many.std() - 1) < 4 / (2 * many.numel()) ** 0.5
    timesteps = draw_timesteps(1000, 3, range(2000))
    assert torch.equal(timesteps[7:9], draw_timesteps(1000, 3, [7, 8]))
    assert 0 <= timesteps.min() < 10
    assert 990 < timesteps.max() <= 999
    assert abs(timesteps.float().mean() - 499.5) < 4 * 1000 / (12 * 2000) ** 0.5


def test_time_ids_are_in_sdxls_order_height_first():
    picture = CaptionedPicture(1, "", "", Caption((), ()), original_size=(800, 1200), bucket=(96, 160), crop=(3, 5))
    assert time_ids([picture]).tolist() == [[1200, 800, 5, 3, 160, 96]]
