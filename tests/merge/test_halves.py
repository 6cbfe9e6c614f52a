"""fp16 sums without torch and with it: the exact value rounded once, judged by fractions; bytes judged by torch."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ambergrade.merge import halves
from ambergrade.merge.checks import finite, numbers
from ambergrade.merge.halves import Halves
from ambergrade.merge.weights import Weights
from ambergrade.store import BUILTIN

HALF, FIFTHS = Fraction(1, 2), Fraction(4, 5)
WEIGHTS = (
    (HALF, HALF, -FIFTHS, FIFTHS),  # gamma rev1
    (Fraction(3, 4), Fraction(1, 4), Fraction(-1), Fraction(1)),  # rev2
    (Fraction(1, 3), Fraction(2, 3)),
    (Fraction(7, 1000), Fraction(993, 1000)),
    (Fraction(1001, 1000), Fraction(-1, 1000)),
    (Fraction(3), Fraction(-2)),
    (Fraction(1, 2047), Fraction(2046, 2047)),
    (Fraction(5079, 10**4), Fraction(4921, 10**4), Fraction(-8137, 10**4), Fraction(8137, 10**4)),  # many digits
    (Fraction(123457, 10**6), 1 - Fraction(123457, 10**6)),
)


def sums(backend: str) -> Halves:
    made = Halves()
    made._torch = sys.modules["torch"] if backend == "torch" else None
    return made


def nearest(exact: Fraction) -> int:
    """The bits, but for a zero's sign, of the nearest fp16; of two the even one; infinity from 65520 on."""
    guess = np.float16(float(exact))
    if not np.isfinite(guess):
        return int(guess.view(np.uint16))
    near = [guess, np.nextafter(guess, np.float16(np.inf)), np.nextafter(guess, np.float16(-np.inf))]
    found = min(
        (number for number in near if np.isfinite(number)),
        key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.uint16)) & 1),
    )
    return int(found.view(np.uint16))


def operands(count: int, n: int, kind: str, random: np.random.Generator) -> list[np.ndarray[Any, Any]]:
    """Relatives of one scale or of every scale, strangers, and any bits that are a number, zeros among them."""
    if kind == "bits":
        drawn = [random.integers(0, 0x7C00, n) | (random.integers(0, 2, n) << 15) for _ in range(count)]
        return [bits.astype(np.uint16).view(np.float16) / np.float16(64) for bits in drawn]
    scale = {"relatives": 0.03, "tiny": 3e-7, "strangers": 1.0}.get(kind, 1.0)
    base = random.normal(0, scale, n) * (10 ** random.uniform(-7, 3, n) if kind == "scales" else 1)
    apart = random.normal(0, scale, (count, n)) if kind == "strangers" else base * random.normal(0, 0.05, (count, n))
    made = [(base + one).astype(np.float16) for one in apart]
    for number, x in enumerate(made):
        x[number::17] = 0
        x[number::19] = -0.0
    return made


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("kind", ["relatives", "tiny", "scales", "strangers", "bits"])
def test_every_element_is_the_exact_value_rounded_once(backend: str, kind: str) -> None:
    random = np.random.default_rng(3)
    for exact in WEIGHTS:
        n = 701  # odd, so that the last half has no neighbour
        xs = operands(len(exact), n, kind, random)
        out = np.empty(n, np.int16)
        base = xs[0].view(np.int16)
        assert sums(backend).combine(Weights(exact), [x.view(np.int16) for x in xs], out, base)
        values = [[Fraction(float(v)) for v in x] for x in xs]
        for place in range(n):
            truth = sum((w * x[place] for w, x in zip(exact, values, strict=True)), Fraction(0))
            found = int(out[place]) & 0xFFFF
            if found & 0x7FFF:
                assert found == nearest(truth), (kind, exact, [float(x[place]) for x in xs])
            else:  # a zero's sign: the base's, else that of what was rounded away
                assert nearest(truth) & 0x7FFF == 0
                assert (found != 0) == (base[place] == -0x8000 or truth < 0)


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_midpoints_go_to_the_even_one(backend: str) -> None:
    """Half of neighbours, for every fp16 and the next."""
    every = np.arange(0x7BFE, dtype=np.int16)
    out = np.empty_like(every)
    sums(backend).combine(Weights((HALF, HALF)), [every, every + np.int16(1)], out)
    np.testing.assert_array_equal(out, every + (every & 1))
    above = Weights((Fraction(49999, 10**5), Fraction(50001, 10**5)))  # a little above the middle, by fractions at last
    sums(backend).combine(above, [every, every + np.int16(1)], out)
    np.testing.assert_array_equal(out, every + 1)


@pytest.mark.parametrize("exact", [WEIGHTS[0], WEIGHTS[-2]])
def test_both_ways_have_the_same_bits_in_long_tensors_and_any_cuts(exact: tuple[Fraction, ...]) -> None:
    random = np.random.default_rng(5)
    n = 3 * halves.CHUNK + 12_345
    xs = [x.view(np.int16) for x in operands(4, n, "relatives", random)]
    found = {}
    for backend in ("numpy", "torch"):
        found[backend] = np.empty(n, np.int16)
        sums(backend).combine(Weights(exact), xs, found[backend], xs[0])
    np.testing.assert_array_equal(found["numpy"], found["torch"])
    cut = np.empty(n, np.int16)
    for start, end in ((0, 999), (999, 70_000), (70_000, n)):
        sums("numpy").combine(Weights(exact), [x[start:end] for x in xs], cut[start:end], xs[0][start:end])
    np.testing.assert_array_equal(cut, found["numpy"])


@pytest.mark.parametrize("backend", ["numpy", "torch"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 6e4])
def test_what_is_not_finite_is_told(backend: str, bad: float) -> None:
    x, y = np.full(100, 0.5, np.float16), np.full(100, 0.25, np.float16)
    x[40] = bad
    out = np.empty(100, np.int16)
    assert not sums(backend).combine(Weights((Fraction(3), Fraction(-2))), [x.view(np.int16), y.view(np.int16)], out)
    others = np.delete(out.view(np.float16), 40)
    np.testing.assert_array_equal(others, np.float16(1))


FLOATS = {
    "F16": (torch.float16, 2),
    "BF16": (torch.bfloat16, 2),
    "F8_E4M3": (torch.float8_e4m3fn, 1),
    "F8_E5M2": (torch.float8_e5m2, 1),
}


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_pattern_of_bits_is_read_as_torch_reads_it(dtype: str) -> None:
    kind, size = FLOATS[dtype]
    data = np.arange(1 << (8 * size), dtype=f"u{size}").view(np.uint8)
    truth = torch.from_numpy(data).view(kind).double().numpy()
    np.testing.assert_array_equal(numbers(dtype, data), truth)
    for place, value in enumerate(truth):
        if dtype[:2] == "F8" or place % 13 == 0:
            one = data[place * size : (place + 1) * size]
            assert finite(dtype, one) == math.isfinite(value), value
    assert not finite(dtype, data)


@pytest.mark.parametrize(("dtype", "kind"), [("F32", np.float32), ("F64", np.float64)])
def test_numbers_that_are_none_are_found_in_wide_dtypes(dtype: str, kind: type) -> None:
    sound: np.ndarray[Any, Any] = np.array(
        [0, -0.0, 1, -1, np.finfo(kind).max, np.finfo(kind).min, np.finfo(kind).tiny], kind
    )
    assert finite(dtype, sound.view(np.uint8))
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        assert not finite(dtype, np.append(sound, kind(bad)).view(np.uint8))
    assert finite(dtype, np.empty(0, np.uint8))
    assert finite("I64", np.full(3, -1, np.int64).view(np.uint8))


def test_a_merge_of_fp16_files_imports_no_torch_and_has_the_bytes_of_one_that_does(tmp_path: Path) -> None:
    """So it starts at once and needs no half gigabyte for torch; nor do the bytes depend on the processor's SIMD."""
    recipe = {
        "formula": "mine = beta7 + 0.8 * (anxl3 - anxl2)",
        "models": {alias: str(BUILTIN / f"{alias}.safetensors") for alias in ("beta7", "anxl2", "anxl3")},
        "out": "out.safetensors",
    }
    file, out = tmp_path / "recipe.yaml", tmp_path / "out.safetensors"
    file.write_text(json.dumps(recipe))
    code = (
        "import sys; exec(sys.argv[2]); from ambergrade import command; "
        "assert command.main(['merge', sys.argv[1]]) == 0; print('torch' in sys.modules)"
    )
    config: Any = np.show_config(mode="dicts")
    known = " ".join(config["SIMD Extensions"]["found"])
    made = []
    for before, more in (("", {}), ("import torch", {}), ("", {"NPY_DISABLE_CPU_FEATURES": known})):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, str(file), before],
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), **more},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.splitlines()[-1] == str(bool(before))
        made.append(out.read_bytes())
    assert made[0] == made[1] == made[2]
