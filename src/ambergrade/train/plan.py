"""Reckons what a run will take: steps, memory by part, cache, hours and money. Plain arithmetic, no torch.

Floors: FLOP counted by torch's FlopCounter on the exact SDXL architecture (a multiply-add is two), at 1024 x 1024 and
scaled by the pixels trained on; MFU is a share of the GPU's datasheet peak, and told whose figure it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ambergrade.errors import BadSetting, UnknownName
from ambergrade.train.settings import TrainSettings

PARAMETERS = {"unet": 2_567_463_684, "te1": 123_060_480, "te2": 694_659_840, "vae": 83_653_863}
"""SDXL's networks have so many parameters."""
LARGEST = 49_408 * 1280
"""Weights of the largest tensor."""
FORWARD_TFLOP = {75: 6.761, 150: 6.844, 225: 6.926}
"""UNet, one 1024² image, by tokens of context; 150 lies half-way."""
TEXT_TFLOP = {"te1": 0.0133, "te2": 0.0979}
"""Forward, one window of 77."""
ENCODE_TFLOP = 4.879
"""VAE encoder, one 1024² image."""
MEAN_AREA = 0.962
"""Mean area of SDXL's 33 buckets, in 1024²."""
LATENT_BYTES = 4 * 128 * 128 * 2
"""One 1024² latent in fp16."""
ACTIVATIONS_GB = {"none": 6.89, "selective": 2.52, "full": 0.59}
"""Kept by the UNet for the backward pass, per 1024² image: tensors counted on the exact architecture, in bf16 with
flash attention. fp32 weights under autocast add about half."""
OPTIMIZER_BYTES = {
    "adamw": 8.0,
    "adamw_sr": 8.0,
    "adamw8bit": 2.0,
    "lion": 4.0,
    "lion8bit": 1.0,
    "adafactor": 0.01,
}
"""State per trained parameter."""


@dataclass(frozen=True)
class Device:
    """A kind of GPU as it is rented."""

    name: str
    memory_gb: float
    peak_tflops: float
    """The datasheet's: dense bf16 with fp32 accumulation. Shares (MFU) are of this."""
    dollars: tuple[float, float]
    """An hour: rented from a small provider in 2025, and the list price of a large cloud in 2024."""
    mfu: Mapping[str, float]
    """Whose figure to the share of the peak: `target` is ours, the others are published."""


DEVICES = {
    "3090": Device("RTX 3090", 24, 71, (0.25, 0.5), {"target": 0.40, "published (Kohaku Delta–Zeta)": 0.39}),
    "4090": Device("RTX 4090", 24, 165, (0.45, 0.8), {"target": 0.40, "published (OneTrainer #164)": 0.08}),
    "a100": Device("A100 80 GB", 80, 312, (1.5, 4.1), {"target": 0.40, "published (Animagine 3.0)": 0.24}),
    "h100": Device("H100 80 GB", 80, 989, (2.5, 12.3), {"target": 0.40, "published (sd-scripts #1434)": 0.065}),
    # large bf16 products were measured at 790 TFLOP/s on an H200: more than 80 % of its datasheet is not to be had
    "h200": Device("H200 141 GB", 141, 989, (3.5, 12.3), {"target": 0.40, "as published for the H100": 0.065}),
}


@dataclass(frozen=True)
class MemoryPart:
    """One part of a process's memory."""

    name: str
    gb: float
    """1e9 bytes."""


def train_tflop(settings: TrainSettings, *, resolution: int = 1024) -> float:
    """Reckon the TFLOP of forward and backward for one image, recomputation not counted (as MFU wants it).

    Backward is twice forward. A text encoder without learning rate is only run forward; a frozen UNet still passes
    gradients on. 20.62 for full fine-tuning at 75 tokens, 21.78 at 225.
    """
    area = (resolution / 1024) ** 2
    windows = settings.tokens // 75
    unet = 3 * FORWARD_TFLOP[settings.tokens] * area
    text = sum((3 if settings.lr[part] else 1) * windows * TEXT_TFLOP[part] for part in TEXT_TFLOP)
    return unet + text


def memory(settings: TrainSettings, *, resolution: int = 1024) -> list[MemoryPart]:
    """Plan one process's memory by part: weights, gradients, optimizer, average, activations, the frozen rest.

    With `in_backward` the gradients are those of the largest tensor alone, the second encoder's token embedding.
    """
    trained = sum(PARAMETERS[part] for part, rate in settings.lr.items() if rate > 0)
    frozen = sum(PARAMETERS.values()) - trained
    learned = trained
    if settings.lora:
        frozen, learned = frozen + trained, round(trained * 0.0074 * settings.lora.rank / 16)
    half = settings.precision in ("bf16-sr", "bf16-plain")
    width = 2 if half else 4
    optimizer = OPTIMIZER_BYTES.get(str(settings.optimizer["name"]))
    if optimizer is None:
        raise UnknownName("optimizer", str(settings.optimizer["name"]), OPTIMIZER_BYTES, "Its state is not tabled.")
    kept = ACTIVATIONS_GB[settings.checkpointing] * (resolution / 1024) ** 2
    activations = settings.micro * kept * {"fp32": 2.0, "bf16": 1.5}.get(settings.precision, 1.0)
    return [
        MemoryPart("trained weights", learned * width / 1e9),
        MemoryPart(*_gradients(settings, learned, width)),
        MemoryPart(f"optimizer {settings.optimizer['name']}", learned * optimizer / 1e9),
        MemoryPart("average (EMA, fp32)", learned * 4 / 1e9 if settings.ema else 0.0),
        MemoryPart("frozen weights", frozen * 2 / 1e9 if half or settings.lora else frozen * 4 / 1e9),
        MemoryPart(f"activations, {settings.micro} images", activations),
    ]


def _gradients(settings: TrainSettings, learned: int, width: int) -> tuple[str, float]:
    if settings.in_backward:
        return "gradient, one tensor at a time", min(learned, LARGEST) * width / 1e9
    return "gradients", learned * width / 1e9


def cache_gb(pictures: int, *, resolution: int = 1024) -> float:
    """Reckon the size of so many pictures' latents in fp16, in 1e9 bytes."""
    return pictures * LATENT_BYTES * MEAN_AREA * (resolution / 1024) ** 2 / 1e9


def plan(settings: TrainSettings, processes: int, device: str, *, resolution: int = 1024, pictures: int = 0) -> str:
    """Write the plan as text. `pictures` in the data set (0: as many as images are seen) decide the cache.

    Raises BadSetting for a batch that does not divide, UnknownName for an unknown device.
    """
    if processes < 1:
        raise BadSetting(f"processes is {processes}; at least one is needed.")
    if device not in DEVICES:
        raise UnknownName("GPU kind", device, DEVICES)
    accumulation, micro = settings.accumulation(processes), settings.per_pass(processes)
    parts = memory(replace(settings, micro=micro), resolution=resolution)
    total = sum(part.gb for part in parts)
    chosen = DEVICES[device]
    pictures = pictures or settings.images
    per_image = train_tflop(settings, resolution=resolution) * MEAN_AREA
    encode = pictures * ENCODE_TFLOP * MEAN_AREA * (resolution / 1024) ** 2
    lines = [
        f"batch      {settings.batch} = {micro} x {accumulation} x {processes}  (micro x accumulation x GPUs)",
        f"steps      {settings.images // settings.batch:,} of {settings.batch} images: {settings.images:,} images",
        f"compute    {per_image:.2f} TFLOP an image, {per_image * settings.images / 1e6:,.2f} EFLOP in all",
        f"cache      {cache_gb(pictures, resolution=resolution):,.1f} GB of latents for {pictures:,} pictures",
        f"memory     {total:.1f} GB on each GPU, planned; {chosen.name} has {chosen.memory_gb:g} GB"
        + ("" if total <= chosen.memory_gb else ": too little, raise checkpointing or lower micro"),
        *(f"           {part.gb:8.1f}  {part.name}" for part in parts if part.gb),
        "",
        f"{'GPU':<14}{'MFU':<40}{'img/s':>7}{'GPU-hours':>11}{'cache':>8}{'days':>8}{'dollars':>15}",
    ]
    for kind in DEVICES.values():
        for whose, mfu in kind.mfu.items():
            rate = kind.peak_tflops * mfu / per_image
            hours, caching = settings.images / rate / 3600, encode / (kind.peak_tflops * 0.3) / 3600
            dollars = "–".join(f"{(hours + caching) * price:,.0f}" for price in kind.dollars)
            lines.append(
                f"{kind.name:<14}{f'{mfu:.1%} {whose}':<40}{rate:7.2f}{hours:11,.0f}{caching:8,.0f}"
                f"{(hours + caching) / processes / 24:8.1f}{dollars:>15}"
            )
    lines += [
        "MFU: share of the datasheet's dense bf16 peak. GPU-hours train; cache: GPU-hours to encode once at 30 %; days",
        "on this many GPUs; dollars from a small provider's price to a large cloud's list price.",
        "",
        card_range(settings),
    ]
    return "\n".join(lines)


def card_range(settings: TrainSettings, images: tuple[int, int] = (3_000_000, 6_000_000)) -> str:
    """Write what 3 to 6 million images cost at the MFU that others published, beside what the card says."""
    lines = [f"one epoch of {images[0] / 1e6:g}M to {images[1] / 1e6:g}M images with these settings, at published MFU:"]
    for kind in DEVICES.values():
        for whose, mfu in kind.mfu.items():
            if whose != "target":
                hours = train_tflop(settings) * MEAN_AREA / (kind.peak_tflops * mfu) / 3600
                low, high = (round(hours * count * price) for count, price in zip(images, kind.dollars, strict=True))
                lines.append(f"  {kind.name:<13}{mfu:6.1%}   {low:>6,} to {high:>6,} USD")
    lines.append("  (the card: 3M to 6M images, 2,000 to 10,000 USD)")
    return "\n".join(lines)
