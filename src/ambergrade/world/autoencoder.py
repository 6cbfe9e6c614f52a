"""Trains the tiny VAE: SDXL's AutoencoderKL topology, narrower, on drawn pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
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
    state: Path,
    steps: int,
    seed: int = 0,
    batch: int = 8,
    crop: int = 64,
    rate: float = 2e-3,
    kl_weight: float = 1e-5,
    hint_weight: float = 0.5,
    ema: float = 0.998,
    start: AutoencoderKL | None = None,
    decoder_only: bool = False,
    device: str = "cpu",
    on_log: Callable[[int, AutoencoderKL, dict[str, float]], None] | None = None,
) -> AutoencoderKL:
    """An AutoencoderKL fitted to `pictures` (N × H × W × 3, uint8): the moving average of its weights.

    Loss: mean |error|, plus twice the mean square, plus that of the finite differences (sharp lines), plus that of
    8 × 8 means (colour), plus kl_weight × KL, plus a hint that fades over the first third: three latent channels begin
    as the mean colours (else so small a network takes hours to let colours through). Pictures are cut to `crop` pixels
    and mirrored at random: many small cheap steps. Networks run in bfloat16, weights are kept in fp32.
    `decoder_only` keeps the encoder, and so every latent made with it, as it is in `start`.
    `state` is written every two minutes; where it exists, training goes on from there.
    """
    torch.manual_seed(random_seed(seed, "vae init"))
    vae = (start or AutoencoderKL(**CONFIG)).to(device)
    half: AutoencoderKL = nn.Module.to(AutoencoderKL(**CONFIG), device, torch.bfloat16)  # diffusers' own `to` warns
    half.train()
    trained = [
        name for name, _ in vae.named_parameters() if not decoder_only or name.startswith(("decoder", "post_quant"))
    ]
    exact, rounded = dict(vae.named_parameters()), dict(half.named_parameters())
    weights, copies = [exact[name] for name in trained], [rounded[name] for name in trained]
    half.load_state_dict(vae.state_dict())
    half.requires_grad_(False)
    for copy in copies:
        copy.requires_grad_(True)
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.04)
    first = 0
    if state.exists():
        kept = torch.load(state, weights_only=True, map_location=device)
        first = kept["step"]
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        for targets, sources in ((weights, kept["weights"]), (average, kept["average"])):
            _copy(targets, sources)
    saved = time.monotonic()
    for step in tqdm(range(first, steps), "autoencoder", steps, initial=first, unit="step", disable=None):
        _copy(copies, weights)
        real = _crops(pictures, random_seed(seed, "vae batch", step), batch, crop).to(device)
        generator = torch.Generator(device).manual_seed(random_seed(seed, "vae noise", step))
        with torch.set_grad_enabled(not decoder_only):
            posterior = half.encode(real.bfloat16()).latent_dist
        error = half.decode(posterior.sample(generator)).sample.float() - real
        pixel, square, edge = error.abs().mean(), error.square().mean(), _edge_error(error)
        colour, mean = F.avg_pool2d(error, 8).abs().mean(), posterior.mean.float()
        kl = posterior.kl().float().mean() / mean[0].numel()
        hint = (mean[:, :3] - 3 * F.avg_pool2d(real, 8)).abs().mean()
        loss = pixel + 2 * square + edge + colour + kl_weight * kl + hint_weight * max(0, 1 - 3 * step / steps) * hint
        loss.backward()
        for weight, copy in zip(weights, copies, strict=True):
            weight.grad = copy.grad.float() if copy.grad is not None else None
            copy.grad = None
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        for mean_weight, weight in zip(average, weights, strict=True):
            mean_weight.lerp_(weight.data, 1 - min(ema, (step + 1) / (step + 10)))
        if time.monotonic() - saved > 120 or step + 1 == steps:
            aside = state.with_suffix(".part")
            torch.save(
                {
                    "step": step + 1,
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                    "weights": [weight.data for weight in weights],
                    "average": average,
                },
                aside,
            )
            aside.replace(state)
            saved = time.monotonic()
        if on_log and (step + 1) % 250 == 0:
            shown = AutoencoderKL(**CONFIG).eval()
            shown.load_state_dict({**vae.state_dict(), **dict(zip(trained, average, strict=True))})
            on_log(step + 1, shown.cpu(), {"pixel": pixel.item(), "edge": edge.item(), "colour": colour.item()})
    vae.load_state_dict({**vae.state_dict(), **dict(zip(trained, average, strict=True))})
    return vae.cpu().eval()


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Give tensors, parameters among them, the values of others."""
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source)


def _crops(pictures: Pixels, seed: int, batch: int, crop: int) -> Tensor:
    """A batch of pictures, all cut at one place and half of them mirrored: N × 3 × crop × crop in -1 … 1."""
    random = np.random.default_rng(seed)
    chosen = random.choice(len(pictures), batch, replace=False)
    left, top = (int(place) for place in random.integers(0, np.array(pictures.shape[2:0:-1]) - crop + 1))
    cut = pictures[np.sort(chosen), top : top + crop, left : left + crop]
    return as_tensor(np.concatenate([cut[: batch // 2], cut[batch // 2 :, :, ::-1]]))


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
