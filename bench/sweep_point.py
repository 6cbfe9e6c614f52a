"""What a sweep point costs before the first picture: merged live, against written and loaded again.

python bench/sweep_point.py [--points 8]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from ambergrade.family import sdxl
from ambergrade.merge.formula import Formula
from ambergrade.merge.resident import ResidentMerge
from ambergrade.store import find_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=8)
    points = parser.parse_args().points
    torch.set_num_threads(1)
    config = find_file("builtin://sdxl_tiny")
    paths = {name: find_file(f"builtin://{name}.safetensors") for name in ("beta7", "anxl2", "anxl3")}
    formula = Formula.parse("beta7 + a * (anxl3 - anxl2)", paths)
    read = {name: sdxl.read_checkpoint(path) for name, path in paths.items()}
    merge, networks = ResidentMerge(formula, read), sdxl.load(paths["beta7"], config)
    live = written = 0.0
    size = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(points):  # one of each in turn, so that both meet the same weather
            point, file = {"a": number / points}, Path(folder) / "point.safetensors"
            start = time.perf_counter()
            networks.assign(merge.at(point))
            middle = time.perf_counter()
            sdxl.write_checkpoint(file, merge.at(point), {})
            sdxl.load(file, config)
            written += time.perf_counter() - middle
            live += middle - start
            size = file.stat().st_size
    print(f"live           {live / points * 1e3:8.1f} ms a point, 0 bytes written")
    print(f"write and load {written / points * 1e3:8.1f} ms a point, {size:,} bytes written")
    print(f"ratio          {written / live:8.1f}")


if __name__ == "__main__":
    main()
