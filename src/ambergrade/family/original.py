"""The names of the original single file against diffusers', both ways, for the networks of SD 1.5 and SDXL.

Only the block structure matters, and it is read from the names themselves: any widths, any number of text layers.
Each network has one table of modules, read in either direction. Sources of the original names: the modules of CompVis'
latent-diffusion and Stability-AI/generative-models (UNet, VAE), transformers' CLIPTextModel before version 5 and
open_clip's TextTransformer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ambergrade.family.layouts import Kind, Source
from ambergrade.family.tables import clip_shapes, clip_with_projection_shapes, unet_shapes, vae_shapes

Names = Mapping[str, str]
"""diffusers' modules (or whole keys) to the original's."""


def _rename(key: str, names: Names) -> str | None:
    """`key` with the longest beginning that `names` holds replaced; None where it holds none."""
    parts = key.split(".")
    for cut in range(len(parts), 0, -1):
        if (module := names.get(".".join(parts[:cut]))) is not None:
            return ".".join([module, *parts[cut:]])
    return None


def _renamed(keys: Iterable[str], names: Names) -> dict[str, str]:
    """Old key to new, for those that `names` knows."""
    found = {key: _rename(key, names) for key in keys}
    return {key: name for key, name in found.items() if name is not None}


def _inverse(names: Names) -> dict[str, str]:
    """Where one module has several names, the first wins."""
    return {new: old for old, new in reversed(list(names.items()))}


def _count(keys: Iterable[str], pattern: str) -> int:
    """One more than the largest number that stands where the pattern's group is; 0 where nothing matches."""
    found = [int(match.group(1)) for key in keys if (match := re.match(pattern, key))]
    return max(found, default=-1) + 1


def _numbered(keys: Iterable[str], pattern: str) -> set[int]:
    return {int(match.group(1)) for key in keys if (match := re.match(pattern, key))}


# UNet ----------------------------------------------------------------------------------------------------------------

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _unet(depth: int, levels: int, attended: set[int]) -> dict[str, str]:
    """Input block 0 is conv_in; each level then has `depth` blocks and, but for the last, one that samples down; the
    output blocks mirror them with one more, sampling up in their last, behind its attention where the level has one."""
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.attentions.0": "middle_block.1",
    }
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    for level in range(levels):
        first = level * (depth + 1)
        for index in range(depth):
            resnets[f"down_blocks.{level}.resnets.{index}"] = f"input_blocks.{first + index + 1}.0"
            names[f"down_blocks.{level}.attentions.{index}"] = f"input_blocks.{first + index + 1}.1"
        names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + depth + 1}.0.op"
        for index in range(depth + 1):
            resnets[f"up_blocks.{level}.resnets.{index}"] = f"output_blocks.{first + index}.0"
            names[f"up_blocks.{level}.attentions.{index}"] = f"output_blocks.{first + index}.1"
        slot = 2 if level in attended else 1
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{first + depth}.{slot}.conv"
    for module, place in resnets.items():
        names |= {f"{module}.{ours}": f"{place}.{theirs}" for ours, theirs in _RESNET.items()}
    return names


def unet_to_single(keys: Iterable[str]) -> dict[str, Source]:
    keys = list(keys)
    names = _unet(
        depth=_count(keys, r"down_blocks\.0\.resnets\.(\d+)"),
        levels=_count(keys, r"(?:down|up)_blocks\.(\d+)\."),
        attended=_numbered(keys, r"up_blocks\.(\d+)\.attentions\."),
    )
    return {name: Source((key,)) for key, name in _renamed(keys, names).items()}


def unet_to_diffusers(keys: Iterable[str]) -> list[str]:
    """The block that first samples down tells how many stand in a level."""
    keys = list(keys)
    down = _numbered(keys, r"input_blocks\.(\d+)\.0\.op\.")
    each = min(down) if down else _count(keys, r"input_blocks\.(\d+)\.")
    attended = {block // each for block in _numbered(keys, r"output_blocks\.(\d+)\.1\.transformer_blocks\.")}
    levels = -(-_count(keys, r"output_blocks\.(\d+)\.") // each) if each else 0
    return list(_renamed(keys, _inverse(_unet(each - 1, max(levels, len(down) + 1), attended))).values())


# VAE -----------------------------------------------------------------------------------------------------------------

_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",  # the names that diffusers wrote before 0.18
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}


def _vae(depth: int, levels: int) -> dict[str, str]:
    """The decoder's levels count from the picture in the single file, from the latent in diffusers."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side, way in (("encoder", "down"), ("decoder", "up")):
        resnets = {f"{side}.mid_block.resnets.{index}": f"{side}.mid.block_{index + 1}" for index in range(2)}
        names |= {f"{side}.conv_in": f"{side}.conv_in", f"{side}.conv_out": f"{side}.conv_out"}
        names[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        for ours, theirs in _ATTENTION.items():
            names[f"{side}.mid_block.attentions.0.{ours}"] = f"{side}.mid.attn_1.{theirs}"
        for level in range(levels):
            place = f"{side}.{way}.{level if way == 'down' else levels - 1 - level}"
            module = f"{side}.{way}_blocks.{level}"
            resnets |= {f"{module}.resnets.{index}": f"{place}.block.{index}" for index in range(depth + 1)}
            names[f"{module}.{way}samplers.0"] = f"{place}.{way}sample"
        for module, place in resnets.items():
            names |= {f"{module}.{layer}": f"{place}.{layer}" for layer in ("norm1", "conv1", "norm2", "conv2")}
            names[f"{module}.conv_shortcut"] = f"{place}.nin_shortcut"
    return names


def vae_to_single(keys: Iterable[str]) -> dict[str, Source]:
    """The attention's matrices are 1x1 convolutions in the single file."""
    keys = list(keys)
    names = _vae(_count(keys, r"encoder\.down_blocks\.0\.resnets\.(\d+)"), _count(keys, r"\w+\.\w+_blocks\.(\d+)\."))
    conv = re.compile(r"\w+\.mid\.attn_1\.(q|k|v|proj_out)\.weight")
    return {
        name: Source((key,), "1x1 conv" if conv.fullmatch(name) else "as is")
        for key, name in _renamed(keys, names).items()
    }


def vae_to_diffusers(keys: Iterable[str]) -> list[str]:
    keys = list(keys)
    depth = _count(keys, r"encoder\.down\.0\.block\.(\d+)")
    return list(_renamed(keys, _inverse(_vae(depth, _count(keys, r"\w+\.(?:down|up)\.(\d+)\.")))).values())


# Text encoders -------------------------------------------------------------------------------------------------------


def clip_to_single(keys: Iterable[str]) -> dict[str, Source]:
    """transformers 5 dropped the module `text_model` of this class; files have it, live modules do not."""
    return {key.removeprefix("text_model."): Source((key,)) for key in keys}


def clip_to_diffusers(keys: Iterable[str]) -> list[str]:
    return [f"text_model.{key}" for key in keys]


def _open_clip(layers: int) -> dict[str, str]:
    """All but the stacked `in_proj`."""
    names = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm": "ln_final",
        "text_projection.weight": "text_projection",
    }
    parts = {
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
    }
    for layer in range(layers):
        for ours, theirs in parts.items():
            names[f"text_model.encoder.layers.{layer}.{ours}"] = f"transformer.resblocks.{layer}.{theirs}"
    return names


_QUERY = re.compile(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.q_proj\.(weight|bias)")
_STACKED = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def open_clip_to_single(keys: Iterable[str]) -> dict[str, Source]:
    """open_clip stacks query, key and value, and multiplies from the other side with `text_projection`."""
    keys = list(keys)
    names = _open_clip(_count(keys, r"text_model\.encoder\.layers\.(\d+)\."))
    found = {}
    for key, name in _renamed(keys, names).items():
        found[name] = Source((key,), "transposed" if name == "text_projection" else "as is")
    for key in keys:
        if match := _QUERY.fullmatch(key):
            parts = tuple(key.replace("q_proj", f"{part}_proj") for part in "qkv")
            if set(parts) <= set(keys):
                found[f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"] = Source(parts, "stacked")
    return found


def open_clip_to_diffusers(keys: Iterable[str]) -> list[str]:
    keys = list(keys)
    found = list(_renamed(keys, _inverse(_open_clip(_count(keys, r"transformer\.resblocks\.(\d+)\.")))).values())
    for key in keys:
        if match := _STACKED.fullmatch(key):
            found += [f"text_model.encoder.layers.{match[1]}.self_attn.{part}_proj.{match[2]}" for part in "qkv"]
    return found


UNET = Kind(unet_to_single, unet_to_diffusers, unet_shapes)
VAE = Kind(vae_to_single, vae_to_diffusers, vae_shapes)
CLIP = Kind(clip_to_single, clip_to_diffusers, clip_shapes)
OPEN_CLIP = Kind(open_clip_to_single, open_clip_to_diffusers, clip_with_projection_shapes)

VAE_CONFIG: Mapping[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""The VAE's shapes are the same in SD 1.x and SDXL."""
CLIP_L_CONFIG: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
}
"""OpenAI's CLIP ViT-L/14, text part."""
