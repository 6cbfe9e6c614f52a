"""SDXL: what the family is, and its four networks, of any widths: loaded from a file, kept live, written back.

torch, diffusers and transformers are imported where networks are made, so that reading headers costs little.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from ambergrade.errors import BadInput, MissingObject
from ambergrade.family import networks, original
from ambergrade.family.files import weights_digest, write_tensors
from ambergrade.family.layouts import Component
from ambergrade.family.load import Family

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from torch import Tensor, nn
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

__all__ = [
    "FAMILY",
    "Networks",
    "from_config",
    "load",
    "read_checkpoint",
    "tokenize",
    "weights_digest",
    "write_checkpoint",
]

POSITION_IDS = "conditioner.embedders.0.transformer.text_model.embeddings.position_ids"
LOGIT_SCALE = "conditioner.embedders.1.model.logit_scale"
FAMILY = Family(
    name="sdxl",
    architecture="stable-diffusion-xl-v1-base",
    components={
        "unet": Component(
            original.UNET,
            "model.diffusion_model.",
            {
                "block_out_channels": [320, 640, 1280],
                "layers_per_block": 2,
                "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
                "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                "transformer_layers_per_block": [1, 2, 10],
                "attention_head_dim": [5, 10, 20],
                "cross_attention_dim": 768 + 1280,
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 1280 + 6 * 256,
            },
            "unet",
        ),
        "vae": Component(original.VAE, "first_stage_model.", original.VAE_CONFIG, "vae"),
        "text_encoder": Component(
            original.CLIP, "conditioner.embedders.0.transformer.text_model.", original.CLIP_L_CONFIG, "te1"
        ),
        "text_encoder_2": Component(
            original.OPEN_CLIP,
            "conditioner.embedders.1.model.",
            {
                "hidden_size": 1280,
                "intermediate_size": 5120,
                "num_hidden_layers": 32,
                "num_attention_heads": 20,
                "projection_dim": 1280,
                "vocab_size": 49408,
                "max_position_embeddings": 77,
            },
            "te2",
        ),
    },
    blocks=9,
    live="sdxl",
    # v_pred, ztsnr and edm_vpred mark what a model predicts; denoiser.sigmas is generative-models' noise schedule.
    passive=frozenset(
        {POSITION_IDS, LOGIT_SCALE, "v_pred", "ztsnr", "edm_vpred.sigma_max", "edm_vpred.sigma_min", "denoiser.sigmas"}
        | {"alphas_cumprod"}
    ),
)


read_checkpoint, write_checkpoint = FAMILY.read_checkpoint, write_tensors


@dataclass
class Networks(networks.Networks):
    """The live modules of one model."""

    family: ClassVar = FAMILY
    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    scheduler_config: dict[str, Any]
    passive: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def build(cls, config: Path, before: Callable[[str], object] = lambda name: None) -> Self:
        if not (config / "model_index.json").is_file():
            raise MissingObject(
                f"{config} is no config folder of a diffusers SDXL pipeline: it has no model_index.json."
            )
        import torch
        from diffusers import AutoencoderKL, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        made: dict[str, Any] = {}
        with torch.random.fork_rng(devices=[]):
            for name, kind in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL)):
                before(name)
                made[name] = kind.from_config(kind.load_config(config / name)).eval()
            for name, text_kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", CLIPTextModelWithProjection)):
                before(name)
                made[name] = text_kind(CLIPTextConfig.from_pretrained(config / name)).eval()
        for name in ("tokenizer", "tokenizer_2"):
            made[name] = CLIPTokenizer.from_pretrained(config / name)
            _check_tokenizer(config / name, made[name], made[name.replace("tokenizer", "text_encoder")].config)
        scheduler = json.loads((config / "scheduler" / "scheduler_config.json").read_text())
        return cls(**made, scheduler_config=scheduler)

    @classmethod
    def from_config(cls, config: Path, seed: int) -> Self:
        import torch

        made = super().from_config(config, seed)
        length = made.text_encoder.config.max_position_embeddings
        made.passive = {
            POSITION_IDS: torch.arange(length)[None],
            LOGIT_SCALE: torch.tensor(math.log(1 / 0.07)),  # CLIP's own start (Radford et al. 2021, section 2.5)
        }
        return made

    @property
    def tokenizers(self) -> tuple[CLIPTokenizer, ...]:
        return self.tokenizer, self.tokenizer_2

    @property
    def unread(self) -> tuple[nn.Module, ...]:
        """SDXL reads the first encoder's penultimate states, and of the second one the pooled ones as well."""
        encoder: Any = self.text_encoder
        return encoder.encoder.layers[-1], encoder.final_layer_norm

    def encode(self, ids: Sequence[Tensor], layer: int = -2) -> tuple[Tensor, Tensor]:
        """The states of both encoders side by side, and the second one's pooled; SDXL was trained with layer -2."""
        import torch

        first = self.text_encoder(ids[0], output_hidden_states=True)
        second = self.text_encoder_2(ids[1], output_hidden_states=True)
        return torch.cat([first.hidden_states[layer], second.hidden_states[layer]], dim=-1), second.text_embeds

    def added(self, pooled: Tensor, time_ids: Tensor) -> dict[str, Tensor]:
        return {"text_embeds": pooled, "time_ids": time_ids}

    def pipeline(self, scheduler: Any) -> StableDiffusionXLPipeline:
        """StableDiffusionXLPipeline, whose absent negative prompt is the encoded empty text.

        As in training's caption dropout; the stock one takes zeros.
        """
        from diffusers import StableDiffusionXLPipeline

        return StableDiffusionXLPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            text_encoder_2=self.text_encoder_2,
            tokenizer=self.tokenizer,
            tokenizer_2=self.tokenizer_2,
            unet=self.unet,
            scheduler=scheduler,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        )

    def embeds(self, conditions: tuple[Tensor, Tensor], negatives: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        names = ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
        return dict(zip(names, (*conditions, *negatives), strict=True))


load, from_config = Networks.load, Networks.from_config


def tokenize(live: Networks, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids of both tokenizers: see `Networks.tokenize`."""
    ids_1, ids_2 = live.tokenize(texts)
    return ids_1, ids_2


def _check_tokenizer(folder: Path, tokenizer: CLIPTokenizer, config: CLIPTextConfig) -> None:
    """Refuse mismatches that would train or sample without a word of warning."""
    complaints = []
    if tokenizer.model_max_length > config.max_position_embeddings:
        complaints.append(
            f"model_max_length {tokenizer.model_max_length} exceeds the {config.max_position_embeddings} positions"
        )
    if len(tokenizer) > config.vocab_size:
        complaints.append(f"{len(tokenizer)} tokens for {config.vocab_size} embedding rows")
    if config.eos_token_id not in (2, tokenizer.eos_token_id):  # 2: CLIP's historic value, means arg max
        complaints.append(
            f"the encoder pools at token {config.eos_token_id}, the text ends in {tokenizer.eos_token_id}"
        )
    if tokenizer("a").input_ids == tokenizer("b").input_ids:
        complaints.append("'a' and 'b' give the same token ids: the vocabulary was not read")
    if complaints:
        raise BadInput(f"The tokenizer {folder} does not fit its text encoder: " + "; ".join(complaints) + ".")
