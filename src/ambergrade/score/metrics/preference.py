"""Preference: what people chose between two pictures of one prompt, by a CLIP tuned on their choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ambergrade.errors import BadSetting
from ambergrade.nouns import Picture, Prompt
from ambergrade.prompts import plain_text
from ambergrade.score.scoring import Metric
from ambergrade.score.sheet import ScoreSheet

SCALES = ("logit", "cosine")


class Preference(Metric):
    """`preference` = s·cos(f_I, f_T) of an open_clip folder, not clamped; the text is cut at the encoder's room.

    The text is what the encoder was shown (`ambergrade.prompts`); an empty prompt is NaN.

    `logit`: s is the model's own temperature, as PickScore's (Kirstain et al. 2023, section 3), so that the sigmoid of
    a difference is the chance that the picture is preferred. `cosine`: s = 1, as HPS v2.1's (Wu et al. 2023).
    The number means something between pictures of one prompt only: read it as a paired difference.
    """

    name = "preference"
    columns: Mapping[str, bool] = {"preference": True, "preference_truncated": False}

    def __init__(
        self, model: str, scale: str = "logit", resize_mode: str = "shortest", prefix: str = "", device: str = "cpu"
    ) -> None:
        """`model`: an open_clip folder. `prefix` stands before every text, where a scorer was tuned with one."""
        from ambergrade.score.clip import open_clip_folder  # a sheet is read without it

        if scale not in SCALES:
            raise BadSetting(f"scale '{scale}' is not known.\nKnown: {', '.join(SCALES)}")
        self._clip = open_clip_folder(model, resize_mode, device=device)
        self._prefix = prefix
        self._scale = float(self._clip.model.logit_scale.exp()) if scale == "logit" else 1.0
        self.fingerprint: Mapping[str, Any] = {
            **self._clip.fingerprint,
            "scale": scale,
            "prefix": prefix,
            "text": "as it is drawn",
        }

    def rows(self, pictures: Sequence[Picture], prompts: Mapping[str, Prompt]) -> Mapping[str, npt.NDArray[Any]]:
        """(n,) scores, and 1 where the prompt did not fit the text encoder."""
        import torch

        asked = [plain_text(prompts[picture.prompt_id].text) for picture in pictures]
        texts = [self._prefix + text for text in asked]
        images = self._clip.images([picture.pixels for picture in pictures])
        cosines = (images * torch.stack([self._clip.text(text) for text in texts])).sum(1)
        cut = {text: float(self._clip.length(text) > self._clip.room) for text in dict.fromkeys(texts)}
        return {
            "preference": np.where(
                [bool(text) for text in asked], self._scale * cosines.double().cpu().numpy(), np.nan
            ),
            "preference_truncated": np.array([cut[text] for text in texts]),
        }

    @classmethod
    def remarks(cls, sheet: ScoreSheet) -> list[str]:
        said = ["preference: compares pictures of one prompt; its mean over prompts means nothing without a baseline."]
        cut = int(np.nansum(sheet.columns["preference_truncated"]))
        if cut:
            said.append(f"preference: the prompts of {cut} of {sheet.n} pictures were cut to fit the text encoder.")
        return said
