"""Stable Diffusion 1.x: one CLIP text encoder, convolutions around the attention, a fourth level in the UNet."""

from __future__ import annotations

from ambergrade.family import original
from ambergrade.family.layouts import Component
from ambergrade.family.load import Family

TEXT = "cond_stage_model.transformer.text_model."
FAMILY = Family(
    name="sd15",
    architecture="stable-diffusion-v1",
    components={
        "unet": Component(
            original.UNET,
            "model.diffusion_model.",
            {
                "block_out_channels": [320, 640, 1280, 1280],
                "layers_per_block": 2,
                "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
                "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
                "cross_attention_dim": 768,
                "attention_head_dim": 8,
            },
            "unet",
        ),
        "vae": Component(original.VAE, "first_stage_model.", original.VAE_CONFIG, "vae"),
        "text_encoder": Component(original.CLIP, TEXT, original.CLIP_L_CONFIG, "te1"),
    },
    blocks=12,
    # The noise schedule that the original training code kept among its weights, and two markers of v-prediction.
    passive=frozenset(
        {f"{TEXT}embeddings.position_ids", "v_pred", "ztsnr", "logvar", "scale_factor", "betas"}
        | {"alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod"}
        | {"sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod"}
        | {"sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped"}
        | {"posterior_mean_coef1", "posterior_mean_coef2"}
    ),
    # transformers before 4.0 had no module `text_model`; files from that time still circulate.
    variants={"cond_stage_model.transformer.": TEXT},
)
