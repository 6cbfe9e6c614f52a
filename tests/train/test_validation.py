"""Validation loss: fixed draws, so that only the weights can change it."""

import pytest
import torch
from diffusers import DDPMScheduler

from ambergrade.errors import BadInput
from ambergrade.nouns import CaptionSet
from ambergrade.train.diffusion import draw_noise, time_ids
from ambergrade.train.validation import validation_loss


def test_timesteps_are_nine_quantiles_and_the_batch_changes_nothing(networks, captions, latents):
    one = validation_loss(networks, captions, latents, batch=8)
    two = validation_loss(networks, captions, latents, batch=3)
    assert list(one.by_timestep) == [100, 200, 300, 400, 500, 600, 700, 800, 900]
    assert one.mean == pytest.approx(sum(one.by_timestep.values()) / 9)
    assert one.images == 8
    assert one.by_timestep == pytest.approx(two.by_timestep, rel=1e-5)


def test_it_is_the_error_of_the_stock_networks_on_noise_added_by_stock_ddpm(networks, captions, latents):
    found = validation_loss(networks, captions, latents, quantiles=[0.3], seed=4)
    stock = DDPMScheduler.from_config(networks.scheduler_config)
    pipe = networks.pipeline(stock)
    errors = []
    for bucket, positions in latents.positions.items():
        for row, position in enumerate(positions.tolist()):
            picture = captions.pictures[position]
            noise = draw_noise((4, bucket[1] // 8, bucket[0] // 8), 4, [position], "validation noise 300")
            noisy = stock.add_noise(latents.by_bucket[bucket][row : row + 1], noise, torch.tensor([300]))
            with torch.no_grad():
                states, _, pooled, _ = pipe.encode_prompt(picture.caption.text, do_classifier_free_guidance=False)
                added = {"text_embeds": pooled, "time_ids": time_ids([picture])}
                predicted = networks.unet(noisy, 300, states, added_cond_kwargs=added).sample
            errors.append(torch.nn.functional.mse_loss(predicted, noise).item())
    assert found.by_timestep[300] == pytest.approx(sum(errors) / 8, rel=1e-4)


def test_an_empty_set_is_refused(networks, latents):
    with pytest.raises(BadInput, match="no pictures"):
        validation_loss(networks, CaptionSet((), "test"), latents)
