"""Every method in conf/method: its yaml and its function agree, and it does what any merge method must."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from ambergrade.errors import BadSetting
from ambergrade.merge import method as registry
from ambergrade.merge.method import Context, Method

METHODS = [Method.read(name) for name in registry.names()]
RANDOMISED = [method for method in METHODS if "seed" in method.parameters]
SHAPES = [(7,), (6, 10), (4, 3, 3, 3), (1, 5), (1,), ()]
FRACTIONS = {"density", "smallest", "largest", "width"}


def by_name(value: Any) -> str | None:
    return value.name if isinstance(value, Method) else None


def call(method: Method, tensors: list[Tensor], name: str = "layer.weight", **changed: Any) -> Tensor:
    return method.function(*tensors, **{**method.parameters, **changed}, context=Context(name))


def tensors(method: Method, shape: tuple[int, ...], seed: int = 0, extra: int = 0) -> list[Tensor]:
    """Arguments as a merge would give them: models near each other, differences small."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    kinds = method.kinds(len(method.arguments) + extra)
    near = [0.1 * torch.randn(shape, generator=generator) for _ in kinds]
    return [base + step if kind == "model" else step for kind, step in zip(kinds, near, strict=True)]


def test_there_are_methods() -> None:
    assert {"slerp", "ties", "dare", "della", "breadcrumbs", "model_stock", "geometric_median"} <= {*registry.names()}


@pytest.mark.parametrize("method", METHODS, ids=by_name)
def test_the_yaml_is_the_functions_schema_and_cites_its_source(method: Method) -> None:
    parameters = inspect.signature(method.function).parameters.values()
    keywords = {parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY}
    assert keywords == {*method.parameters, "context"}
    assert all(parameter.default is parameter.empty for parameter in parameters)
    variadic = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
    assert variadic == method.arguments[-1].endswith("...")
    assert len(method.source) > 30
    assert inspect.getdoc(method.function)


@pytest.mark.parametrize("method", METHODS, ids=by_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shape_dtype_and_inputs_stay(method: Method, shape: tuple[int, ...]) -> None:
    given = tensors(method, shape)
    before = [tensor.clone() for tensor in given]
    found = call(method, given)
    assert found.shape == shape
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before, strict=True))
    assert all(found.data_ptr() != tensor.data_ptr() for tensor in given) or found.numel() == 0


@pytest.mark.parametrize("method", METHODS, ids=by_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_identical_models_give_that_model_and_no_difference_gives_none(method: Method, shape: tuple[int, ...]) -> None:
    model = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    kinds = method.kinds(len(method.arguments) + method.arguments[-1].endswith("..."))
    found = call(method, [model if kind == "model" else torch.zeros(shape) for kind in kinds])
    assert torch.equal(found, model if method.gives == "model" else torch.zeros(shape))
    zeros = call(method, [torch.zeros(shape) for _ in kinds])
    assert torch.equal(zeros, torch.zeros(shape))


@pytest.mark.parametrize("method", METHODS, ids=by_name)
def test_two_calls_and_any_number_of_threads_agree_to_the_bit(method: Method) -> None:
    given = tensors(method, (96, 160))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, again = call(method, given), call(method, given)
        torch.set_num_threads(4)
        four = call(method, given)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, again)
    assert torch.equal(one, four)


@pytest.mark.parametrize("method", METHODS, ids=by_name)
def test_strides_do_not_matter(method: Method) -> None:
    given = tensors(method, (12, 8))
    strided = [tensor.T.contiguous().T for tensor in given]
    torch.testing.assert_close(call(method, given), call(method, strided), rtol=0, atol=0)


@pytest.mark.parametrize("method", [method for method in METHODS if method.arguments[-1].endswith("...")], ids=by_name)
def test_the_order_of_interchangeable_models_hardly_matters(method: Method) -> None:
    """Only the rounding of a sum may differ. What stands before the repeated argument has a role of its own."""
    fixed = len(method.arguments) - 1
    if len({*method.arguments[:-1], method.arguments[-1].removesuffix("...")}) > 1:
        pytest.skip("the arguments differ in kind")
    given = tensors(method, (9, 11), extra=2)
    first, rest = given[:1], given[1:]
    turned = [*first, *rest[::-1]]
    assert fixed >= 1
    torch.testing.assert_close(call(method, given), call(method, turned), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", RANDOMISED, ids=by_name)
def test_randomness_is_keyed_by_seed_and_name(method: Method) -> None:
    given = tensors(method, (40, 30))
    found = call(method, given, name="a", seed=3)
    assert torch.equal(found, call(method, given, name="a", seed=3))
    assert not torch.equal(found, call(method, given, name="b", seed=3))  # sd-mecha: one mask for all of a shape
    assert not torch.equal(found, call(method, given, name="a", seed=4))
    torch.manual_seed(5)
    torch.rand(7)
    assert torch.equal(found, call(method, given, name="a", seed=3))


@pytest.mark.parametrize("method", METHODS, ids=by_name)
def test_settings_out_of_range_are_told(method: Method) -> None:
    for name in sorted(FRACTIONS & {*method.parameters}):
        for value in (-0.1, 1.5):
            with pytest.raises(BadSetting, match=f"{method.name}\\("):
                call(method, tensors(method, (4, 4)), **{name: value})
