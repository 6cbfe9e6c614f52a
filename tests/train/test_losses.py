"""The loss and the forward process against stock diffusers and closed forms."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from ambergrade.errors import BadSetting
from ambergrade.nouns import Caption, CaptionedPicture
from ambergrade.train.diffusion import add_noise, alpha_bars, draw_noise, draw_timesteps, time_ids
from ambergrade.train.losses import eps

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


def test_an_unknown_prediction_type_is_refused():
    with pytest.raises(BadSetting, match="v_prediction"):
        alpha_bars({**CONFIG, "prediction_type": "v_prediction"})
    with pytest.raises(BadSetting, match="rescale"):
        alpha_bars({**CONFIG, "rescale_betas_zero_snr": True})


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
