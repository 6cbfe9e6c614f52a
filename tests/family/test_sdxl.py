"""The family room against stock diffusers, which knows nothing of our key tables."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

from ambergrade.errors import BadInput
from ambergrade.family import sdxl


@pytest.fixture(scope="module")
def networks(tiny_config: Path) -> sdxl.Networks:
    return sdxl.from_config(tiny_config, seed=3)


@pytest.fixture(scope="module")
def single_file(networks: sdxl.Networks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "model.safetensors"
    sdxl.write_checkpoint(path, networks.tensors(), {"made": "by a test"})
    return path


@pytest.fixture(scope="module")
def stock(single_file: Path, tiny_config: Path) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_single_file(
        str(single_file), config=str(tiny_config), local_files_only=True, add_watermarker=False
    )


def assert_equal_weights(left: torch.nn.Module, right: torch.nn.Module) -> None:
    left_state, right_state = left.state_dict(), right.state_dict()
    assert left_state.keys() == right_state.keys()
    for key, value in left_state.items():
        assert torch.equal(value, right_state[key]), key


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "text_encoder_2"])
def test_stock_diffusers_reads_our_single_file(networks, stock, component):
    assert_equal_weights(getattr(networks, component), getattr(stock, component))


def test_key_counts_are_those_of_sdxl(networks):
    keys = list(networks.tensors())
    count = {prefix: sum(key.startswith(prefix) for key in keys) for prefix in ("model.", "first_stage_model.")}
    assert count == {"model.": 1680, "first_stage_model.": 248}
    # 16 tensors a layer and 4 more, 12 a layer and 5 more; position_ids and logit_scale: SDXL's file has 2515 so.
    assert len(keys) == 1680 + 248 + (16 * 2 + 4) + (12 * 3 + 5) + 2


@pytest.mark.parametrize(
    ("key", "shape"),
    [  # read off sd_xl_base_1.0.safetensors: names, and which axes agree
        ("model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight", (16, 40)),
        ("model.diffusion_model.input_blocks.3.0.op.weight", (8, 8, 3, 3)),
        ("model.diffusion_model.output_blocks.2.2.conv.weight", (24, 24, 3, 3)),
        ("model.diffusion_model.output_blocks.8.0.skip_connection.weight", (8, 16, 1, 1)),
        ("model.diffusion_model.label_emb.0.0.weight", (32, 60)),
        ("first_stage_model.decoder.up.3.block.0.conv1.weight", (12, 12, 3, 3)),
        ("first_stage_model.encoder.mid.attn_1.q.weight", (12, 12, 1, 1)),
        ("conditioner.embedders.0.transformer.text_model.encoder.layers.1.mlp.fc1.weight", (32, 16)),
        ("conditioner.embedders.1.model.transformer.resblocks.2.attn.in_proj_weight", (72, 24)),
        ("conditioner.embedders.1.model.text_projection", (24, 12)),
        ("conditioner.embedders.0.transformer.text_model.embeddings.position_ids", (1, 77)),
    ],
)
def test_names_and_shapes_of_the_original_layout(networks, key, shape):
    assert tuple(networks.tensors()[key].shape) == shape


def test_load_restores_every_tensor_of_a_single_file(networks, single_file, tiny_config):
    loaded = sdxl.load(single_file, tiny_config)
    assert sdxl.weights_digest(loaded.tensors()) == sdxl.weights_digest(networks.tensors())


def test_load_reads_what_stock_diffusers_saved_as_a_folder(networks, stock, tiny_config, tmp_path):
    stock.save_pretrained(tmp_path)
    loaded = sdxl.load(tmp_path, tiny_config)
    for name, module in networks.modules().items():
        assert_equal_weights(module, getattr(loaded, name))


def test_load_converts_half_precision_files(networks, tiny_config, tmp_path):
    half = {key: value.half() if value.is_floating_point() else value for key, value in networks.tensors().items()}
    sdxl.write_checkpoint(tmp_path / "half.safetensors", half, {})
    loaded = sdxl.load(tmp_path / "half.safetensors", tiny_config)
    assert loaded.unet.dtype == torch.float32
    assert torch.equal(loaded.unet.conv_in.weight, networks.unet.conv_in.weight.half().float())


def test_random_weights_depend_on_the_seed_alone(networks, tiny_config):
    torch.manual_seed(99)
    again, other = sdxl.from_config(tiny_config, seed=3), sdxl.from_config(tiny_config, seed=4)
    assert_equal_weights(networks.unet, again.unet)
    assert not torch.equal(networks.unet.conv_in.weight, other.unet.conv_in.weight)


def test_encode_text_equals_the_stock_pipeline(networks, stock):
    texts = ["1girl, red hair, horns", ""]
    with torch.no_grad():
        states, pooled = networks.encode_text(texts)
        expected, _, expected_pooled, _ = stock.encode_prompt(texts, do_classifier_free_guidance=False)
    assert states.shape == (2, 77, 40)
    assert pooled.shape == (2, 12)
    assert torch.equal(states, expected)
    assert torch.equal(pooled, expected_pooled)
    assert not torch.allclose(states[0], states[1])


def test_pipeline_draws_the_same_picture_as_stock(networks, stock, tiny_config):
    scheduler = EulerDiscreteScheduler.from_config(networks.scheduler_config)
    ours = networks.pipeline(scheduler)
    pictures = []
    for pipe in (ours, stock):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        call = {"negative_prompt": "", "num_inference_steps": 1, "height": 64, "width": 64, "output_type": "pt"}
        pictures.append(pipe("blue hair", generator=generator, **call).images)
    assert torch.equal(*pictures)


def test_assign_changes_the_live_modules_in_place(tiny_config):
    target, source = sdxl.from_config(tiny_config, seed=1), sdxl.from_config(tiny_config, seed=2)
    weight = target.unet.conv_in.weight
    target.assign(source.tensors())
    assert target.unet.conv_in.weight is weight
    assert sdxl.weights_digest(target.tensors()) == sdxl.weights_digest(source.tensors())


def test_assign_names_every_fault_and_changes_nothing(networks):
    before = sdxl.weights_digest(networks.tensors())
    wrong = {key: value + 1 for key, value in networks.tensors().items()}
    wrong["model.diffusion_model.extra"] = wrong.pop("model.diffusion_model.out.2.bias")
    wrong["model.diffusion_model.out.0.bias"] = torch.zeros(3)
    with pytest.raises(BadInput) as caught:
        networks.assign(wrong)
    message = str(caught.value)
    assert "missing: model.diffusion_model.out.2.bias" in message
    assert "unexpected: model.diffusion_model.extra" in message
    assert "out.0.bias gives (3,), the unet has (8,)" in message
    assert sdxl.weights_digest(networks.tensors()) == before


def test_a_pickle_is_refused_with_the_command_that_converts_it(tmp_path):
    torch.save({}, tmp_path / "old.ckpt")
    with pytest.raises(BadInput, match="weights_only=True"):
        sdxl.read_checkpoint(tmp_path / "old.ckpt")


def test_a_truncated_file_is_refused(single_file, tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(single_file.read_bytes()[:-100])
    with pytest.raises(BadInput, match="not a whole safetensors file"):
        sdxl.read_checkpoint(tmp_path / "cut.safetensors")


def test_a_tokenizer_that_pools_elsewhere_is_refused(tiny_config, tmp_path):
    folder = tmp_path / "config"
    shutil.copytree(tiny_config, folder)
    path = folder / "text_encoder_2" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": 49407}))
    with pytest.raises(BadInput, match="pools at token 49407"):
        sdxl.from_config(folder, seed=0)
