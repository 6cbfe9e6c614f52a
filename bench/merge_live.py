"""What a sweep's point costs when models stay in memory, against a merge by sd-mecha: CPU-seconds.

python bench/merge_live.py --mecha PYTHON [--size quarter] [--points 4] [--folder DIR]

The inputs are bench/merge.py's, kept as fp16; a point is written into live fp16 UNet and text encoders.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from merge import MECHA, MODELS, NARROWER, child, widths, write_inputs
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ambergrade.family import sdxl
from ambergrade.merge.formula import Formula
from ambergrade.merge.resident import ResidentMerge

FORMULA = "gamma rev1 = beta7 + a * (anxl3 - anxl2) + b * (base7 - beta7)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mecha", default=None, help="python of an environment with sd-mecha")
    parser.add_argument("--size", choices=list(NARROWER), default="quarter")
    parser.add_argument("--points", type=int, default=4)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="ambergrade-bench-") as folder:
        paths = write_inputs(Path(folder), options.size)
        theirs = child(MECHA, Path(folder), 0, options.mecha) if options.mecha else None
        merge = ResidentMerge(
            Formula.parse(FORMULA, MODELS), {alias: sdxl.read_checkpoint(path) for alias, path in paths.items()}
        )
        live = live_modules(widths(options.size))
        costs, walls = [], []
        for number in range(options.points):
            # Tenths, as people sweep, then numbers of many digits, as an optimiser proposes.
            point = {"a": 0.8, "b": 0.5} if number % 2 == 0 else {"a": 0.8137 + number / 1e4, "b": 0.4921}
            before, start = cpu(), time.perf_counter()
            merge.assign(live, point)
            costs.append(cpu() - before)
            walls.append(time.perf_counter() - start)
    for kind, first in (("tenths", 0), ("many digits", 1)):
        if chosen := costs[first::2]:
            told = f"   1/{theirs.cpu / min(chosen):.1f} of sd-mecha's {theirs.cpu:.1f} s" if theirs else ""
            print(f"{kind:<12} {min(chosen):6.2f} CPU-s a point, {min(walls[first::2]):6.2f} s wall{told}")


def live_modules(configs: Any) -> dict[str, nn.Module]:
    """fp16 UNet and text encoders of the widths, their values unset."""
    unet = {"sample_size": 64, **configs["unet"]}
    with torch.device("meta"):
        made = {
            "unet": UNet2DConditionModel.from_config(unet),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**configs["text_encoder_2"])),
        }
    return {part: module.half().to_empty(device="cpu") for part, module in made.items()}


def cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
