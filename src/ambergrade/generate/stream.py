"""Pictures from prompts, one seed a picture, through the family's stock pipeline.

A picture depends on its own prompt, seed and sampler settings, never on its neighbours in the batch: every picture
draws from a CPU generator of its own. What is left of the batch size is the last bits of the kernels' sums.

Without a negative prompt the unconditional half is the encoded empty text, never zeros: training drops captions to
the empty text, so that is the one the networks know. (The stock pipeline takes zeros if there is no negative prompt.)
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ambergrade.errors import BadInput, BadSetting, UnknownName
from ambergrade.family.networks import Networks
from ambergrade.generate.fast import is_compiled, room_to_compile
from ambergrade.generate.text_cache import remembered_text
from ambergrade.generate.texts import TextEncoder, refuse_undrawable
from ambergrade.nouns import Picture, Prompt, PromptSet, SamplerSettings


def pictures(
    networks: Networks,
    prompts: PromptSet,
    sampler: SamplerSettings,
    *,
    progress: str | None = "pictures",
    faulty: bool = False,
    texts: TextEncoder | None = None,
) -> Iterator[Picture]:
    """Yield one picture a prompt, in the prompts' order; `progress` names the progress bar, None shows none.

    `faulty`: yield a picture with its `fault` where the networks give NaN or infinity, instead of raising. `texts`: an
    encoder that several streams of the same text encoders' weights share, so that each prompt is encoded once.
    Raises UnknownName for a sampler that is not there, BadSetting for settings that cannot be drawn, and BadInput with
    the prompts' ids: before the first picture for what the grammar refuses, later for NaN or infinity.
    """
    _check(sampler, networks)
    refuse_undrawable((prompt.id, text) for prompt in prompts.prompts for text in (prompt.text, prompt.negative))
    pipeline = networks.pipeline(scheduler(sampler.name, networks.scheduler_config))
    pipeline.set_progress_bar_config(disable=True)
    encoder = texts or TextEncoder(networks)
    with tqdm(total=len(prompts.prompts), desc=progress, unit="picture", disable=progress is None or None) as bar:
        for start in range(0, len(prompts.prompts), sampler.batch):
            batch = prompts.prompts[start : start + sampler.batch]
            for prompt, pixels in zip(batch, _draw(pipeline, networks, batch, sampler, encoder), strict=True):
                if pixels is not None:
                    yield Picture(prompt.id, prompt.seed, pixels.numpy())
                elif faulty:
                    nothing = np.empty((0, 0, 3), np.uint8)
                    yield Picture(prompt.id, prompt.seed, nothing, "the networks drew NaN or infinity")
                else:
                    raise BadInput(
                        f"The networks drew NaN or infinity for prompt '{prompt.id}'. Check the checkpoint's weights."
                    )
            bar.update(len(batch))


def scheduler(name: str, config: dict[str, Any]) -> Any:
    """The diffusers scheduler that `generate/samplers/<name>.py` makes of a family's scheduler config."""
    folder = Path(__file__).parent / "samplers"
    known = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    if name not in known:
        raise UnknownName("sampler", name, known)
    return importlib.import_module(f"ambergrade.generate.samplers.{name}").scheduler(config)


@torch.inference_mode()
def _draw(
    pipeline: Any, networks: Networks, batch: tuple[Prompt, ...], sampler: SamplerSettings, encoder: TextEncoder
) -> list[Tensor | None]:
    """(H, W, 3) uint8 pixels of each prompt of one batch, None where they are not finite.

    Prompts of other lengths are drawn apart: padding a short one to its neighbour's windows would change its picture.
    """
    names = [prompt.id for prompt in batch]
    given = encoder(
        [*(prompt.text for prompt in batch), *(prompt.negative for prompt in batch)],
        [*names, *names],
        sampler.clip_skip,
    )
    pairs = list(zip(given[: len(batch)], given[len(batch) :], strict=True))
    windows = [max(encoder.windows(one) for one in pair) for pair in pairs]
    drawn: list[Tensor | None] = [None] * len(batch)
    for count in dict.fromkeys(windows):
        places = [k for k, windows_of in enumerate(windows) if windows_of == count]
        if is_compiled(networks):  # another batch shape would be compiled anew
            places += places[-1:] * (sampler.batch - len(places))
        conditions = [[encoder.padded(one, count, sampler.clip_skip) for one in pairs[k]] for k in places]
        pixels = _draw_alike(pipeline, networks, [batch[k] for k in places], sampler, conditions)
        for k, picture in zip(places, pixels, strict=True):
            drawn[k] = picture
    return drawn


def _draw_alike(
    pipeline: Any,
    networks: Networks,
    batch: Sequence[Prompt],
    sampler: SamplerSettings,
    conditions: Sequence[Sequence[tuple[Tensor, Tensor]]],
) -> list[Tensor | None]:
    """(H, W, 3) uint8 pixels of prompts whose conditions are equally long, None where they are not finite."""
    prompted, negative = (
        (torch.stack([one[which][0] for one in conditions]), torch.stack([one[which][1] for one in conditions]))
        for which in (0, 1)
    )
    with room_to_compile() if is_compiled(networks) else remembered_text(networks.unet):
        drawn = pipeline(
            **networks.embeds(prompted, negative),
            generator=[torch.Generator("cpu").manual_seed(prompt.seed) for prompt in batch],
            num_inference_steps=sampler.steps,
            guidance_scale=sampler.guidance,
            guidance_rescale=sampler.rescale,
            width=sampler.width,
            height=sampler.height,
            output_type="pt",
        ).images
    sound = drawn.isfinite().flatten(1).all(1).tolist()
    pixels: Tensor = (drawn.float() * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()
    return [one if fine else None for one, fine in zip(pixels, sound, strict=True)]


def _check(sampler: SamplerSettings, networks: Networks) -> None:
    complaints = []
    layers = min(e.config.num_hidden_layers for e in networks.encoders.values())
    if not 1 <= sampler.clip_skip <= layers:
        complaints.append(f"clip_skip is {sampler.clip_skip}, 1 to {layers} are there, and 2 is SDXL's own")
    if not 0 <= sampler.rescale <= 1:
        complaints.append(f"rescale is {sampler.rescale}, from 0 (off) to 1 is meant")
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
