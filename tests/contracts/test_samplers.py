"""Every sampler in conf/sampler: its yaml fits, its module is there, and it solves a case whose answer is known.

If the data are normal with standard deviation S, the best guess of the noise is linear in the picture, and the
probability-flow ODE carries x at noise level sigma to x * S / sqrt(S² + sigma²) (Karras et al. 2022, equation 1).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from ambergrade.errors import UnknownName
from ambergrade.generate.stream import scheduler
from ambergrade.nouns import SamplerSettings

FOLDER = Path(__file__).parents[2] / "conf" / "sampler"
FILES = sorted(FOLDER.glob("*.yaml"))
ANCESTRAL = {"euler_a"}
S = 0.7
SDXL_NOISE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


def test_no_sampler_spends_its_steps_in_the_noise_above_sigma_14_of_a_zero_terminal_snr_schedule() -> None:
    """14.6 is where a schedule without zero terminal SNR begins; its end is at 4096 here."""
    schedule = {**SDXL_NOISE, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    for name in NAMES:
        made = scheduler(name, {**schedule, "timestep_spacing": "trailing"})
        made.set_timesteps(28)
        assert int((made.sigmas > 14.6).sum()) <= 5, name
    made = scheduler("dpmpp_2m", dict(SDXL_NOISE))
    assert made.config.use_karras_sigmas  # as ever elsewhere


def settings(file: Path) -> SamplerSettings:
    return SamplerSettings(**yaml.safe_load(file.read_text()))


NAMES = sorted({settings(file).name for file in FILES})


def sampled(name: str, noise: Tensor, steps: int, generator: Any = None) -> tuple[Tensor, Tensor]:
    """Where `noise` ends under the perfect guess, and where it began at the first noise level (unscaled)."""
    made = scheduler(name, dict(SDXL_NOISE))
    made.set_timesteps(steps)
    made.set_begin_index(0)
    x = noise * made.init_noise_sigma
    start = torch.empty(0)
    for step, time in enumerate(made.timesteps):
        sigma = made.sigmas[step].double()
        unscaled = made.scale_model_input(x, time) * (1 + sigma**2).sqrt()
        start = unscaled if step == 0 else start
        guess = unscaled * sigma / (S**2 + sigma**2)
        extra = {"generator": generator} if generator is not None else {}
        x = made.step(guess.to(x.dtype), time, x, return_dict=False, **extra)[0]
    return x, start * S / (S**2 + made.sigmas[0].double() ** 2).sqrt()


def test_there_are_samplers() -> None:
    assert {"euler", "euler_tiny"} <= {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_yaml_holds_exactly_the_settings(file: Path) -> None:
    assert set(yaml.safe_load(file.read_text())) == {field.name for field in dataclasses.fields(SamplerSettings)}
    made = settings(file)
    assert made.steps > 0
    assert made.guidance >= 1
    assert made.width % 8 == made.height % 8 == 0
    scheduler(made.name, dict(SDXL_NOISE)).set_timesteps(made.steps)


@pytest.mark.parametrize("name", sorted(set(NAMES) - ANCESTRAL))
def test_a_deterministic_sampler_follows_the_closed_form(name: str) -> None:
    noise = torch.randn(1, 4, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rough, exact = sampled(name, noise, 25)
    fine, exact_fine = sampled(name, noise, 250)
    torch.testing.assert_close(fine.double(), exact_fine, rtol=0.03, atol=1e-3)
    assert (fine - exact_fine).abs().max() < (rough - exact).abs().max()  # more steps come closer


@pytest.mark.parametrize("name", sorted(ANCESTRAL))
def test_an_ancestral_sampler_ends_on_the_datas_spread(name: str) -> None:
    noise = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    ends, _ = sampled(name, noise, 250, torch.Generator().manual_seed(1))
    assert ends.std().item() == pytest.approx(S, rel=0.03)
    assert ends.mean().item() == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_does_not_depend_on_its_neighbours(name: str) -> None:
    noise = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
    if name not in ANCESTRAL:
        generators = []  # what the pipeline hands over has no effect there
    together, _ = sampled(name, noise, 10, generators or None)
    for row in range(3):
        alone, _ = sampled(name, noise[row : row + 1], 10, [torch.Generator().manual_seed(row)] if generators else None)
        assert torch.equal(alone, together[row : row + 1])


def test_an_unknown_sampler_is_told_with_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'euler'"):
        scheduler("eulr", dict(SDXL_NOISE))
