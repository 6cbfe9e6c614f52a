"""CLIP score: how well a picture fits its prompt's text, by any open_clip model folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image

from ambergrade.errors import BadInput, BadSetting
from ambergrade.identity import file_digest
from ambergrade.nouns import Measurement, Picture, Prompt
from ambergrade.score.folders import library_versions, require_files, scoring_mode
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import PairedDifference
from ambergrade.store import find_file

RESIZE_MODES = ("longest", "squash", "shortest")
_TOO_LONG = ", ".join(["long hair"] * 300)


class ClipScore:
    """`clip_score` = 100·max(cos(f_I, f_T), 0), clamped per picture (Hessel et al. 2021, eq. 1 with w = 100).

    The text is the prompt as written; what the tokenizer cannot hold is cut at the end, keeping the
    end-of-text token that the text is pooled at, and `clip_truncated` says so.
    """

    name = "clip_score"
    columns: Mapping[str, bool] = {"clip_score": True, "clip_truncated": False}

    def __init__(self, model: str, resize_mode: str = "longest", device: str = "cpu") -> None:
        """`model`: an open_clip folder (open_clip_config.json + safetensors).

        `resize_mode`: `longest` pads, `squash` stretches, `shortest` crops heads and feet of tall pictures.
        """
        if resize_mode not in RESIZE_MODES:
            raise BadSetting(f"resize_mode '{resize_mode}' is not known.\nKnown: {', '.join(RESIZE_MODES)}")
        folder = find_file(model)
        config = require_files(folder, "open_clip_config.json")[0]
        weights = sorted(folder.glob("*.safetensors"))
        if len(weights) != 1:
            raise BadInput(f"The CLIP folder {folder} must hold one .safetensors file, found {len(weights)}.")
        source = f"local-dir:{folder}"
        try:
            # require_pretrained: without weights open_clip would score with random ones and say nothing.
            self._model = open_clip.create_model(source, device=device, require_pretrained=True)
        except (RuntimeError, ValueError) as error:
            raise BadInput(f"open_clip cannot load {folder}:\n{str(error)[:400]}") from error
        self._model.eval().requires_grad_(False)
        self._tokenizer = open_clip.get_tokenizer(source)
        preprocess = PreprocessCfg(
            **merge_preprocess_dict(self._model.visual.preprocess_cfg, {"resize_mode": resize_mode})
        )
        self._transform = image_transform_v2(preprocess, is_train=False)
        self._device = device
        self._texts: dict[str, tuple[torch.Tensor, bool]] = {}
        self._refuse_lost_ends()
        self.fingerprint: Mapping[str, Any] = {
            "weights": file_digest(weights[0]),
            "config": file_digest(config),
            "resize_mode": resize_mode,
            "interpolation": preprocess.interpolation,
            "size": preprocess.size,
            **library_versions("open_clip_torch", "torch", "torchvision", "pillow"),
        }

    def rows(self, pictures: Sequence[Picture], prompts: Mapping[str, Prompt]) -> Mapping[str, npt.NDArray[Any]]:
        """`clip_score` in points 0 to 100, and `clip_truncated` 0 or 1: (n,) each."""
        texts = [self._text(prompts[picture.prompt_id].text) for picture in pictures]
        images = torch.stack([self._transform(Image.fromarray(picture.pixels)) for picture in pictures])
        with scoring_mode():
            features = self._model.encode_image(images.to(self._device), normalize=True)
            cosines = (features * torch.stack([feature for feature, _ in texts])).sum(dim=1)
        return {
            "clip_score": 100 * cosines.clamp(min=0).double().cpu().numpy(),
            "clip_truncated": np.array([float(cut) for _, cut in texts]),
        }

    def constants(self, prompts: Mapping[str, Prompt]) -> Mapping[str, Any]:
        return {}

    @staticmethod
    def aggregates(sheet: ScoreSheet, *, seed: int) -> dict[str, Measurement]:
        return {}

    @staticmethod
    def differences(sheet: ScoreSheet, baseline: ScoreSheet, *, seed: int) -> dict[str, PairedDifference]:
        return {}

    @staticmethod
    def remarks(sheet: ScoreSheet) -> list[str]:
        cut = int(sheet.columns["clip_truncated"].sum())
        return (
            [f"clip_score: the prompts of {cut} of {sheet.n} pictures were cut to fit the text encoder."] if cut else []
        )

    def _text(self, text: str) -> tuple[torch.Tensor, bool]:
        """Unit text feature (d,) and whether the text was cut; kept, and encoded one by one so that it never varies."""
        if text not in self._texts:
            tokens = self._tokenizer([text])
            with scoring_mode():
                feature = self._model.encode_text(tokens.to(self._device), normalize=True)[0]
            # One more place changes the tokens before it only if something had been cut.
            longer = self._tokenizer([text], context_length=tokens.shape[1] + 1)
            self._texts[text] = feature, not torch.equal(tokens, longer[:, :-1])
        return self._texts[text]

    def _refuse_lost_ends(self) -> None:
        """Two long texts score alike if the tokenizer cuts the token they are pooled at (torchmetrics issue 2883)."""
        one, other = (self._text(f"{start}, {_TOO_LONG}")[0] for start in ("red eyes", "moon"))
        if torch.equal(one, other):
            raise BadInput(
                "This CLIP folder's tokenizer drops the end-of-text token of long texts, so all of them score alike.\n"
                "Use a tokenizer that truncates before the end-of-text token."
            )
