"""Merging in memory, judged by numpy in float64 rounded once to fp16."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from ambergrade.errors import BadInput, BadSetting, UnknownName
from ambergrade.family.files import weights_digest
from ambergrade.merge.formula import Formula
from ambergrade.merge.resident import ResidentMerge

MODELS = ("beta7", "base7", "anxl2", "anxl3")
GAMMA = Formula.parse("gamma rev1 = beta7 + a * (anxl3 - anxl2) + b * (base7 - beta7)", MODELS)
CARD = {"a": 0.8, "b": 0.5}


def models(size: int = 200_000, dtype: torch.dtype = torch.float16) -> dict[str, dict[str, Tensor]]:
    """Weights around 0.03 with fine-tunes 1e-3 away, as checkpoints are; a VAE, ids and a temperature beside them."""
    random = torch.Generator().manual_seed(1)

    def normal(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=random) * scale

    base = {
        "model.w": normal(size, scale=0.03),
        "model.k": normal(64, 8, 3, 3, scale=0.2),
        "model.b": normal(64, scale=1),
    }
    made = {}
    for alias in MODELS:
        tensors = {name: (value + normal(*value.shape, scale=1e-3)).to(dtype) for name, value in base.items()}
        tensors["first_stage_model.w"] = normal(32, scale=1).to(dtype)
        tensors["conditioner.position_ids"] = torch.arange(77)[None]
        tensors["conditioner.logit_scale"] = torch.tensor(4.6052)
        made[alias] = tensors
    return made


@pytest.fixture(scope="module")
def inputs() -> dict[str, dict[str, Tensor]]:
    return models()


def exact(inputs: Mapping[str, Mapping[str, Tensor]], name: str, a: float, b: float) -> np.ndarray:
    beta7, base7, anxl2, anxl3 = (inputs[alias][name].numpy().astype(np.float64) for alias in MODELS)
    result: np.ndarray = beta7 + a * (anxl3 - anxl2) + b * (base7 - beta7)
    return result


@pytest.mark.parametrize(("a", "b"), [(0.8, 0.5), (1.0, 0.25)])
def test_at_the_cards_points_every_element_is_the_correctly_rounded_one(
    inputs: dict[str, dict[str, Tensor]], a: float, b: float
) -> None:
    merged = ResidentMerge(GAMMA, inputs).at({"a": a, "b": b})
    for name in ("model.w", "model.k", "model.b"):
        assert merged[name].dtype == torch.float16
        assert (merged[name].numpy() != exact(inputs, name, a, b).astype(np.float16)).sum() == 0


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.5), (0.6, 0.7), (0.83, 0.41), (1.7, -0.3)])
def test_at_other_points_every_element_is_a_nearest_number(
    inputs: dict[str, dict[str, Tensor]], a: float, b: float
) -> None:
    """(6 x + 7 y) / 10 often lies midway between two fp16 numbers, and float64 cannot see so: either one is as near."""
    merged = ResidentMerge(GAMMA, inputs).at({"a": a, "b": b})
    for name in ("model.w", "model.k", "model.b"):
        truth = exact(inputs, name, a, b)
        rounded = truth.astype(np.float16)
        error = abs(merged[name].numpy().astype(np.float64) - truth)
        assert (error <= 0.501 * np.spacing(abs(rounded)).astype(np.float64)).all()
        assert (merged[name].numpy() != rounded).mean() < 0.005


def test_the_order_of_writing_changes_no_bit(inputs: dict[str, dict[str, Tensor]]) -> None:
    """Equal on paper is equal in bits, though fp32 in the expanded order would end on some wrong elements."""
    flat = Formula.parse(".5 * beta7 + .8 * anxl3 - .8 * anxl2 + .5 * base7", MODELS)
    merged, other = ResidentMerge(flat, inputs).at({}), ResidentMerge(GAMMA, inputs).at(CARD)
    assert weights_digest(merged) == weights_digest(other)
    x = {alias: inputs[alias]["model.w"].float() for alias in MODELS}
    single = 0.5 * x["beta7"] + 0.8 * x["anxl3"] - 0.8 * x["anxl2"] + 0.5 * x["base7"]
    assert (single.half() != merged["model.w"]).sum() > 50


def test_fp32_models_and_other_output_types() -> None:
    inputs = models(1000, torch.float32)
    merged = ResidentMerge(GAMMA, inputs).at(CARD)
    assert merged["model.w"].dtype == torch.float32
    np.testing.assert_allclose(merged["model.w"].numpy(), exact(inputs, "model.w", **CARD), rtol=0, atol=2e-8)
    half = ResidentMerge(GAMMA, inputs, dtype="fp16").at(CARD)
    assert torch.equal(half["model.w"], merged["model.w"].to(torch.float16))
    assert torch.equal(half["first_stage_model.w"], inputs["beta7"]["first_stage_model.w"])
    assert ResidentMerge(GAMMA, inputs, dtype="bf16").at(CARD)["model.w"].dtype == torch.bfloat16


def awkward() -> dict[str, Tensor]:
    """Every finite fp16 value, both zeros among them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    return {"w": every[every.isfinite()]}


def test_a_model_merged_with_itself_is_itself() -> None:
    x = awkward()
    formula = Formula.parse("x + a * (y - z)", ["x", "y", "z"])
    merged = ResidentMerge(formula, {"x": x, "y": x, "z": x}).at({"a": 0.7})
    assert weights_digest(merged) == weights_digest(x)


def test_zero_coefficients_give_the_base(inputs: dict[str, dict[str, Tensor]]) -> None:
    base = {**inputs["beta7"], "model.w": inputs["beta7"]["model.w"].clone()}
    base["model.w"][:10] = -0.0
    merged = ResidentMerge(GAMMA, {**inputs, "beta7": base}).at({"a": 0.0, "b": 0.0})
    assert weights_digest(merged) == weights_digest(base)


def test_points_do_not_disturb_each_other_or_the_inputs(inputs: dict[str, dict[str, Tensor]]) -> None:
    before = {alias: weights_digest(tensors) for alias, tensors in inputs.items()}
    resident = ResidentMerge(GAMMA, inputs)
    first = weights_digest(resident.at(CARD))
    assert weights_digest(resident.at({"a": 0.1, "b": 0.9})) != first
    assert weights_digest(resident.at(CARD)) == first
    assert {alias: weights_digest(tensors) for alias, tensors in inputs.items()} == before


def test_another_process_with_other_threads_gives_the_same_bits(inputs: dict[str, dict[str, Tensor]]) -> None:
    code = (
        f"import runpy; t = runpy.run_path({__file__!r}); "
        "print(t['weights_digest'](t['ResidentMerge'](t['GAMMA'], t['models']()).at(t['CARD'])))"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONHASHSEED": "7"}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == weights_digest(ResidentMerge(GAMMA, inputs).at(CARD))


def test_the_vae_and_the_cosmetic_are_the_bases(inputs: dict[str, dict[str, Tensor]]) -> None:
    others = {alias: {n: t for n, t in inputs[alias].items() if n.startswith("model.")} for alias in MODELS[1:]}
    merged = ResidentMerge(GAMMA, {"beta7": inputs["beta7"], **others}).at(CARD)
    assert list(merged) == list(inputs["beta7"])
    for name in ("first_stage_model.w", "conditioner.position_ids", "conditioner.logit_scale"):
        assert torch.equal(merged[name], inputs["beta7"][name])
        assert merged[name].dtype == inputs["beta7"][name].dtype


@pytest.mark.parametrize(
    "text",
    [
        "x / 2 + y / 2",
        "(a * x + b * y) / (a + b)",
        "x - -a * (y - x)",
        "-(0.25 * 2 * (x - y)) + x",
        "2 * a * b * (y - x) / 4 + x",
    ],
)
def test_other_forms_agree_with_python(text: str) -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 1000))
    formula = Formula.parse(text, ["x", "y"])
    coefficients = {name: value for name, value in {"a": 0.75, "b": 0.5}.items() if name in formula.coefficients}
    inputs = {"x": {"w": torch.from_numpy(x).float()}, "y": {"w": torch.from_numpy(y).float()}}
    merged = ResidentMerge(formula, inputs).at(coefficients)["w"]
    expected = eval(text, {"__builtins__": {}}, {"x": x, "y": y, **coefficients})
    np.testing.assert_allclose(merged.numpy(), expected, atol=1e-6)


def test_models_that_differ_are_refused_with_a_list(inputs: dict[str, dict[str, Tensor]]) -> None:
    short = {name: tensor for name, tensor in inputs["anxl2"].items() if name != "model.b"}
    wide = {**inputs["base7"], "model.k": torch.zeros(64, 9, 3, 3), "model.extra": torch.zeros(2)}
    with pytest.raises(BadInput) as caught:
        ResidentMerge(GAMMA, {**inputs, "anxl2": short, "base7": wide})
    for part in ("3 differ", "'model.b' is missing in anxl2", "'model.extra' of base7", "(64, 9, 3, 3) in base7"):
        assert part in str(caught.value)


def test_what_is_not_finite_is_refused_by_name(inputs: dict[str, dict[str, Tensor]]) -> None:
    broken = {**inputs["anxl3"], "model.b": inputs["anxl3"]["model.b"].clone()}
    broken["model.b"][3] = float("nan")
    with pytest.raises(BadInput, match=r"'model\.b' of anxl3"):
        ResidentMerge(GAMMA, {**inputs, "anxl3": broken})
    with pytest.raises(BadInput, match=r"leaves the range of F16 in 'model\.[wkb]'"):
        ResidentMerge(GAMMA, inputs).at({"a": 1e9, "b": 0.5})


def test_settings_that_do_not_fit_are_refused(inputs: dict[str, dict[str, Tensor]]) -> None:
    with pytest.raises(UnknownName, match="Did you mean 'fp16'"):
        ResidentMerge(GAMMA, inputs, dtype="fp61")
    with pytest.raises(UnknownName, match="model 'anxl3'"):
        ResidentMerge(GAMMA, {alias: inputs[alias] for alias in MODELS[:3]})
    with pytest.raises(BadSetting, match="'b' has no value"):
        ResidentMerge(GAMMA, inputs).at({"a": 0.8})


METHODS = "beta7 + a * (ties(beta7, anxl2, anxl3, density=0.3) - beta7) + dare(b * (base7 - beta7), density=0.5)"


def test_what_methods_make_without_coefficients_is_kept_and_changes_no_bit(
    inputs: dict[str, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ambergrade.merge.methods import dare, ties

    made = {"ties": 0, "dare": 0}
    for module in (ties, dare):
        name = module.__name__.rpartition(".")[2]

        def counting(
            *given: Tensor, name: str = name, plain: object = getattr(module, name), **named: object
        ) -> Tensor:
            made[name] += 1
            return plain(*given, **named)  # type: ignore[operator, no-any-return]

        monkeypatch.setattr(module, name, counting)
    formula = Formula.parse(METHODS, MODELS)
    points = [{"a": 0.25, "b": 0.5}, {"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.75}]
    keeping, forgetting = (ResidentMerge(formula, inputs, keep=keep) for keep in (2**30, 0))
    found = [keeping.at(point) for point in points]
    assert made == {"ties": 3, "dare": 9}  # three tensors; dare's argument holds b
    for values, point in zip(found, points, strict=True):
        assert weights_digest(values) == weights_digest(forgetting.at(point))
    assert made == {"ties": 12, "dare": 18}


def test_no_more_is_kept_than_may_be(inputs: dict[str, dict[str, Tensor]]) -> None:
    size = 4 * inputs["beta7"]["model.w"].numel()  # fp32
    merge = ResidentMerge(Formula.parse(METHODS, MODELS), inputs, keep=size - 4)
    merge.at({"a": 0.25, "b": 0.5})
    kept = sum(value.numel() * 4 for value in merge._kept._values.values())
    assert 0 < kept < size


def test_components_are_made_of_the_same_only_while_their_own_coefficients_stay() -> None:
    text = "conditioner.embedders.0.transformer.text_model.w"
    named = {"model.diffusion_model.w": torch.ones(2), text: torch.ones(2)}
    formula = Formula.parse("x + unet(a * (y - x)) + te1(b * (y - x))", ["x", "y"])
    merge = ResidentMerge(formula, {"x": named, "y": {name: 2 * value for name, value in named.items()}})
    texts = [merge.made_of({"a": a, "b": b}, "te1", "te2") for a, b in ((0.5, 0.5), (0.7, 0.5), (0.5, 0.7))]
    assert texts[0] == texts[1] != texts[2]
