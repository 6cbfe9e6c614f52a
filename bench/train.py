"""Training throughput: `fine_tune` against a plain loop as diffusers' SDXL example writes it, at equal settings.

python bench/train.py [--steps 12] [--rounds 3] [--batch 16] [--compile]

Both train the tiny family's UNet and both text encoders from the same weights on the same cached latents and captions,
fp32, AdamW, clipping at 1, no average, no states, one thread. They take turns, each time in a process of its own, and
a first step is not counted. Seconds are the CPU's, which other programs disturb less than the clock's, and each round's
is the median step. The plain loop samples its noise batchwise and steps AdamW of torch's default form through
accelerate, as the example does; ours draws image by image. The pictures' channels lie as each one's default has it:
innermost in ours, outermost in the plain loop as in the example.

Nothing is compiled unless `--compile` adds `fine_tune` with `compile=true`, whose first step then is told apart.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from torch.nn.functional import mse_loss

from ambergrade.family import sdxl
from ambergrade.identity import random_seed
from ambergrade.nouns import Caption, CaptionedPicture, CaptionSet
from ambergrade.store import find_file
from ambergrade.train.latents import Latents
from ambergrade.train.settings import TrainSettings
from ambergrade.train.trainer import fine_tune

RATE = 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--loop", choices=list(LOOPS), help="one round of this alone, told as JSON")
    asked = parser.parse_args()
    if asked.loop:
        torch.set_num_threads(1)
        captions, latents = data(64, (128, 128))
        print(json.dumps(LOOPS[asked.loop](networks(), captions, latents, asked.steps + 1, asked.batch)))
        return
    taken: dict[str, list[float]] = {name: [] for name in LOOPS if name != "compiled" or asked.compile}
    for turn in range(asked.rounds):  # in turn, and each first in turn, so that all meet the same weather
        names = list(taken)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            first, *steps = apart(name, asked.steps, asked.batch)
            taken[name].append(statistics.median(steps))
            if name == "compiled":
                print(f"compiling took about {first:.0f} s of a first step")
    for name, seconds in taken.items():
        print(f"{name:<12}{asked.batch / statistics.mean(seconds):8.2f} images a CPU second")
    for name in taken.keys() - {"plain loop"}:
        pairs = [plain / ours for ours, plain in zip(taken[name], taken["plain loop"], strict=True)]
        whole = sum(taken["plain loop"]) / sum(taken[name])
        print(f"ratio {name:<12}{whole:6.2f}   by round: {', '.join(f'{ratio:.2f}' for ratio in pairs)}")


def apart(name: str, steps: int, batch: int) -> list[float]:
    """Seconds of each step of a loop in a process of its own, so that neither finds the other's heap or settings."""
    line = [sys.executable, __file__, "--loop", name, "--steps", str(steps), "--batch", str(batch)]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def data(count: int, bucket: tuple[int, int]) -> tuple[CaptionSet, Latents]:
    """Made-up pictures with captions of 12 tags, and random latents."""
    tags = ("long hair", "blue eyes", "dragon horns", "dragon tail", "smile", "red dress", "solo", "forest", "safe")
    pictures = tuple(
        CaptionedPicture(n, f"{n}.png", f"{n:064d}", Caption(("1girl", f"girl {n}"), tags), bucket, bucket, (0, 0))
        for n in range(count)
    )
    draw = torch.Generator().manual_seed(random_seed(0, "bench train") % 2**31)
    values = torch.randn(count, 4, bucket[1] // 8, bucket[0] // 8, generator=draw)
    return CaptionSet(pictures, "bench"), Latents({bucket: values}, {bucket: torch.arange(count)})


def networks() -> sdxl.Networks:
    return sdxl.load(find_file("builtin://beta7.safetensors"), find_file("builtin://sdxl_tiny"))


def train_ours(
    live: sdxl.Networks, captions: CaptionSet, latents: Latents, steps: int, batch: int, *, compiled: bool = False
) -> list[float]:
    """Seconds of each step; set-up counts to the first."""
    settings = TrainSettings(
        images=steps * batch,
        batch=batch,
        micro=batch,
        lr={"unet": RATE, "te1": RATE, "te2": RATE},
        schedule={"name": "constant"},
        loss={"name": "eps"},
        optimizer={"name": "adamw"},
        compile=compiled,
    )
    times = [time.process_time()]
    with tempfile.TemporaryDirectory() as scratch:
        path, ended = Path(scratch), lambda row: times.append(time.process_time())
        fine_tune(live, captions, latents, settings, scratch=path, on_log=ended)
    return differences(times)


def train_plainly(
    live: sdxl.Networks,
    captions: CaptionSet,
    latents: Latents,
    steps: int,
    batch: int,
    *,
    accumulation: int = 1,
    autocast: bool = False,
    clock: Callable[[], float] = time.process_time,
) -> list[float]:
    """Seconds, likewise; `batch` images a pass, `accumulation` passes a step, with `autocast` in bf16."""
    times = [clock()]
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, mixed_precision="no")
    modules = torch.nn.ModuleList([live.unet, live.text_encoder, live.text_encoder_2]).train()
    optimizer = torch.optim.AdamW(modules.parameters(), lr=RATE)
    modules, optimizer = accelerator.prepare(modules, optimizer)
    scheduler = DDPMScheduler.from_config(live.scheduler_config)
    (bucket, values), order = next(iter(latents.by_bucket.items())), torch.randperm(len(captions.pictures))
    for step in range(steps * accumulation):
        rows = [int(order[(step * batch + n) % len(order)]) for n in range(batch)]
        texts = [captions.pictures[row].caption.text for row in rows]
        clean = values[rows].to(accelerator.device)
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (batch,), device=clean.device)
        time_ids = torch.tensor([[*bucket[::-1], 0, 0, *bucket[::-1]]] * batch, dtype=torch.float32).to(clean.device)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        with accelerator.accumulate(modules), torch.autocast(clean.device.type, torch.bfloat16, enabled=autocast):
            states, pooled = [], None
            for tokenizer, encoder in ((live.tokenizer, modules[1]), (live.tokenizer_2, modules[2])):
                ids = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
                made = encoder(ids.input_ids.to(clean.device), output_hidden_states=True)
                states.append(made.hidden_states[-2])
                pooled = made[0]
            added = {"text_embeds": pooled, "time_ids": time_ids}
            predicted = modules[0](noisy, timesteps, torch.cat(states, dim=-1), added_cond_kwargs=added).sample
            loss = mse_loss(predicted.float(), noise.float())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(modules.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            loss.item()  # what is told of a step; on a GPU it waits for it
            times.append(clock())
    return differences(times)


def differences(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


LOOPS: dict[str, Callable[..., list[float]]] = {
    "fine_tune": train_ours,
    "plain loop": train_plainly,
    "compiled": functools.partial(train_ours, compiled=True),
}


if __name__ == "__main__":
    main()
