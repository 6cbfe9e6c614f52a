"""Writes the config folder of the `sdxl_tiny` family: SDXL's exact block structure, only narrower."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ambergrade.world import tokenizer
from ambergrade.world.autoencoder import CONFIG as VAE

UNET: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [24, 36, 32],
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [2, 2, 2],
    "cross_attention_dim": 32 + 48,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 16,
    "projection_class_embeddings_input_dim": 6 * 16 + 48,
}
"""2.3 M parameters, 1,680 keys. No two neighbouring levels share a width: else a shortcut key would vanish."""

SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "trailing",
    "steps_offset": 0,
}
"""SDXL's noise schedule. Trailing, not SDXL's leading: twelve leading steps would begin at t = 914, where the pictures
still shine through, with noise that holds none of them."""


def write_config(folder: Path, scaling_factor: float) -> None:
    """A diffusers-layout folder without weights. `scaling_factor` is the trained VAE's."""
    words = tokenizer.build()
    text = {
        "vocab_size": len(words),
        "max_position_embeddings": 77,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    text_1 = {**text, "hidden_size": 32, "intermediate_size": 96, "hidden_act": "quick_gelu"}
    text_2 = {**text, "hidden_size": 48, "intermediate_size": 128, "hidden_act": "gelu", "projection_dim": 48}
    configs = {
        "unet/config.json": UNET,
        "vae/config.json": {"_class_name": "AutoencoderKL", **VAE, "scaling_factor": scaling_factor},
        "text_encoder/config.json": {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", **text_1},
        "text_encoder_2/config.json": {
            "architectures": ["CLIPTextModelWithProjection"],
            "model_type": "clip_text_model",
            **text_2,
        },
        "scheduler/scheduler_config.json": SCHEDULER,
        "model_index.json": {
            "_class_name": "StableDiffusionXLPipeline",
            "force_zeros_for_empty_prompt": False,
            "add_watermarker": None,
            "scheduler": ["diffusers", "EulerDiscreteScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        },
    }
    for name, config in configs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    words.save_pretrained(folder / "tokenizer")
    words.save_pretrained(folder / "tokenizer_2")
