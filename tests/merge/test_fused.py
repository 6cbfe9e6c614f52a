"""The GPU's kernel in Triton's interpreter: the bits of the CPU's sums, zeros and overflow included."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from ambergrade.errors import BadSetting
from ambergrade.merge.arithmetic import Combiner
from ambergrade.merge.weights import Weights

pytest.importorskip("triton")
HALF, FIFTHS = Fraction(1, 2), Fraction(4, 5)
CHOICES = (
    (HALF, HALF, -FIFTHS, FIFTHS),
    (Fraction(1, 3), Fraction(2, 3)),
    (Fraction(1),),
    (Fraction(3), Fraction(-2)),
    (Fraction(-2), Fraction(3)),
    (Fraction(5079, 10**4), Fraction(4921, 10**4), Fraction(-8137, 10**4), Fraction(8137, 10**4)),
    (Fraction(49999, 10**5), Fraction(50001, 10**5)),
)


def cases() -> Iterator[tuple[Weights, list[Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    for exact in CHOICES:
        for scale in (1e-6, 0.03, 3e4):
            base = torch.randn(3000, generator=generator) * scale
            xs = [(base + 0.03 * scale * torch.randn(3000, generator=generator)).half() for _ in exact]
            xs[0][:99] = -0.0
            xs[0][99:150] = 0.0
            xs[-1][60:120] = -0.0
            yield Weights(exact), xs


def compare(streamed: bool) -> int:
    """Elements that differ, all cases in one launch; run where TRITON_INTERPRET is set."""
    from ambergrade.merge import fused

    fused.BLOCK, fused.STRETCH = 1024, 4096  # type: ignore[misc]
    parts, truths, wrong = [], [], 0
    for weights, xs in cases():
        for base in (0, None):
            truth = torch.empty_like(xs[0])
            finite = Combiner().combine(weights, xs, truth, None if base is None else xs[0])
            truths.append((truth, finite, weights, xs))
            parts.append(fused.part(weights, xs, torch.empty_like(xs[0]), base))
            wide = torch.empty(3000)  # the same values in a network of fp32
            truths.append((truth.float(), finite, weights, xs))
            parts.append(fused.part(weights, xs, wide, base))
            truths.append((truth.to(torch.bfloat16), finite, weights, xs))  # as a copy into a network of bf16 rounds
            parts.append(fused.part(weights, xs, torch.empty(3000, dtype=torch.bfloat16), base))
    said = fused.streamed(parts, torch.device("cpu")) if streamed else fused.one_pass(parts)
    for part, fault, (truth, finite, weights, xs) in zip(parts, said.tolist(), truths, strict=True):
        far = weights.size * max(float(x.abs().max()) for x in xs) >= 2**28
        wrong += fault != (fused.FAR if far else 0 if finite else fused.NOT_FINITE)
        known = ~truth.isnan() & (not far)
        kind = torch.int16 if truth.element_size() == 2 else torch.int32
        wrong += int((part.out.view(kind) != truth.view(kind))[known].sum())
    return wrong


def live_point(dtype: torch.dtype) -> int:
    """Parameters of live text encoders that differ, kernel against CPU: joined and transposed matrices among them."""
    from ambergrade.family import sdxl
    from ambergrade.merge import fused, passes
    from ambergrade.merge.formula import Formula
    from ambergrade.merge.resident import ResidentMerge
    from ambergrade.store import BUILTIN

    inputs = {alias: sdxl.read_checkpoint(BUILTIN / f"{alias}.safetensors") for alias in ("beta7", "anxl2", "anxl3")}
    merge = ResidentMerge(Formula.parse("beta7 + te1(a * (anxl3 - anxl2)) + te2(b * (anxl3 - beta7))", inputs), inputs)
    launched: list[int] = []
    one_pass, by_kernel = fused.one_pass, passes.by_kernel

    def counted(parts: Sequence[Any]) -> Tensor:
        launched.append(len(parts))
        return one_pass(parts)

    def point() -> dict[str, Tensor]:
        networks = sdxl.from_config(BUILTIN / "sdxl_tiny", seed=0)
        modules = {part: networks.modules()[part].to(dtype) for part in ("text_encoder", "text_encoder_2")}
        merge.assign(modules, {"a": 0.8137, "b": 1.5})
        return {f"{part}/{key}": x for part, module in modules.items() for key, x in module.state_dict().items()}

    truth = point()
    fused.one_pass, passes.by_kernel = counted, lambda device: True
    found = point()
    fused.one_pass, passes.by_kernel = one_pass, by_kernel
    assert len(truth) - 2 <= sum(launched) < len(truth), (launched, len(truth))  # all but the transposed one
    return sum(not torch.equal(x, found[key]) for key, x in truth.items())


def test_the_kernel_has_the_cpus_bits() -> None:
    code = (
        f"import runpy; it = runpy.run_path({__file__!r})\n"
        "import torch; halves, brains = it['live_point'](torch.float16), it['live_point'](torch.bfloat16)\n"
        "print(it['compare'](False), it['compare'](True), halves, brains)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert answer.stdout.split() == ["0", "0", "0", "0"], answer.stderr[-500:]


def test_what_one_pass_cannot_do_is_refused() -> None:
    from ambergrade.merge.fused import part

    x = torch.zeros(8, dtype=torch.float16)
    tiny = Fraction(1, 10**7)
    for weights, inputs in (
        ((tiny, 1 - tiny), [x, x]),
        ((Fraction(1),), [x.float()]),
        ((HALF, HALF), [x[::2], x[::2]]),
    ):
        with pytest.raises(BadSetting, match="same bits"):
            part(Weights(weights), inputs, torch.empty_like(inputs[0]))


def test_buffers_and_tables_are_made_once() -> None:
    from ambergrade.merge import fused

    device = torch.device("cpu")
    assert fused._slots(device, 64).data_ptr() == fused._slots(device, 64).data_ptr()
    assert fused._uploaded(bytes(56), 1, device) is fused._uploaded(bytes(56), 1, device)
    programs = fused._programs((2, 0, 3), device)
    assert programs.tolist() == [[0, 0], [0, 1], [2, 0], [2, 1], [2, 2]]
