"""Every key and shape of a network, by rule from its config: no module is built and no library asked.

Keys are those of diffusers' and transformers' files; configs hold the numbers of their `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def unet_shapes(config: Mapping[str, Any]) -> Shapes:
    """UNet2DConditionModel with cross-attention blocks; `text_time` conditioning where the config has it."""
    widths = list(config["block_out_channels"])
    levels, depth, context = len(widths), config.get("layers_per_block", 2), config["cross_attention_dim"]
    layers = config.get("transformer_layers_per_block", 1)
    layers = [layers] * levels if isinstance(layers, int) else list(layers)
    matrices, time = config.get("use_linear_projection", False), 4 * widths[0]
    found = conv("conv_in", config.get("in_channels", 4), widths[0])
    found |= _embedding("time_embedding", widths[0], time)
    if config.get("addition_embed_type") == "text_time":
        found |= _embedding("add_embedding", config["projection_class_embeddings_input_dim"], time)

    def attention(name: str, width: int, count: int) -> Shapes:
        return _transformer(name, width, count, context, matrices)

    width = widths[0]
    skips = [width]
    for level, kind in enumerate(config["down_block_types"]):
        block = f"down_blocks.{level}"
        for index in range(depth):
            found |= resnet(f"{block}.resnets.{index}", width, widths[level], time)
            width = widths[level]
            if kind.startswith("CrossAttn"):
                found |= attention(f"{block}.attentions.{index}", width, layers[level])
            skips.append(width)
        if level < levels - 1:
            found |= conv(f"{block}.downsamplers.0.conv", width, width)
            skips.append(width)
    for index in range(2):
        found |= resnet(f"mid_block.resnets.{index}", width, width, time)
    found |= attention("mid_block.attentions.0", width, layers[-1])
    for level, kind in enumerate(config["up_block_types"]):
        block, out = f"up_blocks.{level}", widths[-1 - level]
        for index in range(depth + 1):
            found |= resnet(f"{block}.resnets.{index}", width + skips.pop(), out, time)
            width = out
            if kind.startswith("CrossAttn"):
                found |= attention(f"{block}.attentions.{index}", width, layers[-1 - level])
        if level < levels - 1:
            found |= conv(f"{block}.upsamplers.0.conv", width, width)
    return found | norm("conv_norm_out", width) | conv("conv_out", width, config.get("out_channels", 4))


def vae_shapes(config: Mapping[str, Any]) -> Shapes:
    """AutoencoderKL."""
    widths, depth, latent = list(config["block_out_channels"]), config["layers_per_block"], config["latent_channels"]
    found: Shapes = {}
    for side, way, order, blocks in (("encoder", "down", widths, depth), ("decoder", "up", widths[::-1], depth + 1)):
        enters, leaves = (3, 2 * latent) if side == "encoder" else (latent, 3)
        width = order[0]
        found |= conv(f"{side}.conv_in", enters, width)
        for level, out in enumerate(order):
            for index in range(blocks):
                found |= resnet(f"{side}.{way}_blocks.{level}.resnets.{index}", width, out, None)
                width = out
            if level < len(order) - 1:
                found |= conv(f"{side}.{way}_blocks.{level}.{way}samplers.0.conv", width, width)
        middle = widths[-1]
        for index in range(2):
            found |= resnet(f"{side}.mid_block.resnets.{index}", middle, middle, None)
        found |= norm(f"{side}.mid_block.attentions.0.group_norm", middle)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            found |= linear(f"{side}.mid_block.attentions.0.{part}", middle, middle)
        found |= norm(f"{side}.conv_norm_out", width) | conv(f"{side}.conv_out", width, leaves)
    return found | conv("quant_conv", 2 * latent, 2 * latent, 1) | conv("post_quant_conv", latent, latent, 1)


def clip_shapes(config: Mapping[str, Any]) -> Shapes:
    """CLIPTextModel."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    found: Shapes = {
        "text_model.embeddings.token_embedding.weight": (config["vocab_size"], width),
        "text_model.embeddings.position_embedding.weight": (config["max_position_embeddings"], width),
    }
    for index in range(config["num_hidden_layers"]):
        layer = f"text_model.encoder.layers.{index}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= linear(f"{layer}.self_attn.{part}", width, width)
        found |= norm(f"{layer}.layer_norm1", width) | norm(f"{layer}.layer_norm2", width)
        found |= linear(f"{layer}.mlp.fc1", width, inner) | linear(f"{layer}.mlp.fc2", inner, width)
    return found | norm("text_model.final_layer_norm", width)


def clip_with_projection_shapes(config: Mapping[str, Any]) -> Shapes:
    """CLIPTextModelWithProjection."""
    return clip_shapes(config) | {"text_projection.weight": (config["projection_dim"], config["hidden_size"])}


def linear(name: str, enters: int, leaves: int, bias: bool = True) -> Shapes:
    """A matrix and its bias."""
    return {f"{name}.weight": (leaves, enters)} | ({f"{name}.bias": (leaves,)} if bias else {})


def norm(name: str, width: int) -> Shapes:
    """A scale and a shift."""
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def conv(name: str, enters: int, leaves: int, side: int = 3) -> Shapes:
    """A square kernel and its bias."""
    return {f"{name}.weight": (leaves, enters, side, side), f"{name}.bias": (leaves,)}


def resnet(name: str, enters: int, leaves: int, time: int | None) -> Shapes:
    """ResnetBlock2D; `time` is the width of the time embedding."""
    found = norm(f"{name}.norm1", enters) | conv(f"{name}.conv1", enters, leaves)
    if time is not None:
        found |= linear(f"{name}.time_emb_proj", time, leaves)
    found |= norm(f"{name}.norm2", leaves) | conv(f"{name}.conv2", leaves, leaves)
    return found | (conv(f"{name}.conv_shortcut", enters, leaves, 1) if enters != leaves else {})


def _embedding(name: str, enters: int, width: int) -> Shapes:
    return linear(f"{name}.linear_1", enters, width) | linear(f"{name}.linear_2", width, width)


def _transformer(name: str, width: int, count: int, context: int, matrices: bool) -> Shapes:
    """Transformer2DModel with `count` blocks."""
    found = norm(f"{name}.norm", width)
    for end in ("proj_in", "proj_out"):
        found |= linear(f"{name}.{end}", width, width) if matrices else conv(f"{name}.{end}", width, width, 1)
    for index in range(count):
        block = f"{name}.transformer_blocks.{index}"
        for attention, enters in (("attn1", width), ("attn2", context)):
            found |= linear(f"{block}.{attention}.to_q", width, width, bias=False)
            found |= linear(f"{block}.{attention}.to_k", enters, width, bias=False)
            found |= linear(f"{block}.{attention}.to_v", enters, width, bias=False)
            found |= linear(f"{block}.{attention}.to_out.0", width, width)
        for layer in ("norm1", "norm2", "norm3"):
            found |= norm(f"{block}.{layer}", width)
        found |= linear(f"{block}.ff.net.0.proj", width, 8 * width) | linear(f"{block}.ff.net.2", 4 * width, width)
    return found
