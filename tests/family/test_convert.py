"""Single file and folder, both ways on disk, against stock diffusers; SD 1.5 as the second family."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ambergrade.errors import BadInput, BadSetting
from ambergrade.family import sdxl
from ambergrade.family.convert import open_checkpoint, to_folder, to_single_file
from ambergrade.family.detect import ema_name
from ambergrade.family.files import write_tensors


@pytest.fixture(scope="module")
def networks(tiny_config: Path) -> sdxl.Networks:
    return sdxl.from_config(tiny_config, seed=5)


@pytest.fixture(scope="module")
def weights(networks: sdxl.Networks) -> dict[str, torch.Tensor]:
    """Make weights of two precisions, so that the conversion cannot rely on one."""
    found = {key: value.clone() for key, value in networks.tensors().items()}
    return {key: value.half() if key.startswith("first_stage_model.") else value for key, value in found.items()}


@pytest.fixture(scope="module")
def single(weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("single") / "model.safetensors"
    write_tensors(path, weights, {})
    return path


@pytest.fixture(scope="module")
def folder(single: Path, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder") / "model"
    assert to_folder(single, path, tiny_config).kind == "single file"
    return path


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert value.dtype == right[key].dtype
        assert torch.equal(value, right[key]), key


def test_there_and_back_gives_the_same_bytes(single, folder, weights, tmp_path):
    assert to_single_file(folder, tmp_path / "back.safetensors").kind == "folder"
    assert_same(load_file(tmp_path / "back.safetensors"), weights)
    assert (tmp_path / "back.safetensors").read_bytes() == single.read_bytes()


def test_stock_diffusers_reads_our_folder_and_draws_our_picture(folder, networks):
    stock = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)
    assert_same(dict(stock.unet.state_dict()), dict(networks.unet.state_dict()))
    assert_same(dict(stock.text_encoder.state_dict()), dict(networks.text_encoder.state_dict()))
    assert_same(dict(stock.text_encoder_2.state_dict()), dict(networks.text_encoder_2.state_dict()))
    stock.register_modules(vae=networks.vae)  # the file's is fp16
    for module in (stock.unet, stock.text_encoder, stock.text_encoder_2):
        # Mapped weights lie at odd addresses, where a matrix product may round otherwise.
        module.load_state_dict({key: value.clone() for key, value in module.state_dict().items()}, assign=True)
    stock.register_to_config(force_zeros_for_empty_prompt=False)
    ours = networks.pipeline(EulerDiscreteScheduler.from_config(networks.scheduler_config))
    pictures = []
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
        call = {"negative_prompt": "", "num_inference_steps": 1, "height": 64, "width": 64, "output_type": "pt"}
        pictures.append(pipe("blue hair", generator=torch.Generator().manual_seed(0), **call).images)
    assert torch.equal(*pictures)


def test_our_loader_reads_either_layout(single, folder, tiny_config):
    one, other = sdxl.load(single, tiny_config), sdxl.load(folder, tiny_config)
    assert_same(one.tensors(), other.tensors())


def test_moving_averages_are_left_out_or_used(weights, tiny_config, tmp_path):
    name = "model.diffusion_model.out.2.bias"
    averages = {ema_name(key): value + 1 for key, value in weights.items() if key.startswith("model.")}
    averages["model_ema.decay"] = torch.tensor(0.9999)
    write_tensors(tmp_path / "ema.safetensors", weights | averages, {})
    layout = to_folder(tmp_path / "ema.safetensors", tmp_path / "dropped", tiny_config)
    assert layout.ema[name] == "model_ema.diffusion_modelout2bias"
    assert len(layout.ema) == 1680
    assert layout.unexpected == ()
    to_folder(tmp_path / "ema.safetensors", tmp_path / "used", tiny_config, ema="use")
    for kind, added in (("dropped", 0), ("used", 1)):
        found = load_file(tmp_path / kind / "unet" / "diffusion_pytorch_model.safetensors")
        assert torch.equal(found["conv_out.bias"], weights[name] + added)


def test_the_markers_of_v_prediction_become_the_schedulers_and_come_back(weights, tiny_config, tmp_path):
    write_tensors(tmp_path / "v.safetensors", weights | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)}, {})
    to_folder(tmp_path / "v.safetensors", tmp_path / "v", tiny_config)
    config = json.loads((tmp_path / "v" / "scheduler" / "scheduler_config.json").read_text())
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", True)
    (tmp_path / "v" / "passive.safetensors").unlink()  # as in a folder that diffusers wrote
    to_single_file(tmp_path / "v", tmp_path / "back.safetensors")
    assert {"v_pred", "ztsnr"} <= load_file(tmp_path / "back.safetensors").keys()


def test_matrices_where_the_vae_has_convolutions_are_evened_out(weights, tiny_config, tmp_path):
    key = "first_stage_model.encoder.mid.attn_1.q.weight"
    flat = weights | {key: weights[key][:, :, 0, 0].contiguous()}
    write_tensors(tmp_path / "flat.safetensors", flat, {})
    opened = open_checkpoint(tmp_path / "flat.safetensors")
    assert torch.equal(opened.read(opened.layout.sources[key]), weights[key])
    to_folder(tmp_path / "flat.safetensors", tmp_path / "flat", tiny_config)
    found = load_file(tmp_path / "flat" / "vae" / "diffusion_pytorch_model.safetensors")
    assert torch.equal(found["encoder.mid_block.attentions.0.to_q.weight"], flat[key])


def test_an_incomplete_checkpoint_is_refused_and_leaves_nothing(weights, tiny_config, tmp_path):
    lacking = {key: value for key, value in weights.items() if not key.endswith("out.2.bias")}
    write_tensors(tmp_path / "x.safetensors", lacking | {"model.diffusion_model.odd": torch.zeros(1)}, {})
    with pytest.raises(BadInput, match=r"missing: model\.diffusion_model\.out\.2\.bias\nunknown: .*odd"):
        to_folder(tmp_path / "x.safetensors", tmp_path / "folder", tiny_config)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_what_is_there_is_not_overwritten(single, folder, tiny_config):
    with pytest.raises(BadSetting, match="is there already"):
        to_folder(single, folder, tiny_config)


def test_reading_headers_needs_no_torch(single):
    """A bad input must be told within two seconds and 100 MB."""
    code = (
        "import sys; from pathlib import Path; from ambergrade.family.convert import open_checkpoint\n"
        "assert open_checkpoint(Path(sys.argv[1])).layout.family.name == 'sdxl'\n"
        "assert not {'torch', 'diffusers', 'transformers', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(single)], check=True)


def test_sd15_reads_what_stock_diffusers_wrote_and_is_read_by_it(tiny_config, tmp_path):
    torch.manual_seed(1)
    text = json.loads((tiny_config / "text_encoder" / "config.json").read_text())
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), "norm_num_groups": 4}
    stock = StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            block_out_channels=(8, 16, 24, 24), cross_attention_dim=16, attention_head_dim=2, **blocks
        ),
        vae=AutoencoderKL.from_config(AutoencoderKL.load_config(tiny_config / "vae")),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        tokenizer=CLIPTokenizer.from_pretrained(tiny_config / "tokenizer"),
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    stock.save_pretrained(tmp_path / "stock")
    layout = to_single_file(tmp_path / "stock", tmp_path / "single.safetensors")
    assert layout.family.name == "sd15"
    read = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "single.safetensors"), config=str(tmp_path / "stock"), local_files_only=True
    )
    to_folder(tmp_path / "single.safetensors", tmp_path / "back", tmp_path / "stock")
    back = StableDiffusionPipeline.from_pretrained(tmp_path / "back", local_files_only=True, safety_checker=None)
    for part in ("unet", "vae", "text_encoder"):
        expected = dict(getattr(stock, part).state_dict())
        assert_same(dict(getattr(read, part).state_dict()), expected)
        assert_same(dict(getattr(back, part).state_dict()), expected)
