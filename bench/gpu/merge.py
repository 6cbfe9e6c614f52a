"""Four full-size SDXL resident on one GPU, a fused pass a point straight into live UNet and text encoders.

python bench/gpu/merge.py [--points 20] [--streamed] [--size full]

Measures `ResidentMerge.assign`: milliseconds a point, of the GPU and in all; the share of the copy bandwidth measured
in the same run; and whether the bits are the CPU's. Needs 35 GB of GPU memory (inputs 4 x 6.6 GB and the live
networks); `--streamed` keeps the inputs in pinned host memory and needs 8 GB: the transfers then set the pace.
Synthetic weights; no files and no network.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from merge import MODELS, NARROWER, widths
from merge_live import FORMULA, live_modules

from ambergrade.family import sdxl
from ambergrade.merge import fused
from ambergrade.merge.formula import Formula
from ambergrade.merge.resident import ResidentMerge

POINTS = ({"a": 0.8, "b": 0.5}, {"a": 0.8137, "b": 0.4921})
"""As people sweep, and as an optimiser proposes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--size", choices=list(NARROWER), default="full")
    parser.add_argument("--streamed", action="store_true", help="inputs in pinned host memory, for 24 GB cards")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("No GPU here: this bench measures nothing on a CPU.")
    configs = widths(asked.size)
    live = {part: module.to("cuda") for part, module in live_modules(configs).items()}
    inputs = synthetic(sdxl.FAMILY.table(configs), "cpu" if asked.streamed else "cuda")
    merge = ResidentMerge(Formula.parse(FORMULA, MODELS), inputs)
    count = sum(tensor.numel() for module in live.values() for tensor in module.parameters())
    print(f"{torch.cuda.get_device_name()}, {count:,} live weights, torch {torch.__version__}")
    copied, rate = copying(inputs, asked.streamed)
    print(
        f"copy         {copied:8.2f} ms a GB, {rate / 1e6:,.0f} GB/s{' from pinned memory' if asked.streamed else ''}"
    )
    moved = count * 2 * (4 if asked.streamed else 5)  # the bus takes the inputs alone
    for point in POINTS:
        before = time.perf_counter()
        for _ in range(asked.points):
            merge.assign(live, point)
        torch.cuda.synchronize()
        wall = (time.perf_counter() - before) / asked.points * 1e3
        spent = milliseconds(lambda point=point: merge.assign(live, point), asked.points)  # type: ignore[misc]
        print(
            f"{point}: {spent:8.2f} ms of the GPU a point, {moved / spent / 1e6:,.0f} GB/s, "
            f"{moved / spent / rate:.2f} of the copy's; {wall:.2f} ms in all; "
            f"{differing(inputs, live, point):,} of {count:,} weights differ from the CPU's"
        )


def milliseconds(point: Callable[[], None], rounds: int) -> float:
    """The fastest of some rounds of the passes alone, after two to warm up: the program plans outside of them."""
    spent: list[float] = []
    plain = fused.one_pass, fused.streamed

    def timed(work: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*given: object) -> Tensor:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            said = work(*given)
            end.record()
            torch.cuda.synchronize()
            spent.append(start.elapsed_time(end))
            return said

        return run

    fused.one_pass, fused.streamed = timed(plain[0]), timed(plain[1])
    best = math.inf
    for number in range(rounds + 2):
        spent.clear()
        point()
        # Of a streamed point the whole stands last; it is made of passes, which are timed as well.
        best = min(best, spent[-1]) if number >= 2 else best
    fused.one_pass, fused.streamed = plain
    return best


def synthetic(shapes: Mapping[str, tuple[int, ...]], device: str) -> dict[str, dict[str, Tensor]]:
    """A base of N(0, 0.03) and three fine-tunes N(0, 1e-3) away, fp16; pinned where they stay on the host."""
    made: dict[str, dict[str, Tensor]] = {alias: {} for alias in MODELS}
    random = torch.Generator("cuda").manual_seed(0)
    for name, shape in shapes.items():
        base = torch.randn(shape, generator=random, device="cuda") * 0.03
        for number, alias in enumerate(MODELS):
            tuned = base + 1e-3 * torch.randn(shape, generator=random, device="cuda") if number else base
            half = tuned.half()
            made[alias][name] = half if device == "cuda" else half.cpu().pin_memory()
    return made


def copying(inputs: Mapping[str, Mapping[str, Tensor]], streamed: bool) -> tuple[float, float]:
    """Milliseconds to copy 2**30 bytes on the device, or to it from pinned memory, and bytes a millisecond moved."""
    target = torch.empty(1 << 29, dtype=torch.float16, device="cuda")
    source = torch.ones_like(target, device="cpu").pin_memory() if streamed else torch.ones_like(target)
    best = math.inf
    for _ in range(12):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source, non_blocking=True)
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end))
    return best, (1 << 30) * (1 if streamed else 2) / best


def differing(
    inputs: Mapping[str, Mapping[str, Tensor]], live: Mapping[str, nn.Module], point: Mapping[str, float]
) -> int:
    """Weights whose bits are not those that the CPU gives, one component after the other."""
    wrong = 0
    for part, module in live.items():
        mine = [name for name in inputs[MODELS[0]] if sdxl.FAMILY.component_of(name) == part]
        here = {alias: {name: inputs[alias][name].cpu() for name in mine} for alias in MODELS}
        truth = ResidentMerge(Formula.parse(FORMULA, MODELS), here).at(point)
        plan = sdxl.FAMILY.into_module(part, module.state_dict(), {name: x.shape for name, x in truth.items()})
        for key, source in plan.items():
            if key in module.state_dict():
                found, expected = module.state_dict()[key].cpu(), source.take(truth)
                wrong += int((found.view(torch.int16) != expected.contiguous().view(torch.int16)).sum())
    return wrong


if __name__ == "__main__":
    main()
