"""SDXL: what the family is, and its four networks, of any widths: loaded from a file, kept live, written back.

torch, diffusers and transformers are imported where networks are made, so that reading headers costs little.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambergrade.errors import BadInput, MissingObject
from ambergrade.family import original
from ambergrade.family.files import weights_digest
from ambergrade.family.layouts import Component
from ambergrade.family.load import Family
from ambergrade.family.prediction import scheduler_marks, scheduler_settings
from ambergrade.identity import random_seed

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
    from torch import Tensor, nn
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

__all__ = [
    "FAMILY",
    "Networks",
    "assign",
    "encode_text",
    "encode_tokens",
    "from_config",
    "from_noise",
    "load",
    "marks",
    "pipeline",
    "read_checkpoint",
    "tensors",
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


read_checkpoint, write_checkpoint = FAMILY.read_checkpoint, FAMILY.write_checkpoint


@dataclass
class Networks:
    """The live modules of one model."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    text_encoder_2: CLIPTextModelWithProjection
    vae: AutoencoderKL
    tokenizer: CLIPTokenizer
    tokenizer_2: CLIPTokenizer
    scheduler_config: dict[str, Any]
    passive: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of the file that no network holds (`logit_scale`, `position_ids`, …), written back as they were."""

    def modules(self) -> dict[str, nn.Module]:
        """Component name (as in `FAMILY.components`) to module."""
        return {name: getattr(self, name) for name in FAMILY.components}


def load(
    checkpoint: Path,
    config: Path,
    *,
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    device: str | torch.device = "cpu",
    only: Collection[str] = (),
) -> Networks:
    """Networks of a single file or a diffusers folder, fp32 unless `dtype` says otherwise, perhaps by component.

    `config` is the family's diffusers-layout folder. Where `only` names components, the others stay without values.
    Raises BadInput for a pickle, a damaged file, or weights that do not fit the config.
    """
    import torch
    from accelerate import init_empty_weights

    weights = read_checkpoint(checkpoint)
    predicts = FAMILY.prediction_type(checkpoint)
    if predicts not in (None, "epsilon", "v"):
        raise BadInput(
            f"{checkpoint.name} predicts '{predicts}'; training and drawing know epsilon and v.\n"
            "Choose another checkpoint."
        )
    with init_empty_weights():
        networks = _build(config)
    for name, module in networks.modules().items():
        if only and name not in only:
            continue
        chosen = (dtype.get(name) if isinstance(dtype, Mapping) else dtype) or torch.float32
        shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        state = FAMILY.module_tensors(name, weights, shapes)
        # A copy even where dtype and device agree: what is read may be mapped from the file.
        state = {key: value.to(device, chosen, copy=True).contiguous() for key, value in state.items()}
        module.load_state_dict(state, assign=True)
        module.to(device).eval()
    _take_passive(networks, weights)
    return networks


def from_config(config: Path, seed: int) -> Networks:
    """Networks of a config folder with random fp32 weights, each component keyed by (seed, its name)."""
    import torch

    networks = _build(config, lambda name: torch.manual_seed(random_seed(seed, "init", name)))
    length = networks.text_encoder.config.max_position_embeddings
    networks.passive = {
        POSITION_IDS: torch.arange(length)[None],
        LOGIT_SCALE: torch.tensor(math.log(1 / 0.07)),  # CLIP's own start (Radford et al. 2021, section 2.5)
    }
    return networks


def tensors(networks: Networks) -> dict[str, Tensor]:
    """All weights under single-file keys. Most share memory with the live modules: clone what must not change."""
    found = dict(networks.passive)
    for name, module in networks.modules().items():
        found |= FAMILY.single_tensors(name, {key: value.detach() for key, value in module.state_dict().items()})
    return found


def assign(networks: Networks, tensors: Mapping[str, Tensor]) -> None:
    """Copy values, given under single-file keys, into the live modules in place.

    Raises BadInput naming keys that are missing or unexpected and shapes that differ; nothing is copied then.
    """
    import torch

    states = {}
    for name, module in networks.modules().items():
        shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
        states[name] = FAMILY.module_tensors(name, tensors, shapes)
    with torch.no_grad():
        for name, module in networks.modules().items():
            live = module.state_dict()
            for key, value in states[name].items():
                live[key].copy_(value)
    _take_passive(networks, tensors)


def tokenize(networks: Networks, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids of both tokenizers, each (B, 77) int64, cut and padded as the pipeline does."""
    ids_1, ids_2 = (
        tokenizer(
            list(texts),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        for tokenizer in (networks.tokenizer, networks.tokenizer_2)
    )
    return ids_1, ids_2


def encode_tokens(
    text_encoder: nn.Module, text_encoder_2: nn.Module, ids_1: Tensor, ids_2: Tensor, layer: int = -2
) -> tuple[Tensor, Tensor]:
    """(B, T, C1+C2) states of both encoders without final norm, and (B, P) pooled of the second.

    `layer` counts from the end: SDXL was trained with the last layer but one.
    """
    import torch

    first = text_encoder(ids_1, output_hidden_states=True)
    second = text_encoder_2(ids_2, output_hidden_states=True)
    return torch.cat([first.hidden_states[layer], second.hidden_states[layer]], dim=-1), second.text_embeds


def encode_text(networks: Networks, texts: Sequence[str], layer: int = -2) -> tuple[Tensor, Tensor]:
    """(B, 77, C1+C2) and (B, P), equal to StableDiffusionXLPipeline.encode_prompt; gradients as the caller has them."""
    device = networks.text_encoder.device
    ids_1, ids_2 = tokenize(networks, texts)
    return encode_tokens(networks.text_encoder, networks.text_encoder_2, ids_1.to(device), ids_2.to(device), layer)


def pipeline(networks: Networks, scheduler: Any) -> StableDiffusionXLPipeline:
    """The stock pipeline around the live modules.

    An absent negative prompt is the encoded empty text, as in training's caption dropout, not zeros.
    """
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae=networks.vae,
        text_encoder=networks.text_encoder,
        text_encoder_2=networks.text_encoder_2,
        tokenizer=networks.tokenizer,
        tokenizer_2=networks.tokenizer_2,
        unet=networks.unet,
        scheduler=scheduler,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def _build(config: Path, before: Callable[[str], object] = lambda name: None) -> Networks:
    """Modules of the config folder as their constructors make them; `before(component)` is called first."""
    if not (config / "model_index.json").is_file():
        raise MissingObject(f"{config} is no config folder of a diffusers SDXL pipeline: it has no model_index.json.")
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
    return Networks(**made, scheduler_config=scheduler)


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


def marks(scheduler_config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The empty tensors by which a single file says what a folder says in its scheduler's config."""
    import torch

    return {mark: torch.empty(0) for mark in scheduler_marks(scheduler_config)}


def from_noise(scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with sampling from the schedule's last step where that is all noise (Lin et al. 2023, section 3.3)."""
    spacing = {"timestep_spacing": "trailing"} if scheduler_config.get("rescale_betas_zero_snr") else {}
    return {**scheduler_config, **spacing}


def _take_passive(networks: Networks, tensors: Mapping[str, Tensor]) -> None:
    """Keep what no network holds, and let a file's marks decide what its weights predict."""
    networks.passive = _passive(tensors)
    said = scheduler_settings(networks.passive.keys())
    networks.scheduler_config = from_noise({**networks.scheduler_config, **said})


def _passive(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in tensors.items() if FAMILY.component_of(key) is None}
