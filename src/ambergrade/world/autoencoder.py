"""Trains the tiny VAE: SDXL's AutoencoderKL topology, narrower, on drawn pictures."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from ambergrade.identity import random_seed
from ambergrade.world.corpus import Pixels

CONFIG = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 24, 32, 32),
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 128,
    "force_upcast": False,
}


def train(
    pictures: Pixels,
    *,
    steps: int,
    seed: int = 0,
    batch: int = 6,
    crop: int = 64,
    rate: float = 2e-3,
    kl_weight: float = 2e-5,
    hint_weight: float = 0.5,
    start: AutoencoderKL | None = None,
    decoder_only: bool = False,
    out: Path | None = None,
    on_log: Callable[[int, dict[str, float]], None] | None = None,
) -> AutoencoderKL:
    """An AutoencoderKL fitted to `pictures` (N × H × W × 3, uint8).

    Loss: mean |error|, plus that of 8 × 8 means (colour: lines alone can be drawn without it), plus half that of the
    finite differences (sharp lines), plus kl_weight × KL, plus a hint that fades: three latent channels begin as the
    mean colours (else so small a network takes hours to let colours through). Pictures are cut to `crop` pixels:
    many small cheap steps.
    `decoder_only` keeps the encoder, and so every latent made with it, as it is in `start`.
    """
    torch.manual_seed(random_seed(seed, "vae init"))
    vae = start or AutoencoderKL(**CONFIG)
    vae = vae.to(memory_format=torch.channels_last).train()
    if decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    weights = [p for p in vae.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.05)
    saved = time.monotonic()
    bar = tqdm(range(steps), "autoencoder", unit="step", disable=None)
    for step in bar:
        random = np.random.default_rng(random_seed(seed, "vae batch", step))
        chosen = random.choice(len(pictures), batch, replace=False)
        left, top = (int(place) for place in random.integers(0, np.array(pictures.shape[2:0:-1]) - crop + 1))
        cut = pictures[chosen][:, top : top + crop, left : left + crop]
        real = as_tensor(cut).contiguous(memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(random_seed(seed, "vae noise", step))
        with torch.set_grad_enabled(not decoder_only):
            posterior = vae.encode(real).latent_dist
        drawn = vae.decode(posterior.sample(generator)).sample
        error = drawn - real
        pixel, colour, edge = error.abs().mean(), F.avg_pool2d(error, 8).abs().mean(), _edge_error(error)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        hint = (posterior.mean[:, :3] - 3 * F.avg_pool2d(real, 8)).abs().mean()
        loss = pixel + 2 * colour + 0.5 * edge + kl_weight * kl + hint_weight * (1 - step / steps) * hint
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if on_log and step % 50 == 0:
            on_log(
                step,
                {
                    "pixel": pixel.item(),
                    "colour": colour.item(),
                    "edge": edge.item(),
                    "hint": hint.item(),
                    "kl": kl.item(),
                },
            )
        if out and time.monotonic() - saved > 120:
            vae.save_pretrained(out)
            saved = time.monotonic()
    return vae.eval()


def fit_scale(vae: AutoencoderKL, pictures: Pixels) -> float:
    """Set and return scaling_factor = 1 / standard deviation of the posterior means (Rombach et al. 2022, G.1)."""
    with torch.inference_mode():
        means = torch.cat([vae.encode(as_tensor(pictures[i : i + 32])).latent_dist.mean for i in range(0, 512, 32)])
    vae.register_to_config(scaling_factor=round(1 / means.std().item(), 5))
    return float(vae.config.scaling_factor)


def psnr(vae: AutoencoderKL, pictures: Pixels) -> float:
    """Mean peak signal-to-noise ratio of encode → decode, dB, over 0–255 pixels."""
    values = []
    with torch.inference_mode():
        for i in range(0, len(pictures), 16):
            real = as_tensor(pictures[i : i + 16])
            drawn = vae.decode(vae.encode(real).latent_dist.mean).sample.clamp(-1, 1)
            error = ((drawn - real) * 127.5).square().mean(dim=(1, 2, 3))
            values.append(10 * torch.log10(255**2 / error))
    return float(torch.cat(values).mean())


def round_trip(vae: AutoencoderKL, pictures: Pixels) -> Pixels:
    """Pictures as the autoencoder gives them back: what generated ones look like at best."""
    drawn = []
    with torch.inference_mode():
        for i in tqdm(range(0, len(pictures), 16), "round trip", unit="batch", disable=None):
            sample = vae.decode(vae.encode(as_tensor(pictures[i : i + 16])).latent_dist.mean).sample
            drawn.append(((sample.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return np.concatenate(drawn)


def edges_kept(drawn: Pixels, pictures: Pixels) -> float:
    """Mean |difference of neighbouring pixels| of `drawn`, as a share of that of `pictures`: 1 is as sharp."""
    return _edge_strength(drawn) / _edge_strength(pictures)


def as_tensor(pixels: Pixels) -> Tensor:
    """N × H × W × 3 uint8 to N × 3 × H × W in -1 … 1."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1


def _edge_error(error: Tensor) -> Tensor:
    down = (error[:, :, 1:] - error[:, :, :-1]).abs().mean()
    across = (error[:, :, :, 1:] - error[:, :, :, :-1]).abs().mean()
    return down + across


def _edge_strength(pixels: Pixels) -> float:
    values = pixels.astype(np.int16)
    return float(sum(np.abs(np.diff(values, axis=axis)).mean() for axis in (1, 2)))
