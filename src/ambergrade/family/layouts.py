"""SDXL's two layouts: the keys of diffusers' modules and those of the original single file (A1111, SGM).

Only the block structure matters, and it is read from the keys themselves: any widths, any number of text
layers. Sources of the original names: the modules of Stability-AI/generative-models (UNet, VAE),
transformers' CLIPTextModel before version 5 (text encoder 1) and open_clip's TextTransformer (2).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ambergrade.errors import BadInput

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "conditioner.embedders.0.transformer.text_model.",
    "text_encoder_2": "conditioner.embedders.1.model.",
}
PASSIVE = (
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids",
    "conditioner.embedders.1.model.logit_scale",
)
"""Keys of SDXL's own file that no text encoder reads; they are kept so that files stay mergeable key by key."""


@dataclass(frozen=True)
class Source:
    """Where a single-file tensor comes from."""

    keys: tuple[str, ...]
    """diffusers keys: one, or query, key and value for `stacked`."""
    form: Literal["as is", "1x1 conv", "transposed", "stacked"] = "as is"


def layout(component: str, keys: Iterable[str]) -> dict[str, Source]:
    """Single-file key to its source, for the diffusers keys of one of `PREFIXES`' components."""
    keys = list(keys)
    if component == "unet":
        table = {name: Source((key,)) for key, name in _unet(keys).items()}
    elif component == "vae":
        table = _vae(keys)
    elif component == "text_encoder":
        # transformers 5 dropped the module `text_model` here, and only here.
        table = {key.removeprefix("text_model."): Source((key,)) for key in keys}
    elif component == "text_encoder_2":
        table = _open_clip(keys)
    else:
        raise ValueError(f"Unknown component {component!r}; known: {', '.join(PREFIXES)}.")
    return {PREFIXES[component] + name: source for name, source in table.items()}


def to_single_file(component: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One component's tensors under single-file keys; most share memory with `state`."""
    return {name: _join(source, state) for name, source in layout(component, state).items()}


def from_single_file(
    component: str, keys: Iterable[str], tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> dict[str, Tensor]:
    """One component's tensors under the diffusers `keys`.

    `shapes` maps diffusers keys to the shapes the module has. Raises BadInput naming what is missing, unexpected
    or misshapen.
    """
    table = layout(component, keys)
    mine = {name for name in tensors if name.startswith(PREFIXES[component])} - set(PASSIVE)
    complaints = [f"missing: {name}" for name in sorted(table.keys() - mine)]
    complaints += [f"unexpected: {name}" for name in sorted(mine - table.keys())]
    state: dict[str, Tensor] = {}
    for name in sorted(table.keys() & mine):
        for key, tensor in _split(table[name], tensors[name]).items():
            if tensor.shape != shapes[key]:
                complaints.append(
                    f"shape: {name} gives {tuple(tensor.shape)}, the {component} has {tuple(shapes[key])}"
                )
            state[key] = tensor
    if complaints:
        more = f"\n… and {len(complaints) - 6} more" if len(complaints) > 6 else ""
        raise BadInput(
            f"These weights do not fit the {component}:\n" + "\n".join(complaints[:6]) + more + "\n"
            "Check that the checkpoint and the family's config folder belong together."
        )
    return state


def _join(source: Source, state: Mapping[str, Tensor]) -> Tensor:
    parts = [state[key] for key in source.keys]
    if source.form == "stacked":
        return torch.cat(parts)
    if source.form == "1x1 conv":
        return parts[0][:, :, None, None]
    return parts[0].T if source.form == "transposed" else parts[0]


def _split(source: Source, tensor: Tensor) -> dict[str, Tensor]:
    if source.form == "stacked":
        return dict(zip(source.keys, tensor.chunk(3), strict=True))
    if source.form == "1x1 conv":
        tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
    elif source.form == "transposed":
        tensor = tensor.T
    return {source.keys[0]: tensor}


def _unet(keys: list[str]) -> dict[str, str]:
    """diffusers key to single-file key. Input block 0 is conv_in; each level then has `depth` blocks and, but for
    the last, one that samples down; the output blocks mirror them with one more, sampling up in their last."""
    depth = len({key.split(".")[3] for key in keys if key.startswith("down_blocks.0.resnets.")})
    modules = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    resnet = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    attended = {".".join(key.split(".")[:2]) for key in keys if ".attentions." in key}

    def place(module: str) -> str:
        """E.g. `up_blocks.0.attentions.1` to `output_blocks.1.1`."""
        if module in modules:
            return modules[module]
        side, level, kind, index = module.split(".")
        block = int(level) * (depth + 1) + int(index)
        if side == "down_blocks":
            return {
                "resnets": f"input_blocks.{block + 1}.0",
                "attentions": f"input_blocks.{block + 1}.1",
                "downsamplers": f"input_blocks.{(int(level) + 1) * (depth + 1)}.0",
            }[kind]
        return {
            "resnets": f"output_blocks.{block}.0",
            "attentions": f"output_blocks.{block}.1",
            "upsamplers": f"output_blocks.{int(level) * (depth + 1) + depth}.{1 + (f'{side}.{level}' in attended)}",
        }[kind]

    renamed = {}
    for key in keys:
        parts = key.split(".")
        length = {"down_blocks": 4, "up_blocks": 4, "mid_block": 3, "time_embedding": 2, "add_embedding": 2}
        cut = length.get(parts[0], 1)
        module, rest = ".".join(parts[:cut]), parts[cut:]
        if "resnets" in parts:
            rest[0] = resnet[rest[0]]
        if "downsamplers" in parts:
            rest[0] = "op"
        renamed[key] = ".".join([place(module), *rest])
    return renamed


def _vae(keys: list[str]) -> dict[str, Source]:
    """The decoder's levels count from the picture in the single file, from the latent in diffusers."""
    top = max(int(key.split(".")[2]) for key in keys if key.startswith("decoder.up_blocks."))
    attention = {
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out": "proj_out",
        "query": "q",  # the names that diffusers wrote before 0.18
        "key": "k",
        "value": "v",
        "proj_attn": "proj_out",
    }
    table = {}
    for key in keys:
        parts = key.split(".")
        form: Literal["as is", "1x1 conv"] = "as is"
        match parts:
            case [side, "down_blocks", level, "resnets", index, *rest]:
                name = [side, "down", level, "block", index, *rest]
            case [side, "up_blocks", level, "resnets", index, *rest]:
                name = [side, "up", str(top - int(level)), "block", index, *rest]
            case [side, "down_blocks", level, "downsamplers", "0", *rest]:
                name = [side, "down", level, "downsample", *rest]
            case [side, "up_blocks", level, "upsamplers", "0", *rest]:
                name = [side, "up", str(top - int(level)), "upsample", *rest]
            case [side, "mid_block", "resnets", index, *rest]:
                name = [side, "mid", f"block_{int(index) + 1}", *rest]
            case [side, "mid_block", "attentions", "0", module, *_, leaf]:
                name = [side, "mid", "attn_1", attention[module], leaf]
                form = "1x1 conv" if leaf == "weight" and module != "group_norm" else "as is"
            case [side, "conv_norm_out", leaf]:
                name = [side, "norm_out", leaf]
            case _:
                name = parts
        table[".".join(name).replace("conv_shortcut", "nin_shortcut")] = Source((key,), form)
    return table


def _open_clip(keys: list[str]) -> dict[str, Source]:
    modules = {
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "text_model.final_layer_norm.weight": "ln_final.weight",
        "text_model.final_layer_norm.bias": "ln_final.bias",
    }
    parts = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "fc1": "c_fc", "fc2": "c_proj", "self_attn": "attn"}
    table = {}
    for key in keys:
        if key == "text_projection.weight":
            table["text_projection"] = Source((key,), "transposed")
        elif key in modules:
            table[modules[key]] = Source((key,))
        elif "q_proj" in key:
            layer, leaf = key.split(".")[3], key.split(".")[-1]
            stacked = tuple(key.replace("q_proj", f"{part}_proj") for part in "qkv")
            table[f"transformer.resblocks.{layer}.attn.in_proj_{leaf}"] = Source(stacked, "stacked")
        elif "k_proj" not in key and "v_proj" not in key:
            words = key.removeprefix("text_model.encoder.layers.").split(".")
            table[".".join(["transformer.resblocks", *(parts.get(word, word) for word in words)])] = Source((key,))
    return table
