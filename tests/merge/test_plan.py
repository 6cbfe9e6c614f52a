"""Policies: strict by default, each way out does what it says and the audit tells it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ambergrade.errors import BadInput, BadSetting, MissingObject, UnknownName
from ambergrade.family import sdxl
from ambergrade.merge.engine import merge
from ambergrade.merge.files import from_values, read_recipe, verify
from ambergrade.merge.formula import Formula
from ambergrade.merge.job import open_job
from ambergrade.merge.plan import make_plan
from ambergrade.store import BUILTIN

UNET = "model.diffusion_model.out.2.weight"
VAE = "first_stage_model.decoder.conv_in.weight"
IDS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
SCALE = "conditioner.embedders.1.model.logit_scale"
PROJECTION = "conditioner.embedders.1.model.text_projection"
EMA = "model_ema.diffusion_modelout2weight"
FORMULA = "out = x + 0.5 * (y - z)"


def tensors(seed: int) -> dict[str, Tensor]:
    """Relatives: one base and a little of each seed's own."""
    shared = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(seed)

    def relative(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=shared) + 0.01 * torch.randn(*shape, generator=own)).half()

    return {
        UNET: relative(8, 4),
        VAE: relative(8),
        PROJECTION: relative(24, 24),
        SCALE: torch.tensor(4.6052),
        IDS: torch.arange(77)[None],
        EMA: relative(8, 4),
    }


def merged(folder: Path, changes: dict[str, dict[str, Any]], **how: Any) -> tuple[dict[str, Tensor], str]:
    """The merge of x, y and z, and its audit; `changes` sets tensors of a model, None removes one."""
    paths = {}
    for seed, alias in enumerate("xyz", 1):
        found = {**tensors(seed), **changes.get(alias, {})}
        paths[alias] = folder / f"{alias}.safetensors"
        save_file({name: value.contiguous() for name, value in found.items() if value is not None}, paths[alias])
    job = open_job(Formula.parse(how.pop("formula", FORMULA), paths), paths, **how)
    merge(job, folder / "out.safetensors")
    return load_file(folder / "out.safetensors"), job.told()


def test_what_is_not_merged_is_the_bases(tmp_path: Path) -> None:
    found, audit = merged(tmp_path, {})
    base = tensors(1)
    for name in (VAE, SCALE, IDS):
        assert torch.equal(found[name], base[name])
        assert found[name].dtype == base[name].dtype
    assert not torch.equal(found[UNET], base[UNET])
    assert EMA not in found
    assert "left out (1)" in audit


def test_another_models_vae_and_a_merged_one(tmp_path: Path) -> None:
    x, y, z = (tensors(seed)[VAE].double() for seed in (1, 2, 3))
    found, audit = merged(tmp_path, {}, policies={"vae": "y"})
    assert torch.equal(found[VAE].double(), y)
    assert "VAE: 1 tensors of y" in audit
    found, _ = merged(tmp_path, {}, policies={"vae": "merge"})
    assert torch.equal(found[VAE], (x + 0.5 * (y - z)).half())
    with pytest.raises(BadSetting, match="vae\\(\\) has no effect"):
        merged(tmp_path, {}, formula="x + vae(y - z)")


def test_moving_averages_are_copied_where_asked(tmp_path: Path) -> None:
    found, _ = merged(tmp_path, {}, policies={"ema": "base"})
    assert torch.equal(found[EMA], tensors(1)[EMA])


@pytest.mark.parametrize("change", [{UNET: None}, {UNET: torch.zeros(8, 5).half()}])
def test_missing_and_misshapen_tensors(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="1 differ") as caught:
        merged(tmp_path, {"z": change})
    assert UNET in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()
    x, y = (tensors(seed)[UNET].double() for seed in (1, 2))
    found, audit = merged(tmp_path, {"z": change}, policies={"missing": "base"})
    assert torch.equal(found[UNET], (x + 0.5 * (y - x)).half())
    assert "missing or misshapen in z: base (1)" in audit
    found, _ = merged(tmp_path, {"z": change}, policies={"missing": "zero_delta"})
    assert torch.equal(found[UNET].double(), x)


def test_marks_of_v_prediction_must_agree(tmp_path: Path) -> None:
    mark = {"v_pred": torch.empty(0)}
    for changes in ({"x": mark}, {"y": mark}):
        with pytest.raises(BadInput, match="predict different things"):
            merged(tmp_path, changes)
    found, _ = merged(tmp_path, dict.fromkeys("xyz", mark))
    assert found["v_pred"].shape == (0,)
    found, _ = merged(tmp_path, {"y": mark}, policies={"cosmetic": "base"})
    assert "v_pred" not in found


def test_temperatures_must_agree(tmp_path: Path) -> None:
    hot = {"y": {SCALE: torch.tensor(2.0)}}
    with pytest.raises(BadInput, match=r"differs: 4\.6052 in x, 2 in y"):
        merged(tmp_path, hot)
    assert not (tmp_path / "out.safetensors").exists()
    found, _ = merged(tmp_path, hot, policies={"cosmetic": "base"})
    assert torch.equal(found[SCALE], torch.tensor(4.6052))


def test_ids_that_a_tool_stored_as_floats_become_ids_again_or_are_refused(tmp_path: Path) -> None:
    found, audit = merged(tmp_path, {"x": {IDS: torch.arange(77)[None].half()}})
    assert torch.equal(found[IDS], torch.arange(77)[None])
    assert "written as int64" in audit
    with pytest.raises(BadInput, match="is not 0, 1, 2"):
        merged(tmp_path, {"x": {IDS: torch.arange(77)[None].half() * 0.98}})


def test_a_transposed_projection_is_seen(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="of y is transposed against x"):
        merged(tmp_path, {"y": {PROJECTION: tensors(2)[PROJECTION].T}})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_models_of_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """Merged in float64 and rounded once; two differences of three numbers are exact there."""
    y, z = ({name: value.to(dtype) for name, value in tensors(seed).items() if name == UNET} for seed in (2, 3))
    found, _ = merged(tmp_path, {"y": y, "z": z})
    truth = tensors(1)[UNET].double() + 0.5 * (y[UNET].double() - z[UNET].double())
    assert found[UNET].dtype == torch.float16
    assert torch.equal(found[UNET].double(), torch.from_numpy(truth.numpy().astype("float16")).double())
    found, _ = merged(tmp_path, {"y": y, "z": z}, dtype="fp32")
    assert torch.equal(found[UNET], truth.float())


def test_what_is_not_known_is_told(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="'vae'"):
        merged(tmp_path, {}, policies={"vea": "base"})
    with pytest.raises(BadSetting, match="missing=skip"):
        merged(tmp_path, {}, policies={"missing": "skip"})
    with pytest.raises(UnknownName, match="fp16"):
        merged(tmp_path, {}, dtype="fp61")


SIGMAS, BETAS = "denoiser.sigmas", "alphas_cumprod"


def test_noise_schedules_are_copied_whatever_they_hold(tmp_path: Path) -> None:
    schedule = {SIGMAS: torch.linspace(0, 14, 10), BETAS: torch.tensor([1.0, 0.0, float("inf")])}
    found, _ = merged(tmp_path, {"x": schedule, "y": {SIGMAS: torch.ones(10)}})  # z has none, y another
    for name, value in schedule.items():
        assert torch.equal(found[name], value)
    found, _ = merged(tmp_path, {"z": schedule})
    assert not schedule.keys() & found.keys()


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ({"model.diffusion_model.out.2.scale_weight": torch.tensor(0.01)}, "out.2.scale_weight"),  # ComfyUI
        ({"scaled_fp8": torch.empty(2).to(torch.float8_e4m3fn)}, "scaled_fp8"),
        ({"model.diffusion_model.out.2.weight_scale": torch.tensor(0.01)}, "weight_scale"),
        ({"model.diffusion_model.out.2.weight.absmax": torch.ones(2)}, "weight.absmax"),  # bitsandbytes
        ({UNET: torch.ones(8, 4, dtype=torch.int8)}, UNET),
    ],
)
def test_quantised_weights_are_refused_by_name(tmp_path: Path, extra: dict[str, Tensor], name: str) -> None:
    for alias in "xyz":
        with pytest.raises(BadInput, match=f"{alias} is quantised: '[a-z_0-9.]*{name}'"):
            merged(tmp_path, {alias: extra}, policies={"missing": "base"})


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_stays_fp8_where_the_base_is(tmp_path: Path, kind: torch.dtype) -> None:
    small = {alias: {UNET: (tensors(seed)[UNET]).to(kind)} for seed, alias in enumerate("xyz", 1)}
    small["x"][UNET].view(torch.uint8)[0, 0] = 0x80  # -0.0
    found, _ = merged(tmp_path, small)
    x, y, z = (small[alias][UNET].double() for alias in "xyz")
    exact = x + 0.5 * (y - z)
    assert found[UNET].dtype == kind
    # Nearest of all numbers of the dtype, of two the even one: by trying them all.
    bits = torch.arange(256, dtype=torch.uint8)
    known = bits.view(kind).double()
    known, bits = known[known.isfinite()], bits[known.isfinite()]
    for value, truth in zip(found[UNET].double().reshape(-1), exact.reshape(-1), strict=True):
        distance = (known - truth).abs()
        nearest = distance == distance.min()
        even = nearest & (bits % 2 == 0)
        assert float(value) in set(known[even if int(nearest.sum()) > 1 and even.any() else nearest].tolist())
    same, _ = merged(tmp_path, dict.fromkeys("xyz", small["x"]))
    assert torch.equal(same[UNET].view(torch.uint8), small["x"][UNET].view(torch.uint8))


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        ('x + at("model.diffusion_model.input_block*", y - z)', "matches none of the 2 merged tensors of x"),
        ('x + at("first_stage_model.*", y - z)', "matches none"),  # the VAE is copied
        ("x + te1(y - z)", r"te1\(\) has no effect"),
        ("x + te2(y - z)", ""),
    ],
)
def test_parts_of_the_formula_that_reach_nothing_are_refused(tmp_path: Path, formula: str, message: str) -> None:
    if not message:
        assert not torch.equal(merged(tmp_path, {}, formula=formula)[0][PROJECTION], tensors(1)[PROJECTION])
        return
    with pytest.raises(BadSetting, match=message):
        merged(tmp_path, {}, formula=formula)


def test_block_weights_need_a_unet_and_its_number_of_blocks(tmp_path: Path) -> None:
    few = {UNET: None}
    with pytest.raises(BadSetting, match=r"mbw\(\) has no effect: x, of no known family"):
        merged(
            tmp_path, dict.fromkeys("xyz", few), formula=f'mbw(x, y + z - x, "{",".join("0" * 20)}", dialect="mecha")'
        )
    names = {name: ("F16", shape) for name, shape in sdxl.FAMILY.table().items()}
    formula = Formula.parse(f'mbw(x, y, "{",".join("0" * 26)}", dialect="mecha")', "xy")
    with pytest.raises(BadSetting, match="26 block weights do not fit x, of family sdxl: that takes 20"):
        make_plan(formula, {}, {"x": names, "y": names}, family=sdxl.FAMILY)


def test_what_models_predict_must_agree_wherever_they_say_it() -> None:
    described = {alias: {UNET: ("F16", (8, 4))} for alias in "xyz"}
    formula = Formula.parse(FORMULA, "xyz")
    make_plan(formula, {}, described, predictions={"x": "v", "y": "v", "z": None})
    for said in ({"x": "epsilon", "y": "v"}, {"y": "flow", "z": "v"}):
        with pytest.raises(BadInput, match=r"predict different things: . [a-z]+, . [a-z]+"):
            make_plan(formula, {}, described, predictions=said)
        make_plan(formula, {}, described, predictions=said, policies={"cosmetic": "base"})


def test_a_header_that_says_v_counts_and_an_unknown_type_is_not_made_up(tmp_path: Path) -> None:
    paths = {alias: tmp_path / f"{alias}.safetensors" for alias in "xyz"}
    for seed, alias in enumerate("xyz", 1):
        save_file(tensors(seed), paths[alias], {"modelspec.prediction_type": "v"} if alias == "y" else {})
    with pytest.raises(BadInput, match="y is marked v_pred and x is not"):
        open_job(Formula.parse(FORMULA, paths), paths)
    merge(open_job(Formula.parse("x + 0.5 * (z - x)", paths), paths), tmp_path / "a.safetensors")
    merge(open_job(Formula.parse("y + 0.5 * (y - y)", paths), paths), tmp_path / "b.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as plain, safe_open(tmp_path / "b.safetensors", "pt") as marked:
        assert "modelspec.prediction_type" not in plain.metadata()
        assert marked.metadata()["modelspec.prediction_type"] == "v"
        assert "v_pred" in marked.keys()  # noqa: SIM118


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """A whole checkpoint of the embedded world."""
    return load_file(BUILTIN / "beta7.safetensors")


def saved(folder: Path, name: str, weights: dict[str, Tensor], change: float = 1.0, **how: Any) -> Path:
    """Some of the weights, times a number, under other names."""
    prefix, keep = how.get("prefix", ""), how.get("keep", "")
    found = {
        prefix + key.removeprefix(how.get("drop", "")): (value * change if value.is_floating_point() else value)
        for key, value in weights.items()
        if key.startswith(keep)
    }
    save_file(found, folder / f"{name}.safetensors")
    return folder / f"{name}.safetensors"


CONV = "model.diffusion_model.input_blocks.0.0.weight"
FIRST_VAE = "first_stage_model.encoder.conv_in.weight"


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", "model.diffusion_model."])
def test_unets_alone_beside_a_whole_base(tmp_path: Path, weights: dict[str, Tensor], prefix: str) -> None:
    unet = {"keep": "model.diffusion_model.", "drop": "model.diffusion_model.", "prefix": prefix}
    paths = {
        "x": saved(tmp_path, "x", weights),
        "y": saved(tmp_path, "y", weights, 3.0, **unet),
        "z": saved(tmp_path, "z", weights, 2.0, **unet),
    }
    job = open_job(Formula.parse("x + unet(0.5 * (y - z))", paths), paths)
    merge(job, tmp_path / "out.safetensors", threads=1)
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == weights.keys()
    expected = weights[CONV].double() + 0.5 * ((weights[CONV] * 3).double() - (weights[CONV] * 2).double())
    assert torch.equal(found[CONV], expected.to(weights[CONV].dtype))
    with pytest.raises(BadInput, match=r"y holds no te1 and no te2: write unet\(…\)"):
        open_job(Formula.parse("x + 0.5 * (y - z)", paths), paths)
    block = ",".join(["0", "1", *["0"] * 18])
    two = Formula.parse(f'mbw(y, z, "{block}", dialect="supermerger")', paths)
    merge(open_job(two, paths), tmp_path / "two.safetensors", threads=1)
    found = load_file(tmp_path / "two.safetensors")
    assert torch.equal(found[CONV], weights[CONV] * 2)  # IN00 is z's, all else y's
    assert torch.equal(found["model.diffusion_model.out.2.bias"], weights["model.diffusion_model.out.2.bias"] * 3)


def test_a_vae_file_is_baked_in(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """As alias that the formula does not name, as a file, and into a base that has none."""
    vae = {"keep": "first_stage_model.", "drop": "first_stage_model."}
    saved(tmp_path, "anime.vae", weights, 0.5, **vae)
    saved(tmp_path, "x", weights)
    saved(tmp_path, "bare", {key: value for key, value in weights.items() if not key.startswith("first_stage")})
    recipe = {"formula": "x + 0.5 * (x - x)", "models": {"x": "x.safetensors"}, "out": "out.safetensors"}
    for number, (models, chosen) in enumerate(
        [
            ({"x": "x.safetensors", "anime": "anime.vae.safetensors"}, "anime"),
            ({"x": "x.safetensors"}, "anime.vae.safetensors"),
            ({"x": "bare.safetensors"}, "anime.vae.safetensors"),
        ]
    ):
        written = from_values({**recipe, "models": models, "policies": {"vae": chosen}}, tmp_path)
        out = tmp_path / f"{number}.safetensors"
        merge(written.job(), out, threads=1)
        found = load_file(out)
        assert found.keys() == weights.keys()
        assert torch.equal(found[FIRST_VAE], weights[FIRST_VAE] * 0.5)
        assert torch.equal(found[CONV], weights[CONV])
        assert verify(out, tmp_path, threads=1, cache=tmp_path / "cache.json").same
    with pytest.raises(BadSetting, match=r"policies\.vae=bare has no effect: bare holds no VAE"):
        from_values(
            {**recipe, "models": {"x": "x.safetensors", "bare": "bare.safetensors"}, "policies": {"vae": "bare"}},
            tmp_path,
        ).job()


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_a_program_that_flushes_subnormals_changes_no_bit(tmp_path: Path, kind: torch.dtype) -> None:
    few = torch.arange(32.0).reshape(8, 4)
    small = {alias: {UNET: few * (number * 2.0**-148)} for number, alias in enumerate("xyz", 1)}
    small["y"][UNET] = small["y"][UNET].to(kind)
    assert torch.set_flush_denormal(True)
    try:
        found, _ = merged(tmp_path, small)
    finally:
        torch.set_flush_denormal(False)
    x, y, z = (small[alias][UNET].double() for alias in "xyz")
    assert torch.equal(found[UNET].view(torch.int32), (x + 0.5 * (y - z)).float().view(torch.int32))
    assert found[UNET].count_nonzero() == 31


def test_what_is_given_twice_and_places_that_are_none_are_told(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("formula: x + a * (y - x)\nmodels: {x: x.safetensors}\ncoefficients: {a: 1, a: 2}\n")
    with pytest.raises(BadInput, match="'a' is given twice"):
        read_recipe(recipe)
    with pytest.raises(MissingObject, match=r"hub://me/model is no path"):
        from_values({"formula": "x", "models": {"x": "hub://me/model"}}, tmp_path)
