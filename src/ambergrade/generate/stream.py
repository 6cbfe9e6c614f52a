"""Pictures from prompts, one seed a picture, through the stock StableDiffusionXLPipeline.

A picture depends on its own prompt, seed and sampler settings, never on its neighbours in the batch: every picture
draws from a CPU generator of its own. What is left of the batch size is the last bits of the kernels' sums.

Without a negative prompt the unconditional half is the encoded empty text, never zeros: training drops captions to
the empty text, so that is the one the networks know. (The stock pipeline takes zeros if there is no negative prompt.)
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ambergrade.errors import BadInput, BadSetting, UnknownName
from ambergrade.family import sdxl
from ambergrade.family.sdxl import Networks
from ambergrade.generate.text_cache import remembered_text
from ambergrade.generate.texts import plain_text
from ambergrade.nouns import Picture, Prompt, PromptSet, SamplerSettings


def pictures(
    networks: Networks, prompts: PromptSet, sampler: SamplerSettings, *, progress: str | None = "pictures"
) -> Iterator[Picture]:
    """Yield one picture a prompt, in the prompts' order; `progress` names the progress bar, None shows none.

    Raises UnknownName for a sampler that is not there, BadSetting for settings that cannot be drawn, BadInput where
    the networks give NaN or infinity (with the prompt's id).
    """
    _check(sampler)
    pipeline = sdxl.pipeline(networks, scheduler(sampler.name, networks.scheduler_config))
    pipeline.set_progress_bar_config(disable=True)
    with tqdm(total=len(prompts.prompts), desc=progress, unit="picture", disable=progress is None or None) as bar:
        for start in range(0, len(prompts.prompts), sampler.batch):
            batch = prompts.prompts[start : start + sampler.batch]
            for prompt, pixels in zip(batch, _draw(pipeline, networks, batch, sampler), strict=True):
                yield Picture(prompt.id, prompt.seed, pixels.numpy())
            bar.update(len(batch))


def scheduler(name: str, config: dict[str, Any]) -> Any:
    """The diffusers scheduler that `generate/samplers/<name>.py` makes of a family's scheduler config."""
    folder = Path(__file__).parent / "samplers"
    known = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    if name not in known:
        raise UnknownName("sampler", name, known)
    return importlib.import_module(f"ambergrade.generate.samplers.{name}").scheduler(config)


@torch.inference_mode()
def _draw(pipeline: Any, networks: Networks, batch: tuple[Prompt, ...], sampler: SamplerSettings) -> Tensor:
    """(B, H, W, 3) uint8 pixels of one batch."""
    texts = [plain_text(prompt.text) for prompt in batch]
    negatives = [plain_text(prompt.negative) for prompt in batch]
    distinct = list(dict.fromkeys(texts + negatives))
    states, pooled = sdxl.encode_text(networks, distinct)
    rows = [distinct.index(text) for text in texts]
    negative_rows = [distinct.index(text) for text in negatives]
    with remembered_text(networks.unet):
        drawn = pipeline(
            prompt_embeds=states[rows],
            pooled_prompt_embeds=pooled[rows],
            negative_prompt_embeds=states[negative_rows],
            negative_pooled_prompt_embeds=pooled[negative_rows],
            generator=[torch.Generator("cpu").manual_seed(prompt.seed) for prompt in batch],
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.guidance,
            width=sampler.width,
            height=sampler.height,
            output_type="pt",
        ).images
    for prompt, image in zip(batch, drawn, strict=True):
        if not image.isfinite().all():
            raise BadInput(
                f"The networks drew NaN or infinity for prompt '{prompt.id}'. Check the checkpoint's weights."
            )
    pixels: Tensor = (drawn.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
    return pixels


def _check(sampler: SamplerSettings) -> None:
    complaints = []
    if sampler.steps < 1:
        complaints.append(f"steps is {sampler.steps}, at least 1 is needed")
    if sampler.batch < 1:
        complaints.append(f"batch is {sampler.batch}, at least 1 is needed")
    if sampler.guidance < 1:
        complaints.append(f"guidance is {sampler.guidance}, from 1 (off) upwards is meant")
    for side in ("width", "height"):
        if getattr(sampler, side) < 8 or getattr(sampler, side) % 8:
            complaints.append(f"{side} is {getattr(sampler, side)}, a multiple of 8 pixels is needed")
    if complaints:
        raise BadSetting(f"Sampler '{sampler.name}': {'; '.join(complaints)}.")
