"""Full-size SDXL at random weights: `fine_tune` with base7's settings against a plain diffusers-style loop, in one run.

python bench/gpu/train.py [--memory 80gb] [--side 1024] [--micro N] [--accumulation 1] [--steps 8] [--set key=value …]

Prints images a second of both, their ratio, and the share of two peaks: the GPU's datasheet and the bf16 matrix rate
measured in the same run. FLOP are what the step needs (20.62 TFLOP an image of 1024² at 75 tokens); recomputation is
not counted. `--set` gives further keys of the trainer: `--set compile=true checkpointing=none`. Needs no weights.

Without a GPU it measures nothing worth reporting but runs: `--device cpu --tiny` on the embedded world's networks, and
`--device cpu --side 256 --memory 16gb --micro 1 --steps 1 --only ours` takes base7's steps on the full-size networks:
three of them in six minutes of one core and 17 GB.
"""

from __future__ import annotations

import argparse
import gc
import resource
import runpy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ambergrade.door.compose import compose
from ambergrade.door.compose import plain as plain_settings
from ambergrade.family import sdxl
from ambergrade.store import find_file
from ambergrade.train.flops import StepFlop, peak_flops
from ambergrade.train.plan import memory
from ambergrade.train.settings import TrainSettings
from ambergrade.train.trainer import HALF, LogRow, fine_tune

PLAIN: dict[str, Any] = runpy.run_path(str(Path(__file__).parents[1] / "train.py"))
WARM = 2
"""Steps that are not counted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", default="80gb", help="preset of conf/memory")
    parser.add_argument("--side", type=int, default=1024, help="pixels")
    parser.add_argument("--micro", type=int, default=0, help="images of a pass; 0: the preset's")
    parser.add_argument("--accumulation", type=int, default=1, help="passes of a step; the card's is 128 / micro")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="the embedded world's networks, to try the script")
    parser.add_argument("--only", choices=["ours", "plain"])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("No GPU here. To see that the script runs: --device cpu --tiny")
    settings = base7(asked)
    print(f"{torch.cuda.get_device_name() if asked.device == 'cuda' else 'CPU'}, torch {torch.__version__}, ", end="")
    print(f"{settings.micro} x {asked.accumulation} images of {asked.side}² a step, {settings.precision}, ", end="")
    print(f"{settings.optimizer['name']}, checkpointing {settings.checkpointing}, compile {settings.compile}")
    if not asked.tiny:
        for part in memory(settings, resolution=asked.side):
            print(f"  planned {part.gb:6.2f} GB  {part.name}")
    rates = {}
    for name, run in (("ours", ours), ("plain", plain)):
        if asked.only in (None, name):
            rates[name], flop = run(asked, settings)
            gc.collect()
            told(name, rates[name], flop, asked)
    if len(rates) == 2:
        print(f"ratio          {rates['ours'] / rates['plain']:.2f}")


def base7(asked: argparse.Namespace) -> TrainSettings:
    """The preset's settings, short enough to measure."""
    words = ["experiment=base7", f"memory={asked.memory}"]
    trainer = plain_settings(compose("train", words))["trainer"]
    micro = asked.micro or trainer["micro"]
    batch = micro * asked.accumulation
    trainer |= {"images": (asked.steps + WARM) * batch, "batch": batch, "micro": micro, "log_every": batch}
    trainer |= {"save_every": 0, "sample_every": 0}
    for word in asked.set:
        key, _, value = word.partition("=")
        trainer[key] = {"true": True, "false": False}.get(value, float(value) if value[:1].isdigit() else value)
    return TrainSettings.read(trainer)


def ours(asked: argparse.Namespace, settings: TrainSettings) -> tuple[float, float]:
    """Images a second and FLOP of an image."""
    networks = made(asked, torch.bfloat16 if settings.precision in HALF else torch.float32)
    captions, latents = PLAIN["data"](4 * settings.batch, (asked.side, asked.side))
    flop = StepFlop(networks, settings.lr, settings.tokens).of_image((asked.side, asked.side))
    rows: list[LogRow] = []
    with tempfile.TemporaryDirectory() as scratch:
        fine_tune(networks, captions, latents, settings, scratch=Path(scratch), on_log=rows.append)
    losses = ", ".join(f"{row.loss:.4f}" for row in rows)
    print(f"  losses {losses}; gradient norms {rows[0].grad_norm:.3f} … {rows[-1].grad_norm:.3f}")
    return statistics.median(row.images_per_second for row in rows[WARM:]), flop


def plain(asked: argparse.Namespace, settings: TrainSettings) -> tuple[float, float]:
    """Likewise, of a loop as diffusers' example writes it: fp32 weights under autocast, torch's default AdamW."""
    networks = made(asked, torch.float32)
    if settings.checkpointing != "none":
        networks.unet.enable_gradient_checkpointing()
    captions, latents = PLAIN["data"](4 * settings.batch, (asked.side, asked.side))
    flop = StepFlop(networks, settings.lr, settings.tokens).of_image((asked.side, asked.side))
    chosen = {"autocast": True, "accumulation": asked.accumulation, "clock": time.perf_counter}
    taken = PLAIN["train_plainly"](networks, captions, latents, asked.steps + WARM, settings.micro, **chosen)[WARM:]
    return settings.batch / statistics.median(taken), flop


def told(name: str, rate: float, flop: float, asked: argparse.Namespace) -> None:
    used = rate * flop
    print(f"{name:<8}{rate:9.3f} images/s   {flop / 1e12:.3g} TFLOP an image   {used / 1e12:.3g} TFLOP/s", end="")
    if asked.device == "cuda":
        peak, measured = peak_flops(torch.device("cuda")), matrix_rate()
        share = f"{used / peak:.1%} of the datasheet's {peak / 1e12:.0f} TFLOP/s" if peak else "datasheet not known"
        print(f"   MFU {share}, {used / measured:.1%} of {measured / 1e12:.0f} measured", end="")
        print(f"   peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB", end="")
        torch.cuda.reset_peak_memory_stats()
    else:
        print(
            f"   peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.1f} GB of the process", end=""
        )
    print(flush=True)


def made(asked: argparse.Namespace, dtype: torch.dtype) -> sdxl.Networks:
    if asked.tiny:
        live = sdxl.load(find_file("builtin://beta7.safetensors"), find_file("builtin://sdxl_tiny"), dtype=dtype)
        for module in live.modules().values():
            module.to(asked.device)
        return live
    return full_size(asked.device, dtype)


def full_size(device: str, dtype: torch.dtype) -> sdxl.Networks:
    """SDXL's networks at random weights, never in memory twice; the tiny world's tokenizers stand in for CLIP's."""
    folder = find_file("builtin://sdxl_tiny")
    tokenizers = [CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")]
    text = {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": tokenizers[0].eos_token_id}
    parts = sdxl.FAMILY.components
    with init_empty_weights():
        unet = UNet2DConditionModel(sample_size=128, **parts["unet"].config)
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
        vae = AutoencoderKL(scaling_factor=0.13025, **blocks, **parts["vae"].config)
        one = CLIPTextModel(CLIPTextConfig(**{**parts["text_encoder"].config, **text}))
        two = CLIPTextModelWithProjection(CLIPTextConfig(**{**parts["text_encoder_2"].config, **text}))
    draw = torch.Generator(device).manual_seed(0)
    for module in (unet, vae, one, two):
        module.to(dtype).to_empty(device=device).eval()
        with torch.no_grad():
            for name, value in module.named_parameters():
                if value.ndim > 1:
                    value.normal_(0, 0.02, generator=draw)
                else:
                    value.fill_(0.0 if name.endswith("bias") else 1.0)
            for name, value in module.named_buffers():
                assert name.endswith("position_ids"), name
                value.copy_(torch.arange(value.shape[-1])[None])
    scheduler = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return sdxl.Networks(unet, one, two, vae, *tokenizers, {**scheduler, "num_train_timesteps": 1000})


def matrix_rate() -> float:
    """Measure FLOP/s of bf16 matrix products of 8192: the median of nine, timed by the GPU's events, after a first."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    taken = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        torch.mm(a, b)
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3)
    return 2 * 8192**3 / statistics.median(taken[1:])


if __name__ == "__main__":
    main()
