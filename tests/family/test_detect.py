"""Full-size key tables against the real modules, and families told apart by names and shapes."""

from pathlib import Path

import pytest
import torch
import yaml
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from ambergrade.errors import BadInput
from ambergrade.family import sd15, sdxl
from ambergrade.family.detect import detect, families
from ambergrade.family.layouts import looks_transposed

COMPONENTS = [(family, part) for family in families() for part in family.components]
SMALL = {"vae": {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}}


def by_name(family):
    return family.name if hasattr(family, "name") else family


def test_each_family_has_its_yaml():
    folder = Path(__file__).parents[2] / "conf" / "family"
    assert {family.name for family in families()} == {"sdxl", "sd15"}
    assert all((folder / f"{family.name}.yaml").is_file() for family in families())
    keys = {frozenset(yaml.safe_load(file.read_text())) for file in folder.glob("*.yaml")}
    assert len(keys) == 1  # every family answers the same questions


@pytest.mark.parametrize(("family", "part"), COMPONENTS, ids=by_name)
def test_tables_are_those_of_the_real_modules(family, part):
    component = family.components[part]
    with init_empty_weights():
        if part == "unet":
            module = UNet2DConditionModel(**component.config)
        elif part == "vae":
            module = AutoencoderKL(**component.config, **SMALL["vae"])
        else:
            kind = CLIPTextModelWithProjection if "projection_dim" in component.config else CLIPTextModel
            module = kind(CLIPTextConfig(**component.config))
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    found = component.kind.shapes(component.config)
    if part == "text_encoder":  # transformers 5 dropped the name; files have it
        found = {key.removeprefix("text_model."): shape for key, shape in found.items()}
    assert found == expected


def test_the_size_of_the_tables():
    def count(family, part):
        return sum(family.component_of(name) == part for name in family.table())

    # 16 tensors a layer and 4 more; 12 a layer and 5 more. SDXL's file has 2,515: position_ids and logit_scale too.
    assert {part: count(sdxl.FAMILY, part) for part in sdxl.FAMILY.components} == {
        "unet": 1680,
        "vae": 248,
        "text_encoder": 16 * 12 + 4,
        "text_encoder_2": 12 * 32 + 5,
    }
    assert {part: count(sd15.FAMILY, part) for part in sd15.FAMILY.components} == {
        "unet": 686,
        "vae": 248,
        "text_encoder": 196,
    }
    parameters = sum(torch.Size(shape).numel() for shape in sdxl.FAMILY.table().values())
    assert parameters == 2_567_463_684 + 83_653_863 + 123_060_480 + 694_659_840  # as model cards and papers count them


@pytest.mark.parametrize(
    ("name", "shape"),
    [  # read off sd_xl_base_1.0.safetensors
        ("model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight", (640, 2048)),
        ("model.diffusion_model.input_blocks.3.0.op.weight", (320, 320, 3, 3)),
        ("model.diffusion_model.output_blocks.2.2.conv.weight", (1280, 1280, 3, 3)),
        ("model.diffusion_model.output_blocks.8.0.skip_connection.weight", (320, 640, 1, 1)),
        ("model.diffusion_model.label_emb.0.0.weight", (1280, 2816)),
        ("first_stage_model.encoder.mid.attn_1.q.weight", (512, 512, 1, 1)),
        ("conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight", (3840, 1280)),
        ("conditioner.embedders.1.model.text_projection", (1280, 1280)),
    ],
)
def test_names_and_shapes_of_the_published_file(name, shape):
    assert sdxl.FAMILY.table()[name] == shape


def folder_shapes(family, before=""):
    return {
        f"{part}/{key if not before or part != 'text_encoder' else key.removeprefix(before)}": shape
        for part, component in family.components.items()
        for key, shape in component.kind.shapes(component.config).items()
    }


@pytest.mark.parametrize("family", families(), ids=by_name)
@pytest.mark.parametrize("before", ["", "text_model."], ids=["with text_model", "without"])
def test_both_layouts_are_found_and_give_one_table(family, before):
    single = detect(family.table())
    assert (single.family.name, single.kind, single.published_size) == (family.name, "single file", True)
    shapes = folder_shapes(family, before)
    folder = detect(shapes)
    assert (folder.family.name, folder.kind, folder.published_size) == (family.name, "folder", True)
    assert (folder.missing, folder.unexpected, folder.absent, folder.misshapen) == ((), (), (), ())
    assert {name: source.shape(shapes) for name, source in folder.sources.items()} == family.table()


@pytest.mark.parametrize("family", families(), ids=by_name)
def test_every_tensor_has_a_place_in_the_folder(family):
    table = family.table()
    for part, component in family.components.items():
        plan = family.to_diffusers(part, table)
        assert {key: source.shape(table) for key, source in plan.items()} == component.kind.shapes(component.config)


def test_old_names_are_known():
    table = {
        key.replace("transformer.text_model.", "transformer."): shape for key, shape in sd15.FAMILY.table().items()
    }
    layout = detect(table)
    assert layout.missing == layout.unexpected == ()
    name = "cond_stage_model.transformer.text_model.final_layer_norm.bias"
    assert layout.sources[name].keys == ("cond_stage_model.transformer.final_layer_norm.bias",)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    folder = folder_shapes(sdxl.FAMILY)
    for new, then in old.items():
        folder = {
            key.replace(f"attentions.0.{new}.", f"attentions.0.{then}.") if key.startswith("vae/") else key: shape
            for key, shape in folder.items()
        }
    folder["text_encoder/text_model.embeddings.position_ids"] = (1, 77)
    folder["text_encoder_2/text_model.embeddings.position_ids"] = (1, 77)
    layout = detect(folder)
    assert layout.missing == layout.unexpected == ()
    assert sdxl.POSITION_IDS in layout.sources


def test_a_part_alone_is_found_and_what_lacks_is_told():
    unet = {name: shape for name, shape in sdxl.FAMILY.table().items() if name.startswith("model.")}
    assert detect(unet).absent == ("vae", "text_encoder", "text_encoder_2")
    lacking = dict(sdxl.FAMILY.table())
    del lacking["model.diffusion_model.out.2.bias"], lacking["first_stage_model.quant_conv.bias"]
    assert detect(lacking).missing == ("first_stage_model.quant_conv.bias", "model.diffusion_model.out.2.bias")
    # A file whose last text layer was lost is of published width, so it is known how many there should be.
    cut = {name: shape for name, shape in sdxl.FAMILY.table().items() if "text_model.encoder.layers.11." not in name}
    assert len(detect(cut).missing) == 16
    wide = {**sdxl.FAMILY.table(), "model.diffusion_model.input_blocks.0.0.weight": (320, 9, 3, 3)}
    assert detect(wide).misshapen == (
        "model.diffusion_model.input_blocks.0.0.weight: (320, 9, 3, 3), published (320, 4, 3, 3)",
    )


def test_other_families_are_refused_with_what_the_nearest_lacks():
    pruned = {name: shape for name, shape in sdxl.FAMILY.table().items() if "transformer_blocks" not in name}
    with pytest.raises(BadInput, match=r"no known family \(sd15, sdxl\).\nThe nearest, sdxl, has 2513 .*\nmissing: "):
        detect(pruned)
    with pytest.raises(BadInput, match=r"Some of them:\ndouble_blocks\.0"):
        detect({"double_blocks.0.img_attn.qkv.weight": (9216, 3072)})
    vae = {name: shape for name, shape in sdxl.FAMILY.table().items() if name.startswith("first_stage_model.")}
    with pytest.raises(BadInput, match="fit sd15 and sdxl alike"):
        detect(vae)


def test_a_transposed_projection_is_seen_against_a_relative():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(48, 48, generator=generator)
    relative = base + 0.1 * torch.randn(48, 48, generator=generator)
    stranger = torch.randn(48, 48, generator=generator)
    assert looks_transposed(relative.T, base)
    assert not looks_transposed(relative, base)
    assert not looks_transposed(stranger, base)
    assert not looks_transposed(base[:12], base[:12])
    symmetric = base + base.T
    assert not looks_transposed(symmetric, symmetric)


@pytest.mark.parametrize("part", ["unet", "vae"])
@pytest.mark.parametrize("names", ["whole prefix", "comfy", "bare", "diffusers"])
def test_a_network_saved_alone_is_what_it_is(part, names):
    """ComfyUI's and diffusers' UNet files and everybody's VAE files: no prefix, or a part of it."""
    family = sdxl.FAMILY
    component = family.components[part]
    table = {name: shape for name, shape in family.table().items() if name.startswith(component.prefix)}
    comfy = "diffusion_model." if part == "unet" else ""
    beginning = {"whole prefix": component.prefix, "comfy": comfy, "bare": ""}
    if names == "diffusers":
        saved = component.kind.shapes(component.config)
    else:
        saved = {beginning[names] + name.removeprefix(component.prefix): shape for name, shape in table.items()}
    layout = detect({**saved, "v_pred": (0,)}, like=family)
    assert (layout.family, layout.kind, layout.missing, layout.unexpected) == (family, "single file", (), ())
    found = {name: source.shape(saved | {"v_pred": (0,)}) for name, source in layout.sources.items()}
    assert found == {**table, "v_pred": (0,)}
    assert {key for source in layout.sources.values() for key in source.keys} == saved.keys() | {"v_pred"}
    assert len(layout.absent) == 3


def test_names_that_are_the_cause_are_told():
    wrapped = {f"module.{name}": shape for name, shape in sdxl.FAMILY.table().items()}
    with pytest.raises(BadInput, match=r"every key begins with 'module\.'"):
        detect(wrapped)
    encoder = sdxl.FAMILY.components["text_encoder"]
    with pytest.raises(BadInput, match=r"'text_model\.encoder\.layers\.0\.[a-z_0-9.]*' is what transformers calls it"):
        detect(encoder.kind.shapes(encoder.config))
