"""Four full-size SDXL resident on one GPU, a fused pass a point straight into live UNet and text encoders.

python bench/gpu/merge.py [--points 20] [--streamed]

Prints milliseconds a point, the share of the copy bandwidth measured in the same run, and whether the bits are the
CPU's. Needs 35 GB of GPU memory (inputs 4 x 6.6 GB and the live networks); `--streamed` keeps the inputs in pinned
host memory and needs 8 GB: the transfers then set the pace. Synthetic weights; no files and no network.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from merge_live import live_modules

from ambergrade.family import sdxl
from ambergrade.merge.arithmetic import Combiner
from ambergrade.merge.fused import combine
from ambergrade.merge.weights import Weights

# The card's point: beta7, base7, anxl2, anxl3.
CARD = Weights((Fraction(1, 2), Fraction(1, 2), Fraction(-4, 5), Fraction(4, 5)))
STRETCH = 1 << 26


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--streamed", action="store_true", help="inputs in pinned host memory, for 24 GB cards")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("No GPU here: this bench measures nothing on a CPU.")
    live = live_modules({part: dict(component.config) for part, component in sdxl.FAMILY.components.items()})
    flat = into_one_buffer(live)
    inputs = synthetic(flat.numel(), "cpu" if asked.streamed else "cuda")
    bad = torch.zeros(1, dtype=torch.int32, device="cuda")
    point = streamed(inputs, flat, bad) if asked.streamed else lambda: combine(CARD, inputs, flat, bad)

    spent = milliseconds(point, asked.points)
    copied = milliseconds(lambda: flat.copy_(inputs[0], non_blocking=True), asked.points)
    moved, rate = flat.numel() * 2 * 5, flat.numel() * 2 * (1 if asked.streamed else 2) / copied
    assert not int(bad), "the merge is not finite"
    wrong = differing(inputs, flat)
    print(f"{torch.cuda.get_device_name()}, {flat.numel():,} live weights, torch {torch.__version__}")
    print(f"a point      {spent:8.2f} ms, {moved / spent / 1e6:,.0f} GB/s")
    if asked.streamed:
        ideal = flat.numel() * 2 * 4 / rate
        print(f"transfers    {rate / 1e6:8.1f} GB/s from pinned memory; {ideal / spent:.2f} of that rate reached")
    else:
        print(f"copy         {copied:8.2f} ms, {rate / 1e6:,.0f} GB/s; a point: {moved / spent / rate:.2f} of it")
    print(f"bits         {wrong} of {flat.numel():,} weights differ from the CPU's")


def into_one_buffer(live: dict[str, nn.Module]) -> Tensor:
    """Every parameter becomes a view of one flat buffer on the GPU, so that a point is one launch."""
    tensors = [parameter for module in live.values() for parameter in module.parameters()]
    sizes = [-(-tensor.numel() // 8) * 8 for tensor in tensors]  # 16 bytes: what kernels of matrices need
    flat = torch.zeros(sum(sizes), dtype=torch.float16, device="cuda")
    start = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        tensor.data = flat[start : start + tensor.numel()].view(tensor.shape)
        start += size
    return flat


def synthetic(count: int, device: str) -> list[Tensor]:
    """A base of N(0, 0.03) and three fine-tunes N(0, 1e-3) away, fp16; pinned where they stay on the host."""
    made = []
    for number in range(4):
        tensor = torch.empty(count, dtype=torch.float16, device=device, pin_memory=device == "cpu")
        for start in range(0, count, STRETCH):
            size = min(STRETCH, count - start)
            base = torch.randn(size, generator=torch.Generator("cuda").manual_seed(start), device="cuda") * 0.03
            noise = torch.Generator("cuda").manual_seed(start + number + 1)
            tuned = base + 1e-3 * torch.randn(size, generator=noise, device="cuda") if number else base
            tensor[start : start + size].copy_(tuned)
        made.append(tensor)
    return made


def streamed(inputs: list[Tensor], flat: Tensor, bad: Tensor) -> Callable[[], None]:
    """Stretches cross the bus into one half of a double buffer while the other half is merged."""
    stretch = STRETCH // 4
    halves = [[torch.empty(stretch, dtype=torch.float16, device="cuda") for _ in inputs] for _ in range(2)]
    crossing = torch.cuda.Stream()
    filled = [torch.cuda.Event() for _ in halves]
    free = [torch.cuda.Event() for _ in halves]

    def point() -> None:
        here = torch.cuda.current_stream()
        for event in free:
            event.record(here)
        for number, start in enumerate(range(0, len(flat), stretch)):
            half, size = number % 2, min(stretch, len(flat) - start)
            with torch.cuda.stream(crossing):
                crossing.wait_event(free[half])
                for target, source in zip(halves[half], inputs, strict=True):
                    target[:size].copy_(source[start : start + size], non_blocking=True)
                filled[half].record(crossing)
            here.wait_event(filled[half])
            combine(CARD, [x[:size] for x in halves[half]], flat[start : start + size], bad)
            free[half].record(here)

    return point


def milliseconds(work: Callable[[], object], rounds: int) -> float:
    """The fastest of some rounds, after two to warm up."""
    best = math.inf
    for number in range(rounds + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(end)) if number >= 2 else best
    return best


def differing(inputs: list[Tensor], flat: Tensor) -> int:
    """Weights whose bits are not those that the CPU gives."""
    if inputs[0].is_cuda:  # the copy that was timed came last
        combine(CARD, inputs, flat, torch.zeros(1, dtype=torch.int32, device="cuda"))
    combiner, wrong = Combiner(), 0
    for start in range(0, len(flat), STRETCH):
        xs = [x[start : start + STRETCH].cpu() for x in inputs]
        expected = torch.empty_like(xs[0])
        combiner.combine(CARD, xs, expected, xs[0])
        found = flat[start : start + STRETCH].cpu()
        wrong += int((found.view(torch.int16) != expected.view(torch.int16)).sum())
    return wrong


if __name__ == "__main__":
    main()
