"""CLIP score: how well a picture fits its prompt's text, by any open_clip model folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ambergrade.errors import BadSetting
from ambergrade.identity import random_seed
from ambergrade.nouns import Picture, Prompt
from ambergrade.prompts import plain_text
from ambergrade.score.scoring import Metric
from ambergrade.score.sheet import ScoreSheet

if TYPE_CHECKING:
    import torch

LONG = ("chunk", "head")
OTHERS = 8
"""Other prompts that `clip_margin` compares with."""
AMONG = 100
"""Prompts that `clip_r1` chooses among, at most."""


class ClipScore(Metric):
    """`clip_score` = 100·max(cos(f_I, f_T), 0), clamped per picture (Hessel et al. 2021, eq. 1 with w = 100).

    `clip_cosine` is 100·cos before the clamp. `clip_margin` is the score less the same picture's mean score against 8
    other prompts of the set: the anime-domain offset is gone and chance is 0. `clip_r1` is 1 where the picture's own
    prompt scores best among 100. `clip_truncated` and `clip_tokens_lost` say what the scorer did not read.
    The text is what the encoder was shown (`ambergrade.prompts`): without weights and escapes, with spaces. An empty
    prompt asks for nothing: NaN.
    A text longer than the encoder's room: `chunk` cuts it at commas and takes the token-weighted mean of the parts'
    cosines; `head` keeps its beginning with the end-of-text token that texts are pooled at.
    """

    name = "clip_score"
    columns: Mapping[str, bool] = {
        "clip_score": True,
        "clip_cosine": True,
        "clip_margin": True,
        "clip_r1": True,
        "clip_truncated": False,
        "clip_tokens_lost": False,
    }

    def __init__(self, model: str, resize_mode: str = "longest", long: str = "chunk", device: str = "cpu") -> None:
        """`model`: an open_clip folder (open_clip_config.json + safetensors).

        `resize_mode`: `longest` pads, `squash` stretches, `shortest` crops heads and feet of tall pictures.
        """
        from ambergrade.score.clip import open_clip_folder  # a sheet is read without it

        if long not in LONG:
            raise BadSetting(f"long '{long}' is not known.\nKnown: {', '.join(LONG)}")
        self._clip = open_clip_folder(model, resize_mode, device=device)
        self._long = long
        self._texts: dict[str, tuple[torch.Tensor, int]] = {}
        self._others: tuple[Mapping[str, Prompt], dict[str, torch.Tensor]] | None = None
        self.fingerprint: Mapping[str, Any] = {**self._clip.fingerprint, "long": long, "text": "as it is drawn"}

    def rows(self, pictures: Sequence[Picture], prompts: Mapping[str, Prompt]) -> Mapping[str, npt.NDArray[Any]]:
        """Scores in points 0 to 100, shares as 0 or 1, tokens lost as a count: (n,) each."""
        import torch

        images = self._clip.images([picture.pixels for picture in pictures])
        texts = [plain_text(prompts[picture.prompt_id].text) for picture in pictures]
        own = torch.stack([self._text(text)[0] for text in texts])
        cosines = 100 * (images * own).sum(1).double().cpu().numpy()
        cosines[[not text for text in texts]] = np.nan
        lost = np.array([self._text(text)[1] for text in texts], dtype=np.float64)
        margin, first = np.full(len(pictures), np.nan), np.full(len(pictures), np.nan)
        for row, picture in enumerate(pictures):
            others = self._other_texts(picture.prompt_id, prompts)
            if len(others):
                against = 100 * (others @ images[row]).double().cpu().numpy()
                margin[row] = np.maximum(cosines[row], 0) - np.maximum(against[:OTHERS], 0).mean()
                first[row] = float(cosines[row] > against.max()) if texts[row] else np.nan
        return {
            "clip_score": np.maximum(cosines, 0),
            "clip_cosine": cosines,
            "clip_margin": margin,
            "clip_r1": first,
            "clip_truncated": (lost > 0).astype(np.float64),
            "clip_tokens_lost": lost,
        }

    @classmethod
    def remarks(cls, sheet: ScoreSheet) -> list[str]:
        cut = int(sheet.columns["clip_truncated"].sum())
        lost = float(sheet.columns["clip_tokens_lost"].mean())
        told = f"clip_score: the prompts of {cut} of {sheet.n} pictures were cut to fit the text encoder"
        return [f"{told}; {lost:.1f} tokens lost on average."] if cut else []

    def _text(self, text: str) -> tuple[torch.Tensor, int]:
        """Text vector (d,) whose product with a unit picture vector is its cosine, and how many tokens were lost."""
        if text not in self._texts:
            room, length = self._clip.room, self._clip.length(text)
            if length <= room or self._long == "head":
                self._texts[text] = self._clip.text(text), max(0, length - room)
            else:
                parts = self._parts(text)
                words = [self._clip.length(part) - 2 for part in parts]
                weights = [min(count, room - 2) for count in words]
                total = sum(weights)
                shares = [self._clip.text(part) * (w / total) for part, w in zip(parts, weights, strict=True)]
                vector = sum(shares[1:], start=shares[0])
                self._texts[text] = vector, sum(max(0, count - room + 2) for count in words)
        return self._texts[text]

    def _parts(self, text: str) -> list[str]:
        """The text cut at commas into parts that fit; a single tag that does not fit stays whole and loses its end."""
        parts: list[str] = []
        for tag in text.split(","):
            longer = f"{parts[-1]},{tag}" if parts else tag
            if parts and self._clip.length(longer) <= self._clip.room:
                parts[-1] = longer
            else:
                parts.append(tag.strip())
        return parts

    def _other_texts(self, prompt_id: str, prompts: Mapping[str, Prompt]) -> torch.Tensor:
        """(k, d): up to 99 other texts of the set in an order keyed by the prompt, k = 0 where there are none."""
        import torch

        if self._others is None or self._others[0] is not prompts:
            self._others = prompts, {}
        kept = self._others[1]
        if prompt_id not in kept:
            own = plain_text(prompts[prompt_id].text)
            texts = sorted({plain_text(prompt.text) for prompt in prompts.values()} - {own, ""})
            rng = np.random.Generator(np.random.Philox(key=random_seed(0, "other prompts", own)))
            chosen = rng.permutation(len(texts))[: AMONG - 1]
            vectors = [self._text(texts[k])[0] for k in chosen]
            width = self._text(own)[0].shape[0]
            kept[prompt_id] = torch.stack(vectors) if vectors else self._text(own)[0].new_zeros((0, width))
        return kept[prompt_id]
