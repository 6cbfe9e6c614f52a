"""Sums on the CPU: the exact value rounded once, judged by fractions, on any processor; bytes judged by torch."""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ambergrade.merge import sums
from ambergrade.merge.checks import finite, numbers
from ambergrade.merge.kernel import FORMATS, Kernel
from ambergrade.merge.sums import combine
from ambergrade.merge.weights import Weights
from ambergrade.store import BUILTIN

Array = np.ndarray[Any, Any]
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
    (Fraction(0.1), Fraction(0.7), 1 - Fraction(0.1) - Fraction(0.7)),  # more than float64 holds
    (Fraction(repr(0.1 + 0.2)), 1 - Fraction(repr(0.1 + 0.2)), -FIFTHS, FIFTHS),  # near tenths, so near midpoints
    (HALF + Fraction(1, 10**28), HALF - Fraction(1, 10**28)),  # nearer to halves than doubled precision tells
)
MIXED = ["F32", "F16", "BF16", "F16"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
PROCESSORS = ("", "-avx512f", "-avx512f,-avx2,-fma", "-f16c")


@pytest.fixture(params=PROCESSORS)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Kernels as for a processor that lacks some instructions."""
    if request.param and not X86:
        pytest.skip("not this architecture's")
    monkeypatch.setattr(sums, "kernel", functools.cache(functools.partial(Kernel, features=request.param)))
    return str(request.param)


def nearest(exact: Fraction, dtype: str = "F16") -> int:
    """The bits, but for a zero's sign, of the nearest number; of two the even one; infinity from half beyond the last.

    By looking around a guess, and so unlike the code's own.
    """
    form = FORMATS[dtype]
    value = functools.partial(_number, dtype)
    size = abs(exact)
    guess = int(np.float32(min(float(size), 3e38)).view(np.uint32)) >> (0 if dtype == "F32" else 16)
    if dtype == "F16":
        guess = int(np.float16(min(float(size), 65504.0)).view(np.uint16))
    near = [bits for bits in (guess - 1, guess, guess + 1) if 0 <= bits <= form.infinity]
    best = min(near, key=lambda bits: (abs(value(bits) - size), bits & 1))
    return best | (form.sign if exact < 0 else 0)


def _number(dtype: str, bits: int) -> Fraction:
    """A magnitude; for infinity the power of two that would follow."""
    form = FORMATS[dtype]
    exponent, digits = bits >> form.digits, bits & ((1 << form.digits) - 1)
    whole = digits + ((1 << form.digits) if exponent else 0)
    return Fraction(whole) * Fraction(2) ** (max(exponent, 1) - 1 + form.least - form.digits)


def operands(count: int, n: int, kind: str, random: np.random.Generator) -> list[Array]:
    """Relatives of one scale or of every scale, strangers, and any bits that are a number, zeros among them."""
    if kind == "bits":
        drawn = [random.integers(0, 0x7C00, n) | (random.integers(0, 2, n) << 15) for _ in range(count)]
        return [bits.astype(np.uint16).view(np.float16) / np.float16(64) for bits in drawn]
    scale = {"relatives": 0.03, "tiny": 3e-7, "strangers": 1.0, "far": 300.0}.get(kind, 1.0)
    base = random.normal(0, scale, n) * (10 ** random.uniform(-7, 3, n) if kind == "scales" else 1)
    apart = random.normal(0, scale, (count, n)) if kind == "strangers" else base * random.normal(0, 0.05, (count, n))
    made = [(base + one).astype(np.float16) for one in apart]
    for number, x in enumerate(made):
        x[number::17] = 0
        x[number::19] = -0.0
    return made


def bits_of(x: Array, dtype: str) -> Array:
    """Make fp32 values, those of a dtype that is cut from them, or fp16's own."""
    if dtype == "F16":
        return x.astype(np.float16).view(np.uint16)
    whole = x.astype(np.float32).view(np.uint32)
    return whole if dtype == "F32" else (whole >> 16).astype(np.uint16)


def wrong(weights: Weights, dtypes: list[str], xs: list[Array], dtype: str, base: int | None) -> list[object]:
    """Where a sum is not the exact value rounded once; a zero has the base's sign, else that of what was rounded."""
    form = FORMATS[dtype]
    out = np.empty(len(xs[0]), f"u{form.bits // 8}")
    assert combine(weights, dtypes, xs, dtype, out, base=base)
    values = [[Fraction(float(v)) for v in numbers(kind, x.view(np.uint8))] for kind, x in zip(dtypes, xs, strict=True)]
    found: list[object] = []
    for place in range(len(out)):
        truth = sum((w * x[place] for w, x in zip(weights.exact, values, strict=True)), Fraction(0))
        expected = nearest(truth, dtype)
        if expected & (form.sign - 1) == 0 and base is not None:
            lowest = FORMATS[dtypes[base]].sign
            expected = form.sign if truth < 0 or int(xs[base][place]) == lowest else 0
        if int(out[place]) != expected:
            found.append((weights.exact, [float(x[place]) for x in values], int(out[place]), expected))
    return found


@pytest.mark.parametrize("kind", ["relatives", "tiny", "scales", "strangers", "bits", "far"])
def test_every_fp16_is_the_exact_value_rounded_once(processor: str, kind: str) -> None:
    random = np.random.default_rng(3)
    for exact in WEIGHTS:
        xs = operands(len(exact), 151, kind, random)  # odd, so that some are left beside the lanes
        flat = [x.view(np.uint16) for x in xs]
        for base in (0, len(xs) - 1, None):
            assert wrong(Weights(exact), ["F16"] * len(xs), flat, "F16", base) == []


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("dtypes", [["F32"] * 4, ["BF16"] * 4, MIXED], ids=["F32", "BF16", "mixed"])
def test_other_dtypes_are_rounded_once_as_well(processor: str, dtypes: list[str], dtype: str) -> None:
    """Sums whose ties and near ties are many: neighbours, and a third that is tiny beside them."""
    random = np.random.default_rng(5)
    n = 135
    for exact in WEIGHTS:
        base = random.normal(0, 0.03, n) * 10 ** random.uniform(-3, 2, n)
        few = [base.astype(np.float16) * np.float32(1 + k * 2.0**-10) for k in range(len(exact))]
        few[1][::2] = few[0][::2]
        few[-1][::3] *= np.float32(2.0**-40)
        few[0][::7] = 0
        few[0][::11] = -0.0
        kinds = dtypes[: len(exact)]
        xs = [bits_of(x, kind) for x, kind in zip(few, kinds, strict=True)]
        for number in (0, None):
            assert wrong(Weights(exact), kinds, xs, dtype, number) == []


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
@pytest.mark.parametrize("whole", [3 * 10**6, 10**17, 10**25])
def test_a_sum_that_is_small_beside_its_terms(processor: str, dtype: str, whole: int) -> None:
    """What is left of them is less than float64's error, or than its doubled one; zeros among it."""
    random = np.random.default_rng(9)
    base = bits_of(random.normal(0, 0.03, 200).astype(np.float32), dtype)
    other = base.copy()
    other[::5] ^= np.arange(40).astype(base.dtype) & 1  # the last bit
    other[1] ^= 1
    base[::50] = other[::50] = 0
    near, weight = bits_of(random.normal(0, 0.03, 200).astype(np.float32), dtype), Fraction(1, 10**7)
    for rest in (weight, Fraction(1, 3)):
        weights = (whole + rest, Fraction(-whole), 1 - rest)
        xs = [base, base, near]
        assert wrong(Weights(weights), [dtype] * 3, xs, dtype, 0) == []
        small = tuple(w / whole / 4096 for w in weights)
        assert wrong(Weights(small), [dtype] * 3, [base, other, near], dtype, 0) == []


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_the_whole_range_of_wide_dtypes(processor: str, dtype: str) -> None:
    """Any bits that are a number, subnormal ones included, with weights that keep the sum in range."""
    random = np.random.default_rng(7)
    form = FORMATS[dtype]
    drawn = [random.integers(0, form.infinity, 400) | (random.integers(0, 2, 400) * form.sign) for _ in range(2)]
    xs = [bits.astype(f"u{form.bits // 8}") for bits in drawn]
    tiny = [(x & (form.sign | ((4 << form.digits) - 1))).astype(x.dtype) for x in xs]
    for weights in ((HALF, HALF), (Fraction(1, 3), Fraction(2, 3)), (Fraction(0.1), 1 - Fraction(0.1))):
        assert wrong(Weights(weights), [dtype] * 2, xs, dtype, 0) == []
        assert wrong(Weights(weights), [dtype] * 2, tiny, dtype, 0) == []


def test_midpoints_go_to_the_even_one(processor: str) -> None:
    """Half of neighbours, for every fp16 and the next."""
    every = np.arange(0x7BFE, dtype=np.uint16)
    out = np.empty_like(every)
    combine(Weights((HALF, HALF)), ["F16"] * 2, [every, every + np.uint16(1)], "F16", out)
    np.testing.assert_array_equal(out, every + (every & 1))
    above = Weights((Fraction(49999, 10**5), Fraction(50001, 10**5)))  # a little above the middle
    combine(above, ["F16"] * 2, [every, every + np.uint16(1)], "F16", out)
    np.testing.assert_array_equal(out, every + 1)
    # and where float64 does not tell
    above = Weights((HALF - Fraction(1, 10**30), HALF + Fraction(1, 10**30)))
    few = np.ascontiguousarray(every[::97])
    combine(above, ["F16"] * 2, [few, few + np.uint16(1)], "F16", out[: len(few)])
    np.testing.assert_array_equal(out[: len(few)], few + 1)


@pytest.mark.parametrize("dtypes", [["F16"] * 4, MIXED], ids=["F16", "mixed"])
def test_cuts_and_places_in_memory_change_no_bit(dtypes: list[str]) -> None:
    random = np.random.default_rng(5)
    n = 3 * sums.STRETCH + 12_345
    base = random.normal(0, 0.03, n)
    xs = [bits_of((base + random.normal(0, 1e-3, n)).astype(np.float32), kind) for kind in dtypes]
    for exact in (WEIGHTS[0], WEIGHTS[7], (Fraction(1, 7), Fraction(6, 7), -FIFTHS, FIFTHS)):
        weights = Weights(exact)
        whole, cut = np.empty(n, np.uint16), np.empty(n, np.uint16)
        combine(weights, dtypes, xs, "F16", whole, base=0)
        for start, end in ((0, 999), (999, 70_000), (70_000, n), (n, n)):
            combine(weights, dtypes, [x[start:end] for x in xs], "F16", cut[start:end], base=0)
        np.testing.assert_array_equal(cut, whole)
        odd = [np.empty(x.nbytes + 1, np.uint8)[1:] for x in (*xs, whole)]
        for place, x in zip(odd, xs, strict=False):
            place[:] = x.view(np.uint8)
        views = [place.view(x.dtype) for place, x in zip(odd, (*xs, whole), strict=True)]
        combine(weights, dtypes, views[:-1], "F16", views[-1], base=0)
        np.testing.assert_array_equal(views[-1], whole)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_a_processor_that_flushes_subnormal_numbers_changes_no_bit(dtype: str) -> None:
    """Libraries set it for a whole thread."""
    step = 70_001 if dtype == "F32" else 1
    every = np.arange(0, FORMATS[dtype].infinity - 1, step).astype(f"u{FORMATS[dtype].bits // 8}")
    weights, made = Weights((Fraction(1, 3), Fraction(2, 3))), []
    if dtype == "F32":
        every[:100] = np.arange(100)
    for flushed in (False, True):
        if not torch.set_flush_denormal(flushed):
            pytest.skip("this processor cannot")
        out = np.empty_like(every)
        try:
            combine(weights, [dtype] * 2, [every, every + every.dtype.type(1)], dtype, out)
        finally:
            torch.set_flush_denormal(False)
        made.append(out)
    np.testing.assert_array_equal(*made)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 6e4])
def test_what_is_not_finite_is_told(processor: str, bad: float) -> None:
    x, y = np.full(100, 0.5, np.float16), np.full(100, 0.25, np.float16)
    x[40] = bad
    for weights in ((Fraction(3), Fraction(-2)), (Fraction(3.1), 1 - Fraction(3.1))):
        for second in (y, x):
            out = np.empty(100, np.uint16)
            told = combine(Weights(weights), ["F16"] * 2, [x.view(np.uint16), second.view(np.uint16)], "F16", out)
            assert told == (bad == 6e4 and second is not y)
            others = np.delete(out.view(np.float16), 40)
            assert np.isfinite(others).all()
            assert (others >= 0.5).all()


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


def run(code: str, file: Path, before: str = "") -> str:
    """The last line of a process that executes `before` and then `code`."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(file), before],
        env={**os.environ, "XDG_CACHE_HOME": str(file.parent / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()[-1]


def test_a_merge_of_fp16_files_imports_no_torch_and_has_the_bytes_of_one_that_does(tmp_path: Path) -> None:
    """So it starts at once and needs no half gigabyte for torch; nor do the bytes depend on the processor's SIMD."""
    recipe = {
        "formula": "mine = beta7 + 0.8 * (anxl3 - anxl2)",
        "models": {alias: str(BUILTIN / f"{alias}.safetensors") for alias in ("beta7", "anxl2", "anxl3")},
        "out": "out.safetensors",
        "overwrite": True,
    }
    file, out = tmp_path / "recipe.yaml", tmp_path / "out.safetensors"
    file.write_text(json.dumps(recipe))
    code = (
        "import sys; exec(sys.argv[2]); from ambergrade.door import files as command; "
        "assert command.main(['merge', sys.argv[1]]) == 0; print('torch' in sys.modules)"
    )
    narrow = (  # as on a processor of 2010
        "import functools; from ambergrade.merge import kernel, sums; known = functools.partial(kernel.Kernel, "
        f"features={'-avx512f,-avx2,-avx,-fma,-f16c' if X86 else ''!r}); sums.kernel = functools.cache(known)"
    )
    made = []
    for before, torch_too in (("", False), ("import torch", True), (narrow, False)):
        assert run(code, file, before) == str(torch_too)
        made.append(out.read_bytes())
    assert made[0] == made[1] == made[2]
    file.write_text(json.dumps({**recipe, "dtype": "bf16"}))  # nor do other dtypes need it
    assert run(code, file) == "False"
