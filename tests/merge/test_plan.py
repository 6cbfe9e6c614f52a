"""Policies: strict by default, each way out does what it says and the audit tells it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ambergrade.errors import BadInput, BadSetting, UnknownName
from ambergrade.merge.engine import merge
from ambergrade.merge.formula import Formula
from ambergrade.merge.job import open_job

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
