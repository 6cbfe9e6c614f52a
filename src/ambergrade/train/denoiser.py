"""Joins the trained networks in one module, and sets what moves in it, in which precision and with what memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ambergrade.errors import BadSetting
from ambergrade.family.networks import Networks
from ambergrade.family.prediction import from_noise, marks
from ambergrade.train.rounding import lost_share
from ambergrade.train.settings import TrainSettings, plug_module
from ambergrade.train.tokens import encode

HALF = ("bf16-sr", "bf16-plain")
"""Precisions whose weights are bf16."""
MOST_LOST = 0.5
"""Plain bf16 is refused when more than this share of a part's weights would not feel a step."""


class Denoiser(nn.Module):
    """Joins the trained networks under their short names, so that accumulation and gradient reduction cover all."""

    def __init__(self, networks: Networks, *, autocast: bool = False) -> None:
        """`autocast` computes fp32 weights' matrix products in bf16."""
        super().__init__()
        self.autocast = autocast
        self.networks = networks
        for part, module in networks.trained.items():
            self.add_module(part, module)

    def forward(self, noisy: Tensor, timesteps: Tensor, ids: Sequence[Tensor], time_ids: Tensor) -> Tensor:
        """Predict the noise, (B, C, H, W)."""
        # Not accelerate's mixed precision, which would hold for every later run of the process.
        with torch.autocast(noisy.device.type, torch.bfloat16, enabled=self.autocast):
            unet: Any = self.networks.unet
            states, pooled = encode(self.networks, ids)
            added = self.networks.added(pooled, time_ids)
            dtype = unet.conv_in.weight.dtype  # the property `dtype` walks through all modules
            predicted: Tensor = unet(noisy.to(dtype), timesteps, states, added_cond_kwargs=added, return_dict=False)[0]
        return predicted


def set_prediction(networks: Networks, settings: TrainSettings) -> None:
    """Let the networks' scheduler config say what the loss trains, so that validation and sampling follow.

    The marks by which a single file says the same go with the weights. Raises BadSetting for an ε-loss on a
    v-prediction model, which would unlearn it.
    """
    trained = plug_module("loss", settings.loss).PREDICTION
    found = networks.scheduler_config.get("prediction_type", "epsilon")
    if trained == "epsilon" and found != "epsilon":
        raise BadSetting(
            f"The base predicts {found}, and loss={settings.loss['name']} trains epsilon. Take loss@trainer.loss=v."
        )
    if trained != found:
        networks.scheduler_config = {**networks.scheduler_config, "prediction_type": trained}
    if settings.zero_terminal_snr:
        networks.scheduler_config = from_noise({**networks.scheduler_config, "rescale_betas_zero_snr": True})
    networks.passive |= marks(networks.scheduler_config)


def choose_precision(denoiser: Denoiser, settings: TrainSettings) -> None:
    """Make the weights bf16 where that is asked for.

    Raises BadSetting where they would not learn: plain rounding at a rate that most weights would not feel.
    """
    if settings.precision not in HALF:
        return
    for part, rate in settings.lr.items() if settings.precision == "bf16-plain" else ():
        lost = lost_share((p for p in getattr(denoiser, part).parameters() if p.requires_grad), rate)
        if rate and lost > MOST_LOST:
            raise BadSetting(
                f"lr.{part}={rate:g} with precision=bf16-plain trains next to nothing: bf16 rounds a step of that\n"
                f"size away for {lost:.0%} of its weights. Take precision=bf16 (fp32 weights), or bf16-sr with\n"
                "optimizer=adamw_sr, adafactor or lion."
            )
    denoiser.to(torch.bfloat16)


def save_memory(networks: Networks, settings: TrainSettings) -> None:
    """Compute blocks again instead of keeping their activations, lay memory out, and compile, as the settings ask."""
    unet = networks.unet
    if settings.checkpointing != "none":
        unet.enable_gradient_checkpointing()
        if settings.checkpointing == "selective":
            for block in [*unet.down_blocks[:-1], *unet.up_blocks[1:]]:
                for module in block.modules():  # the transformers in it decide for themselves
                    if hasattr(module, "gradient_checkpointing"):
                        module.gradient_checkpointing = False
        else:
            for encoder in networks.encoders.values():
                # transformers 5 renamed it, and warns of the old name
                enable = getattr(encoder, "activation_checkpointing_enable", encoder.gradient_checkpointing_enable)
                enable({"use_reentrant": False})
    else:
        unet.disable_gradient_checkpointing()
    unet.to(memory_format=torch.channels_last if settings.channels_last else torch.contiguous_format)
    if settings.compile:
        unet.compile_repeated_blocks()


def freeze(denoiser: Denoiser, lr: Mapping[str, float], *, embeddings: bool = False) -> None:
    """Leave gradients on for parts with a learning rate, but for what no loss reaches and, if asked, embeddings.

    Layers that nothing reads would stay without gradient, and distributed training would wait for it.
    """
    for part, rate in lr.items():
        getattr(denoiser, part).requires_grad_(rate > 0)
    for module in denoiser.networks.unread:
        module.requires_grad_(False)
    if embeddings:
        for module in denoiser.modules():
            if isinstance(module, nn.Embedding):
                module.requires_grad_(False)


def parameter_groups(denoiser: Denoiser, lr: Mapping[str, float]) -> list[dict[str, Any]]:
    """Group trained parameters by part; decay spares norms, biases and embeddings (rows rarely seen would drift)."""
    embeddings = {id(m.weight) for m in denoiser.modules() if isinstance(m, nn.Embedding)}
    groups: list[dict[str, Any]] = []
    for part in lr:
        trained = [p for p in getattr(denoiser, part).parameters() if p.requires_grad]
        for decayed in (True, False):
            chosen = [p for p in trained if (p.ndim > 1 and id(p) not in embeddings) is decayed]
            if chosen:
                groups.append({"params": chosen, "lr": lr[part], "part": part, "decayed": decayed})
    return groups
