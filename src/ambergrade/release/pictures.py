"""Writes sample pictures with what drew them, in the form that A1111's web UI writes and sites read."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ambergrade.nouns import SamplerSettings
from ambergrade.release.facts import Sample, Weights

SAMPLERS = {"euler": "Euler", "euler_a": "Euler a", "dpmpp_2m": "DPM++ 2M", "unipc": "UniPC"}
"""Our samplers as A1111 calls them (modules/sd_samplers_*.py); another is named as it is."""
THUMBNAIL = 128
"""Pixels of the longer side of the picture in a header."""


def parameters(sample: Sample, sampler: SamplerSettings, weights: Weights) -> str:
    """Return A1111's infotext: prompt, negative prompt, and one line of settings (modules/processing.py).

    >>> weights = Weights("gamma-rev1.safetensors", 9, "0123456789abcdef", "", {"AutoV2": "0123456789"}, {})
    >>> drawn = SamplerSettings("euler", 12, 2.0, 128, 64)
    >>> print(parameters(Sample("samples/1.png", "1girl", "nsfw", 7), drawn, weights))
    1girl
    Negative prompt: nsfw
    Steps: 12, Sampler: Euler, CFG scale: 2.0, Seed: 7, Size: 128x64, Model hash: 0123456789, Model: gamma-rev1, Clip \
skip: 2, Version: ambergrade
    """
    lines = [sample.text, *([f"Negative prompt: {sample.negative}"] if sample.negative else [])]
    given = {
        "Steps": sampler.steps,
        "Sampler": SAMPLERS.get(sampler.name, sampler.name),
        "CFG scale": sampler.guidance,
        "Seed": sample.seed,
        "Size": f"{sampler.width}x{sampler.height}",
        "Model hash": weights.listed["AutoV2"],
        "Model": weights.name.removesuffix(".safetensors"),
        **({"CFG Rescale phi": sampler.rescale} if sampler.rescale else {}),
        "Clip skip": sampler.clip_skip,
        "Version": "ambergrade",
    }
    return "\n".join([*lines, ", ".join(f"{key}: {value}" for key, value in given.items())])


def write_sample(file: Path, pixels: npt.NDArray[np.uint8], text: str) -> None:
    """Write a PNG (height, width, 3 uint8 RGB) whose only text is `parameters`."""
    info = PngInfo()
    info.add_text("parameters", text)
    Image.fromarray(pixels).save(file, "PNG", compress_level=6, pnginfo=info)


def thumbnail(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Return a picture (height, width, 3 uint8 RGB) as a small JPEG."""
    small = Image.fromarray(pixels)
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
