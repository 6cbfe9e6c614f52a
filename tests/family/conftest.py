"""A config folder of SDXL's exact block structure, so narrow that a test may build it."""

import json
from pathlib import Path

import pytest
from tokenizers.pre_tokenizers import ByteLevel


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_config(tmp_path_factory.mktemp("sdxl_narrow"))


def write_tiny_config(folder: Path) -> Path:
    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "ha", "hai", "hair</w>"]
    merges = ["h a", "ha i", "hai r</w>"]
    vocab = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    start, end = vocab["<|startoftext|>"], vocab["<|endoftext|>"]
    unet = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": 16,
        "block_out_channels": [8, 16, 24],
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [1, 2, 2],
        "cross_attention_dim": 16 + 24,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 12,
    }
    vae = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [4, 8, 12, 12],
        "norm_num_groups": 4,
        "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "latent_channels": 4,
        "sample_size": 128,
        "scaling_factor": 0.13025,
        "force_upcast": False,
    }
    text = {
        "model_type": "clip_text_model",
        "vocab_size": len(vocab),
        "max_position_embeddings": 77,
        "num_attention_heads": 2,
        "bos_token_id": start,
        "eos_token_id": end,
        "pad_token_id": end,
    }
    text_1 = {**text, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "hidden_act": "quick_gelu"}
    text_2 = {
        **text,
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "hidden_act": "gelu",
        "projection_dim": 12,
    }
    scheduler = {
        "_class_name": "EulerDiscreteScheduler",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    files = {
        "model_index.json": index,
        "unet/config.json": unet,
        "vae/config.json": vae,
        "text_encoder/config.json": {**text_1, "architectures": ["CLIPTextModel"]},
        "text_encoder_2/config.json": {**text_2, "architectures": ["CLIPTextModelWithProjection"]},
        "scheduler/scheduler_config.json": scheduler,
    }
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        files[f"{name}/vocab.json"] = vocab
        files[f"{name}/tokenizer_config.json"] = {
            "tokenizer_class": "CLIPTokenizer",
            "model_max_length": 77,
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": pad,
        }
    for name, value in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    for name in ("tokenizer", "tokenizer_2"):
        (folder / name / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return folder
