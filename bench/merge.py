"""What a merge of files costs: bytes, wall time against plain I/O, CPU-seconds against sd-mecha, memory.

python bench/merge.py [--size sixteenth|quarter|full] [--folder DIR] [--mecha PYTHON] [--threads N]

Four synthetic fp16 SDXL files (every key of the family's table; `quarter` halves the widths, which quarters the bytes,
`sixteenth` halves them again) and the formula of Kohaku-XL Gamma rev1. `--mecha` is the interpreter of an environment
in which sd-mecha is installed; it is never a dependency of ours. Full size needs 42 GB of disk, quarter size 11 GB; all
of it is removed at the end.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODELS = ("beta7", "base7", "anxl2", "anxl3")
CARD = "gamma rev1 = beta7 + 0.8 * (anxl3 - anxl2) + 0.5 * (base7 - beta7)"
BLOCK = 4 << 20
NARROWER = {"sixteenth": 4, "quarter": 2, "full": 1}

OURS = """
import sys
from pathlib import Path
from ambergrade.merge.engine import merge
from ambergrade.merge.formula import Formula
from ambergrade.merge.inputs import Digests
from ambergrade.merge.job import open_job
folder, threads, digests, formula, *models = sys.argv[1:]
paths = {name: Path(folder) / f"{name}.safetensors" for name in models}
job = open_job(Formula.parse(formula, models), paths)
peak = [line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1]
report = merge(job, Path(folder) / "ours.safetensors", threads=int(threads) or None, digests=Digests(Path(digests)))
print(report.bytes_read, report.bytes_written, peak)
"""

MECHA = """
import sys, pathlib, torch, sd_mecha
folder, threads, _, _, *names = sys.argv[1:]
torch.set_num_threads(1)
m = {name: sd_mecha.model(str(pathlib.Path(folder) / f"{name}.safetensors")) for name in names}
recipe = m["beta7"] + (m["anxl3"] - m["anxl2"]) * 0.8 + (m["base7"] - m["beta7"]) * 0.5
options = {"threads": int(threads)} if int(threads) else {}
sd_mecha.merge(recipe, merge_dtype=torch.float32, output_dtype=torch.float16, merge_device="cpu",
               output=str(pathlib.Path(folder) / "mecha.safetensors"), **options)
print(0, (pathlib.Path(folder) / "mecha.safetensors").stat().st_size, 0)
"""


@dataclass(frozen=True)
class Cost:
    """Holds what one process took, or plain I/O in this one."""

    wall: float
    cpu: float
    rss: int = 0
    """Bytes at the peak."""
    called: int = 0
    """Bytes that its read calls returned, as the kernel counts them."""
    said: tuple[int, ...] = ()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(NARROWER), default="quarter")
    parser.add_argument("--folder", type=Path, default=None, help="where to put the files; a temporary one else")
    parser.add_argument("--mecha", default=None, help="python of an environment with sd-mecha")
    parser.add_argument("--threads", type=int, default=0, help="0: each program's own choice")
    parser.add_argument("--rounds", type=int, default=1, help="the smallest of so many is taken")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="ambergrade-bench-") as folder:
        measure(Path(folder), options)


def measure(folder: Path, options: Any) -> None:
    paths = write_inputs(folder, options.size)
    total = sum(path.stat().st_size for path in paths.values())
    one = total // len(paths)
    print(f"inputs       {len(paths)} x {one:,} bytes, every key of SDXL, fp16, {options.size} size")
    rounds: list[dict[str, Cost]] = []
    for _ in range(options.rounds):  # in turn, so that all meet the same weather
        (folder / "digests.json").unlink(missing_ok=True)
        found = {"plain": plain_io(folder, list(paths.values()), one), "ours": child(OURS, folder, options.threads)}
        found["again"] = child(OURS, folder, options.threads)
        if options.mecha:
            found["mecha"] = child(MECHA, folder, options.threads, options.mecha)
        rounds.append(found)
    best = {name: min((found[name] for found in rounds), key=lambda cost: cost.cpu) for name in rounds[0]}
    wall = {name: min(found[name].wall for found in rounds) for name in rounds[0]}
    ours = best["ours"]
    read, written, planned = ours.said
    print(f"bytes read   {read:,}: {read / total:.6f} of the inputs; headers are read twice")
    print(f"bytes out    {written:,}")
    print(f"plain I/O    {wall['plain']:7.1f} s wall {best['plain'].cpu:7.1f} s CPU")
    print(f"ours         {wall['ours']:7.1f} s wall {ours.cpu:7.1f} s CPU   {wall['ours'] / wall['plain']:.2f} x plain")
    again = best["again"]
    print(f"ours, again  {wall['again']:7.1f} s wall {again.cpu:7.1f} s CPU   sha256 of the inputs remembered")
    print(f"memory       {ours.rss / 1e6:.0f} MB at the peak, {planned * 1024 / 1e6:.0f} MB once it was planned")
    if "mecha" in best:
        theirs = best["mecha"]
        print(
            f"sd-mecha     {wall['mecha']:7.1f} s wall {theirs.cpu:7.1f} s CPU   {theirs.cpu / ours.cpu:.2f} x our CPU"
        )
        print(f"             {theirs.cpu / again.cpu:.2f} x our CPU once the inputs' sha256 are remembered")
        print(f"             {theirs.rss / 1e6:.0f} MB at the peak, {theirs.called / total:.2f} x the inputs read")


def widths(size: str) -> Mapping[str, Mapping[str, Any]]:
    """Configs of the family's components; half the widths make a quarter of the weights."""
    from ambergrade.family import sdxl

    found = {part: dict(component.config) for part, component in sdxl.FAMILY.components.items()}
    times = NARROWER[size]
    for config in found.values():
        for key in ("block_out_channels", "hidden_size", "intermediate_size", "projection_dim"):
            if key in config:
                value = config[key]
                config[key] = [width // times for width in value] if isinstance(value, list) else value // times
        if "cross_attention_dim" in config:
            config["cross_attention_dim"] //= times
            config["projection_class_embeddings_input_dim"] = 1280 // times + 6 * 256
            config["norm_num_groups"] = 32 // times
    return found


def write_inputs(folder: Path, size: str, models: tuple[str, ...] = MODELS) -> dict[str, Path]:
    """A base of N(0, 0.03) and fine-tunes N(0, 1e-3) away, in fp16, cut from a repeated stretch of noise."""
    import numpy as np

    from ambergrade.family import sdxl
    from ambergrade.merge.header import header_bytes

    shapes = sdxl.FAMILY.table(widths(size))
    described = {name: ("F16", shape) for name, shape in shapes.items()}
    described |= {sdxl.POSITION_IDS: ("I64", (1, 77)), sdxl.LOGIT_SCALE: ("F16", ())}
    random = np.random.default_rng(0)
    weights = random.normal(0, 0.03, (1 << 22) + 7).astype(np.float32)
    paths = {}
    for number, model in enumerate(models):
        paths[model] = folder / f"{model}.safetensors"
        noise = random.normal(0, 1e-3, len(weights)).astype(np.float32) if number else np.zeros(1, np.float32)
        stretch = (weights + noise).astype(np.float16)
        head, offsets = header_bytes(described, {})
        with paths[model].open("wb") as file:
            file.write(head)
            for name in sorted(offsets, key=lambda name: offsets[name]):
                dtype, shape = described[name]
                assert file.tell() == offsets[name], name
                if dtype == "I64":
                    file.write(np.arange(77).tobytes())
                    continue
                if name == sdxl.LOGIT_SCALE:
                    file.write(np.float16(4.6052).tobytes())
                    continue
                left = math.prod(shape)
                start = sum(name.encode()) * 997 % len(stretch)
                while left:
                    piece = stretch[start : start + left]
                    file.write(piece.data)
                    left, start = left - len(piece), 0
            file.flush()
            os.fsync(file.fileno())
    return paths


def plain_io(folder: Path, inputs: list[Path], size: int) -> Cost:
    """Read every input and write as much as the output has, in blocks, as dd does."""
    forget(folder)
    start, before = time.perf_counter(), time.process_time()
    buffer = bytearray(BLOCK)
    for path in inputs:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    out = folder / "plain"
    with out.open("wb", buffering=0) as file:
        for at in range(0, size, BLOCK):
            file.write(memoryview(buffer)[: min(BLOCK, size - at)])
        os.fsync(file.fileno())
    cost = Cost(time.perf_counter() - start, time.process_time() - before)
    out.unlink()
    return cost


def child(
    code: str, folder: Path, threads: int, python: str = sys.executable, models: tuple[str, ...] = MODELS
) -> Cost:
    """The program in a process of its own, measured by the kernel's accounts."""
    forget(folder)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)
    # The peak as the process itself has it: that of wait4 counts the parent's memory before exec as well.
    count = (
        "\ntold = [line.split() for name in ('io', 'status') for line in open(f'/proc/self/{name}')]"
        "\nprint(*(words[1] for key in ('rchar:', 'VmHWM:') for words in told if words and words[0] == key))"
    )
    start = time.perf_counter()
    process = subprocess.Popen(
        [python, "-c", code + count, str(folder), str(threads), str(folder / "digests.json"), CARD, *models],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # sd-mecha's progress bar; a failure shows in the exit code
        text=True,
    )
    assert process.stdout is not None
    told = process.stdout.read().split()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{Path(python).name} failed with exit code {process.returncode}")
    *said, called, peak = map(int, told[-5:])
    return Cost(wall, used.ru_utime + used.ru_stime, peak * 1024, called, tuple(said))


def forget(folder: Path) -> None:
    """Write back and drop the files' pages, so that every measurement begins with a cold cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    main()
