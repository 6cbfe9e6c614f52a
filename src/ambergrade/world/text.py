"""Teaches the tiny text encoders words before they meet pictures, as SDXL's come pretrained from CLIP."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ambergrade.family.sdxl import Networks, tokenize
from ambergrade.identity import random_seed


def teach(
    networks: Networks,
    captions: Sequence[Sequence[str]],
    *,
    steps: int,
    seed: int = 0,
    batch: int = 64,
    rate: float = 2e-3,
) -> float:
    """Train both text encoders, in place, to know at each token which tags were read so far; the last loss.

    A caption is its tags; they are shuffled, and three in ten are left out. The loss is the binary cross-entropy of
    linear heads on what the UNet reads: the penultimate states of both encoders, and the pooled text, which knows the
    whole caption. Without it a colour binds to its noun only after hours: the UNet would have to teach the encoders
    grammar through the noise.
    """
    tags = sorted({tag for caption in captions for tag in caption})
    column = {tag: place for place, tag in enumerate(tags)}
    length = {tag: len(networks.tokenizer(tag).input_ids) - 2 for tag in tags}  # without begin and end
    width_1, width_2 = networks.text_encoder.config.hidden_size, networks.text_encoder_2.config.hidden_size
    torch.manual_seed(random_seed(seed, "text heads"))
    heads = nn.ModuleList(
        nn.Linear(w, len(tags)) for w in (width_1, width_2, networks.text_encoder_2.config.projection_dim)
    )
    encoders = (networks.text_encoder.train(), networks.text_encoder_2.train())
    weights = [p for module in (*encoders, heads) for p in module.parameters()]
    optimizer = torch.optim.AdamW(weights, rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    loss = torch.zeros(())
    for step in tqdm(range(steps), "text encoders", unit="step", disable=None):
        random = np.random.default_rng(random_seed(seed, "text batch", step))
        chosen = [np.asarray(captions[index]) for index in random.integers(len(captions), size=batch)]
        shown = [random.permutation(tags_of[random.random(len(tags_of)) > 0.3]) for tags_of in chosen]
        texts = [", ".join(some) for some in shown]
        ids_1, ids_2 = tokenize(networks, texts)
        known = _known(texts, column, length, ids_1.shape[1])
        first = encoders[0](ids_1, output_hidden_states=True).hidden_states[-2]
        second = encoders[1](ids_2, output_hidden_states=True)
        loss = (
            F.binary_cross_entropy_with_logits(heads[0](first), known)
            + F.binary_cross_entropy_with_logits(heads[1](second.hidden_states[-2]), known)
            + F.binary_cross_entropy_with_logits(heads[2](second.text_embeds), known[:, -1])
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
    for encoder in encoders:
        encoder.eval()
    return loss.item()


def _known(texts: Sequence[str], column: dict[str, int], length: dict[str, int], tokens: int) -> Tensor:
    """(B, tokens, tags): 1 from the token on that ends a tag, so that nothing is asked before it can be known."""
    known = torch.zeros(len(texts), tokens, len(column))
    for row, text in enumerate(texts):
        place = 0  # the token of the text's beginning
        for tag in text.split(", ") if text else []:
            place += length[tag]
            known[row, place:, column[tag]] = 1
            place += 1  # the comma
    return known
