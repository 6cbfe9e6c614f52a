"""LoRA files: differences against lycoris' own merge and closed forms, names against the real modules."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ambergrade.errors import BadInput, MissingObject
from ambergrade.family import sd15, sdxl
from ambergrade.merge.engine import merge
from ambergrade.merge.files import verify
from ambergrade.merge.formula import Formula
from ambergrade.merge.job import open_job
from ambergrade.merge.lora import alphas, check_shapes, difference, lora_weights, read_lora, targets
from ambergrade.merge.method import Context, Method
from ambergrade.merge.resident import ResidentMerge
from ambergrade.store import BUILTIN, Digests

lycoris = pytest.importorskip("lycoris.modules", reason="the extra 'lora' is not installed")

WEIGHTS = sdxl.FAMILY.table()
ATTENTION = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
ATTENTION_DIFFUSERS = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoConModule", {}),
    "lora with tucker": ("LoConModule", {"use_tucker": True}),
    "dora": ("LoConModule", {"weight_decompose": True}),
    "loha": ("LohaModule", {}),
    "loha with tucker": ("LohaModule", {"use_tucker": True}),
    "loha dora": ("LohaModule", {"weight_decompose": True}),
    "lokr": ("LokrModule", {"factor": 4}),
    "lokr of two pairs": ("LokrModule", {"factor": 4, "decompose_both": True}),
    "lokr with tucker": ("LokrModule", {"factor": 4, "use_tucker": True}),
    "lokr full": ("LokrModule", {"factor": 4, "full_matrix": True}),
    "lokr dora": ("LokrModule", {"factor": 4, "weight_decompose": True}),
}


def made_by_the_library(kind: str, layer: nn.Module, alpha: float = 2.0) -> tuple[dict[str, Tensor], Tensor]:
    """A file's tensors under kohya's names, and what the library's own merge adds to the weight."""
    name, settings = KINDS[kind]
    module = getattr(lycoris, name)("lora_unet_x", layer, 1.0, 2, alpha, **settings)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in module.named_parameters():
            if "dora" not in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            else:
                parameter.mul_(1.3)
        module.eval()
        merged = module.get_merged_weight(1.0, shape=layer.weight.shape)[0]
        state = {f"lora_unet_x.{key}": value.detach().clone() for key, value in module.custom_state_dict().items()}
        return state, (merged - layer.weight).detach()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", ["linear", "conv", "1x1 conv"])
def test_a_file_made_by_lycoris_adds_what_lycoris_adds(kind: str, layer: str) -> None:
    torch.manual_seed(3)
    sizes: dict[str, nn.Module] = {
        "linear": nn.Linear(24, 16),
        "conv": nn.Conv2d(12, 16, 3, padding=1),
        "1x1 conv": nn.Conv2d(12, 16, 1),
    }
    module = sizes[layer]
    tensors, expected = made_by_the_library(kind, module)
    assert expected.abs().max() > 0.01
    found = difference("model.diffusion_model.x.weight", tensors, module.weight.detach())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_lora_is_up_times_down() -> None:
    up, down = random(16, 2), random(2, 24, seed=1)
    tensors = {"m.lora_up.weight": up, "m.lora_down.weight": down, "m.alpha": torch.tensor(8.0)}
    expected = (8 / 2) * (up.double() @ down.double())
    torch.testing.assert_close(difference("x.weight", tensors, torch.zeros(16, 24)), expected.float())
    half = {key: value.half() for key, value in tensors.items()}
    # Exact where the file is fp16: each product has 22 bits, their sum fits float64, one rounding is left.
    exact = 4 * (half["m.lora_up.weight"].double() @ half["m.lora_down.weight"].double())
    assert torch.equal(difference("x.weight", half, torch.zeros(16, 24)), exact.float())


def test_loha_is_an_elementwise_product_and_lokr_a_kronecker_product() -> None:
    parts = {
        key: random(*shape, seed=i)
        for i, (key, shape) in enumerate({"w1_a": (6, 2), "w1_b": (2, 8), "w2_a": (6, 2), "w2_b": (2, 8)}.items())
    }
    tensors = {f"m.hada_{key}": value for key, value in parts.items()} | {"m.alpha": torch.tensor(1.0)}
    expected = 0.5 * (parts["w1_a"] @ parts["w1_b"]) * (parts["w2_a"] @ parts["w2_b"])
    torch.testing.assert_close(difference("x.weight", tensors, torch.zeros(6, 8)), expected)
    one, two = random(2, 3), random(3, 4, seed=1)
    whole = {
        "m.lokr_w1": one,
        "m.lokr_w2": two,
        "m.alpha": torch.tensor(99.0),
    }  # whole factors have no rank to divide by
    torch.testing.assert_close(difference("x.weight", whole, torch.zeros(6, 12)), torch.kron(one, two))
    low = {"m.lokr_w1": one, "m.lokr_w2_a": two[:, :1], "m.lokr_w2_b": two[:1], "m.alpha": torch.tensor(0.5)}
    expected = 0.5 * torch.kron(one, two[:, :1] @ two[:1])
    torch.testing.assert_close(difference("x.weight", low, torch.zeros(6, 12)), expected)


@pytest.mark.parametrize("form", ["rows", "columns", "peft"])
def test_dora_gives_each_row_or_column_its_length(form: str) -> None:
    base, up, down = (
        random(6, 6),
        random(6, 2, seed=1),
        random(2, 6, seed=2),
    )  # square, so that the shape decides nothing
    lengths = random(6, seed=3).abs() + 0.5
    keys = {"rows": ("dora_scale", (6, 1)), "columns": ("dora_scale", (1, 6)), "peft": ("lora_magnitude_vector", (6,))}
    leaf, shape = keys[form]
    tensors = {"m.lora_B.weight": up, "m.lora_A.weight": down, f"m.{leaf}": lengths.reshape(shape)}
    merged = base + difference("x.weight", tensors, base)
    torch.testing.assert_close(merged.norm(dim=0 if form == "columns" else 1), lengths)
    direction = nn.functional.normalize(base + up @ down, dim=0 if form == "columns" else 1)
    torch.testing.assert_close(nn.functional.normalize(merged, dim=0 if form == "columns" else 1), direction)


@pytest.mark.parametrize(
    ("module", "weight"),
    [
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", ATTENTION),  # kohya's SDXL
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", ATTENTION),
        (f"unet.{ATTENTION_DIFFUSERS}", ATTENTION),
        (f"base_model.model.{ATTENTION_DIFFUSERS}", ATTENTION),
        ("diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q", ATTENTION),
        ("lora_unet_input_blocks_1_0_in_layers_2", CONV),
        ("lora_unet_down_blocks_0_resnets_0_conv1", CONV),
        (
            "lora_te1_text_model_encoder_layers_3_mlp_fc1",
            "conditioner.embedders.0.transformer.text_model.encoder.layers.3.mlp.fc1.weight",
        ),
        (
            "text_encoder.text_model.encoder.layers.3.mlp.fc1",
            "conditioner.embedders.0.transformer.text_model.encoder.layers.3.mlp.fc1.weight",
        ),
        (
            "lora_te2_text_model_encoder_layers_31_self_attn_k_proj",
            "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight",
        ),
        ("text_encoder_2.text_projection", "conditioner.embedders.1.model.text_projection"),
    ],
)
def test_names_of_kohya_peft_and_comfyui_find_their_weight(module: str, weight: str) -> None:
    leaves = (
        ("lora_down.weight", "lora_up.weight", "alpha") if "lora_" in module else ("lora_A.weight", "lora_B.weight")
    )
    entries = {f"{module}.{leaf}": (4, 4) for leaf in leaves}
    assert targets(entries, WEIGHTS) == {weight: tuple(sorted(entries))}


def test_diffusers_names_before_peft_and_those_of_sd15() -> None:
    entries = {
        f"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.{way}.weight": (4, 4)
        for way in ("up", "down")
    }
    assert targets(entries, WEIGHTS) == {ATTENTION: tuple(sorted(entries))}
    entries = {
        f"lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_{way}.weight": (4, 4) for way in ("up", "down")
    }
    name = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"
    assert targets(entries, sd15.FAMILY.table()) == {name: tuple(sorted(entries))}


def test_every_layer_that_kohya_trains_has_a_name() -> None:
    """kohya's networks/lora.py takes every Linear and Conv2d of the attention blocks, and of the resnets for LoCon."""
    names = [
        f"lora_unet_{key.removeprefix('model.diffusion_model.').removesuffix('.weight').replace('.', '_')}"
        for key, shape in WEIGHTS.items()
        if key.startswith("model.diffusion_model.") and key.endswith(".weight") and len(shape) > 1
    ]
    assert len(names) == 794
    entries = {f"{name}.{leaf}": (1, 1) for name in names for leaf in ("lora_up.weight", "lora_down.weight")}
    assert len(targets(entries, WEIGHTS)) == 794


def test_a_stacked_weight_takes_three_modules_each_in_its_place() -> None:
    name = "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight"
    parts = {}
    for index, part in enumerate("qv"):
        module = f"lora_te2_text_model_encoder_layers_0_self_attn_{part}_proj"
        parts[f"{module}.lora_up.weight"] = random(5, 1, seed=index)
        parts[f"{module}.lora_down.weight"] = random(1, 5, seed=index + 9)
    assert targets({key: tuple(value.shape) for key, value in parts.items()}, WEIGHTS) == {name: tuple(sorted(parts))}
    found = difference(name, parts, torch.zeros(15, 5))
    query, key, value = found.chunk(3)
    torch.testing.assert_close(query, random(5, 1) @ random(1, 5, seed=9))
    assert torch.equal(key, torch.zeros(5, 5))
    torch.testing.assert_close(value, random(5, 1, seed=1) @ random(1, 5, seed=10))


def test_the_text_projection_is_changed_as_it_multiplies() -> None:
    tensors = {
        "lora_te2_text_projection.lora_up.weight": random(3, 1),
        "lora_te2_text_projection.lora_down.weight": random(1, 4),
    }
    found = difference("conditioner.embedders.1.model.text_projection", tensors, torch.zeros(4, 3))
    torch.testing.assert_close(found, (random(3, 1) @ random(1, 4)).T)


def test_unused_and_lacking_keys_are_told() -> None:
    entries = {
        "lora_unet_input_blocks_4_1_proj_in.lora_up.weight": (4, 4),
        "lora_unet_input_blocks_4_1_proj_im.lora_up.weight": (4, 4),
        "lora_unet_input_blocks_4_1_proj_in.oft_blocks": (4, 4),
        "lora_unet_out_0.vera_lambda_d": (4, 4),
        "lora_te3_text_model.lora_up.weight": (4, 4),
        "lora_unet_out_2.lokr_w1_a": (1, 1),
    }
    with pytest.raises(BadInput) as caught:
        targets(entries, WEIGHTS)
    message = str(caught.value)
    assert (
        "proj_im.lora_up.weight: the model has no such module; the nearest is lora_unet_input_blocks_4_1_proj_in"
        in message
    )
    assert "lora_unet_out_0.vera_lambda_d: not a key of a known kind" in message
    assert "lora_unet_input_blocks_4_1_proj_in: is of several kinds: oft_blocks, up" in message
    assert "lora_te3_text_model.lora_up.weight: the model has no such module" in message
    assert "lora_unet_input_blocks_4_1_proj_in: lacks down" in message
    assert "lora_unet_out_2: lacks lokr_w1_b" in message
    assert "lora_unet_out_2: lacks lokr_w2_a" in message
    twice = {f"lora_unet_{name}.lora_{way}.weight": (4, 4) for name in ("out_2", "conv_out") for way in ("up", "down")}
    with pytest.raises(BadInput, match="changes the same weight as lora_unet_conv_out"):
        targets(twice, WEIGHTS)


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    **KINDS,
    "glora": ("GLoRAModule", {}),
    "ia3": ("IA3Module", {}),
    "ia3 of the input": ("IA3Module", {"train_on_input": True}),
    "oft": ("DiagOFTModule", {}),
    "oft within bounds, rescaled": ("DiagOFTModule", {"constraint": 0.01, "rescaled": True}),
    "boft": ("ButterflyOFTModule", {}),
    "boft, rescaled": ("ButterflyOFTModule", {"rescaled": True}),
    "full": ("FullModule", {}),
}


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_the_merged_weight_gives_what_the_trained_layer_gives(kind: str, layer: str) -> None:
    """By the forward pass, of rank 2 and alpha 3: the library's own merge of LoHa and LoKr takes alpha / rank twice."""
    torch.manual_seed(3)
    module = nn.Linear(24, 16) if layer == "linear" else nn.Conv2d(12, 16, 3, padding=1)
    x = random(4, 24) if layer == "linear" else random(2, 12, 5, 5)
    weight, bias = (value.detach().clone() for value in (module.weight, module.bias))
    name, settings = METHODS[kind]
    adapter = getattr(lycoris, name)("lora_unet_x", module, 1.0, 2, 3.0, **settings)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in adapter.named_parameters():
            if "dora" in key or "rescale" in key:
                parameter.mul_(1.3)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        adapter.eval()
        adapter.apply_to()
        values = adapter.custom_state_dict() or adapter.state_dict()
        state = {f"lora_unet_x.{key}": value.detach().clone() for key, value in values.items()}
        expected = module(x).detach()
    shapes = {key: torch.empty(value.shape, device="meta") for key, value in state.items()}
    changed = {}
    for what, base in (("weight", weight), ("bias", bias)):
        mine = {key: value for key, value in state.items() if key.endswith(".diff_b") == (what == "bias")}
        assert difference(f"x.{what}", {key: shapes[key] for key in mine}, base.to("meta")).is_meta
        changed[what] = base + difference(f"x.{what}", mine, base) if mine else base
    assert (changed["weight"] - weight).abs().max() > 0.01
    run = nn.functional.linear if layer == "linear" else lambda *about: nn.functional.conv2d(*about, padding=1)
    torch.testing.assert_close(run(x, changed["weight"], changed["bias"]), expected, rtol=2e-4, atol=2e-4)


def test_norms_and_biases_are_changed_in_their_places() -> None:
    norm = "model.diffusion_model.input_blocks.4.0.in_layers.0"
    text = "conditioner.embedders.1.model.transformer.resblocks.0"
    entries = {
        "lora_unet_down_blocks_1_resnets_0_norm1.w_norm": (640,),
        "lora_unet_down_blocks_1_resnets_0_norm1.b_norm": (640,),
        "lora_te2_text_model_encoder_layers_0_self_attn_k_proj.diff": (1280, 1280),
        "lora_te2_text_model_encoder_layers_0_self_attn_k_proj.diff_b": (1280,),
    }
    names = list(entries)
    norm_of_one = {"lora_unet_input_blocks_4_0_in_layers_0.w_norm": (320,)}
    assert targets(norm_of_one, WEIGHTS) == {f"{norm}.weight": tuple(norm_of_one)}
    assert targets(dict(list(entries.items())[2:]), WEIGHTS) == {
        f"{text}.attn.in_proj_bias": (names[3],),
        f"{text}.attn.in_proj_weight": (names[2],),
    }
    found = difference(f"{text}.attn.in_proj_bias", {names[3]: random(5)}, torch.zeros(15))
    assert torch.equal(found, torch.cat([torch.zeros(5), random(5), torch.zeros(5)]))
    with pytest.raises(BadInput, match="a norm, which down, up cannot change"):
        targets(
            {f"lora_unet_input_blocks_4_0_in_layers_0.lora_{way}.weight": (4, 4) for way in ("up", "down")}, WEIGHTS
        )
    with pytest.raises(BadInput, match="changes a bias that the model does not have"):
        targets({"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.diff_b": (640,)}, WEIGHTS)


@pytest.mark.parametrize(
    ("before", "after", "weight"),
    [
        ("lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_", ".weight", ATTENTION),
        (
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora.",
            ".weight",
            ATTENTION.replace("to_q", "to_out.0"),
        ),
        (
            "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_linear_layer.",
            ".weight",
            "conditioner.embedders.0.transformer.text_model.encoder.layers.3.self_attn.q_proj.weight",
        ),
    ],
)
def test_more_names_that_tools_write(before: str, after: str, weight: str) -> None:
    entries = {f"{before}{way}{after}": (4, 4) for way in ("up", "down")}
    assert targets(entries, WEIGHTS) == {weight: tuple(sorted(entries))}


def peft_folder(folder: Path, config: dict[str, Any], rank: int = 4) -> Path:
    module = f"base_model.model.{ATTENTION_DIFFUSERS}"
    tensors = {f"{module}.lora_A.weight": random(rank, 640), f"{module}.lora_B.weight": random(640, rank, seed=1)}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "strength"),
    [
        ({"r": 4, "lora_alpha": 1}, 0.25),
        ({"r": 4, "lora_alpha": 8}, 2.0),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, 4.0),
        ({"r": 8, "lora_alpha": 16, "rank_pattern": {"attn1.to_q": 4}}, 4.0),
        ({"r": 4, "lora_alpha": 16, "alpha_pattern": {"attn1.to_q": 2}}, 0.5),
        ({"r": 4, "lora_alpha": 16, "alpha_pattern": {"to_k": 2}}, 4.0),
    ],
)
def test_the_strength_of_a_peft_folder_is_its_configs(tmp_path: Path, config: dict[str, Any], strength: float) -> None:
    tensors = read_lora(peft_folder(tmp_path, {"peft_type": "LORA", **config}))
    found = difference(ATTENTION, tensors, torch.zeros(640, 640))
    product = random(640, 4, seed=1).double() @ random(4, 640).double()
    torch.testing.assert_close(found, (strength * product).float())
    assert targets({key: tuple(value.shape) for key, value in tensors.items()}, WEIGHTS).keys() == {ATTENTION}


def test_peft_agrees_on_the_strength(tmp_path: Path) -> None:
    """peft's own merge of the folder that peft saved, of a network with this module's name."""
    peft = pytest.importorskip("peft")
    network = nn.ModuleDict({"attn1": nn.ModuleDict({"to_q": nn.Linear(6, 5, bias=False), "to_k": nn.Linear(6, 5)})})
    network.forward = lambda x: network["attn1"]["to_q"](x)
    how = {"use_rslora": True, "rank_pattern": {"to_k": 3}, "alpha_pattern": {"attn1.to_k": 7}}
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["to_q", "to_k"], init_lora_weights=False, **how)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    model = peft.get_peft_model(network, config)
    model.save_pretrained(tmp_path)
    after = model.merge_and_unload().state_dict()
    tensors = read_lora(tmp_path)
    for module in ("attn1.to_q", "attn1.to_k"):
        mine = {key: value for key, value in tensors.items() if f".{module}." in key}
        found = difference("w", mine, before[f"{module}.weight"])
        torch.testing.assert_close(found, after[f"{module}.weight"] - before[f"{module}.weight"], rtol=1e-4, atol=1e-5)


def test_a_scale_that_only_the_header_knows_is_read() -> None:
    entries = {f"unet.{ATTENTION_DIFFUSERS}.lora_{part}.weight": (4, 4) for part in "AB"}
    other = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 8, "text_encoder.lora_alpha": 99})}
    assert alphas(Path("x.safetensors"), entries, other) == {f"unet.{ATTENTION_DIFFUSERS}.alpha": 8}
    with pytest.raises(BadInput, match="no JSON object"):
        alphas(Path("x.safetensors"), entries, {"lora_adapter_metadata": "["})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type = LOHA"),
        ({"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa_niter_4"}, "init_lora_weights = pissa"),
        ({"r": 4, "lora_alpha": 4, "fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"r": 4, "lora_alpha": "much"}, "no number"),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"(a+)+$": 2}}, "only names of modules"),
    ],
)
def test_a_config_that_asks_for_more_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read_lora(peft_folder(tmp_path, config))


def test_values_that_are_none_are_the_loras_fault() -> None:
    tensors = {"m.lora_up.weight": random(4, 2), "m.lora_down.weight": torch.full((2, 4), math.nan)}
    with pytest.raises(BadInput, match=r"'m\.lora_down\.weight' of the LoRA holds NaN"):
        difference("x.weight", tensors, torch.zeros(4, 4))


def test_shapes_that_do_not_fit_are_told() -> None:
    tensors = {"m.lora_up.weight": random(16, 2), "m.lora_down.weight": random(2, 9)}
    with pytest.raises(BadInput, match=r"m does not fit 'x\.weight' \(16, 24\): up \(16, 2\), down \(2, 9\)"):
        difference("x.weight", tensors, torch.zeros(16, 24))
    swapped = {"m.lora_up.weight": random(24, 2), "m.lora_down.weight": random(2, 16)}  # as many elements
    kernel = {"m.lora_up.weight": random(16, 2, 1, 1), "m.lora_down.weight": random(2, 12, 1, 2)}
    for tensors, shape in ((swapped, (16, 24)), (kernel, (16, 12, 2, 1))):
        with pytest.raises(BadInput, match="they make"):
            difference("x.weight", tensors, torch.zeros(shape))
        entries = {key: tuple(value.shape) for key, value in tensors.items()}
        with pytest.raises(BadInput, match="they make"):
            check_shapes({"x.weight": tuple(entries)}, entries, {"x.weight": shape})


def test_zero_alpha_counts_as_the_rank() -> None:
    tensors = {"m.lora_up.weight": random(4, 2), "m.lora_down.weight": random(2, 4)}
    plain = difference("x.weight", tensors, torch.zeros(4, 4))
    assert torch.equal(plain, difference("x.weight", tensors | {"m.alpha": torch.tensor(0.0)}, torch.zeros(4, 4)))
    assert math.isclose(float(plain[0, 0]), float((random(4, 2) @ random(2, 4))[0, 0]), rel_tol=1e-5)


QUERY = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
OTHER = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of the embedded world, and a peft folder for their UNet."""
    folder = tmp_path_factory.mktemp("models")
    weights = load_file(BUILTIN / "beta7.safetensors")
    save_file(weights, folder / "x.safetensors")
    moved = {key: value * 1.5 if value.is_floating_point() and value.ndim else value for key, value in weights.items()}
    save_file(moved, folder / "y.safetensors")
    out, into = weights[QUERY].shape
    (folder / "adapter").mkdir()
    tensors = {
        f"base_model.model.{ATTENTION_DIFFUSERS}.lora_A.weight": random(2, into) * 0.1,
        f"base_model.model.{ATTENTION_DIFFUSERS}.lora_B.weight": random(out, 2, seed=1) * 0.1,
    }
    save_file(tensors, folder / "adapter" / "adapter_model.safetensors")
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 1}))
    return folder


@pytest.mark.parametrize("formula", ["slerp(x + lora(l, 0.7), y, t=0.3)", "x + dare(lora(l), density=1)"])
def test_a_lora_inside_a_method(files: Path, tmp_path: Path, formula: str) -> None:
    """Where it changes a tensor and where it does not, in files and in memory; it ended in a KeyError."""
    paths = {"x": files / "x.safetensors", "y": files / "y.safetensors", "l": files / "adapter"}
    parsed = Formula.parse(formula, paths)
    merge(open_job(parsed, paths, dtype="fp32"), tmp_path / "out.safetensors", threads=1)
    found = load_file(tmp_path / "out.safetensors")
    x, y = (load_file(paths[alias]) for alias in "xy")
    up, down = (read_lora(files / "adapter")[f"base_model.model.{ATTENTION_DIFFUSERS}.lora_{k}.weight"] for k in "BA")
    delta = (up.double() @ down.double() / 2).float()
    slerp = Method.read("slerp").function
    if "slerp" in formula:
        expected = {
            QUERY: slerp(x[QUERY].float() + 0.7 * delta, y[QUERY].float(), t=0.3, context=Context("")),
            OTHER: slerp(x[OTHER].float(), y[OTHER].float(), t=0.3, context=Context("")),
        }
    else:
        expected = {QUERY: x[QUERY].float() + delta, OTHER: x[OTHER].float()}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-7)
    live = {**{alias: load_file(paths[alias]) for alias in parsed.models}, "l": read_lora(paths["l"])}
    inside = ResidentMerge(parsed, live, dtype="fp32").at({})
    assert all(torch.equal(inside[name], found[name]) for name in expected)


def test_the_strength_beside_a_lora_is_part_of_what_it_is(files: Path, tmp_path: Path) -> None:
    """peft keeps alpha in adapter_config.json: with another one the same tensors are another input."""
    paths = {"x": tmp_path / "x.safetensors", "l": tmp_path / "adapter"}
    shutil.copy(files / "x.safetensors", paths["x"])
    shutil.copytree(files / "adapter", paths["l"])
    parsed, out = Formula.parse("x + lora(l)", paths), tmp_path / "made" / "out.safetensors"
    out.parent.mkdir()

    def made() -> tuple[str, str]:
        recipe = merge(open_job(parsed, paths), out, threads=1).recipe
        return recipe.inputs["l"], recipe.files["l"]

    first = made()
    assert first[0] == lora_weights(paths["l"], Digests())
    assert verify(out, tmp_path, cache=tmp_path / "cache.json").same
    (paths["l"] / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2}))
    with pytest.raises(MissingObject, match="l: sha256"):
        verify(out, tmp_path, cache=tmp_path / "cache.json")
    second = made()
    assert first[0] != second[0]
    assert first[1] != second[1]


def test_modules_that_do_not_fit_are_left_out_where_asked(files: Path, tmp_path: Path) -> None:
    tensors = load_file(files / "adapter" / "adapter_model.safetensors")
    save_file({**tensors, "lora_unet_nowhere.lora_up.weight": random(2, 2)}, tmp_path / "odd.safetensors")
    paths = {"x": files / "x.safetensors", "l": tmp_path / "odd.safetensors"}
    formula = Formula.parse("x + lora(l)", paths)
    with pytest.raises(BadInput, match=r"nowhere.*\n.*policies\.lora: fitting"):
        open_job(formula, paths)
    job = open_job(formula, paths, policies={"lora": "fitting"})
    assert any("of a LoRA, left out: lora_unet_nowhere" in line for line in job.plan.audit)
    assert set(job.lora_targets["l"]) == {QUERY}
    wide = {key: torch.cat([value, value], dim=-1) for key, value in tensors.items() if "lora_A" in key}
    save_file({**tensors, **wide}, tmp_path / "odd.safetensors")
    with pytest.raises(BadInput, match="does not fit"):  # before anything is read
        open_job(formula, paths)
