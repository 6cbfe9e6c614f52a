"""An open_clip folder (open_clip_config.json + one .safetensors) as unit embeddings of pictures and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image

from ambergrade.errors import BadInput, BadSetting
from ambergrade.identity import file_digest
from ambergrade.score.folders import library_versions, require_files, scorer_path, scoring_mode

Pixels = npt.NDArray[np.uint8]

RESIZE_MODES = ("longest", "squash", "shortest")
_TOO_LONG = ", ".join(["long hair"] * 300)


class ClipFolder:
    """One open_clip model. Texts are kept once encoded, and so is the last batch of pictures."""

    def __init__(self, source: str, resize_mode: str = "longest", device: str = "cpu") -> None:
        folder = scorer_path(source)
        config = require_files(folder, "open_clip_config.json")[0]
        weights = sorted(folder.glob("*.safetensors"))
        if len(weights) != 1:
            raise BadInput(f"The CLIP folder {folder} must hold one .safetensors file, found {len(weights)}.")
        local = f"local-dir:{folder}"
        try:
            # require_pretrained: without weights open_clip would score with random ones and say nothing.
            self.model = open_clip.create_model(local, device=device, require_pretrained=True)
        except (RuntimeError, ValueError) as error:
            raise BadInput(f"open_clip cannot load {folder}:\n{str(error)[:400]}") from error
        self.model.eval().requires_grad_(False)
        self.tokenizer = open_clip.get_tokenizer(local)
        preprocess = PreprocessCfg(
            **merge_preprocess_dict(self.model.visual.preprocess_cfg, {"resize_mode": resize_mode})
        )
        self.transform = image_transform_v2(preprocess, is_train=False)
        self.device = device
        self._texts: dict[str, torch.Tensor] = {}
        self._last: tuple[list[Pixels], torch.Tensor] | None = None
        self._refuse_lost_ends()
        self.fingerprint: Mapping[str, Any] = {
            "weights": file_digest(weights[0]),
            "config": file_digest(config),
            "resize_mode": resize_mode,
            "interpolation": preprocess.interpolation,
            "size": preprocess.size,
            **library_versions("open_clip_torch", "torch", "torchvision", "pillow"),
        }

    def __call__(self, pixels: Sequence[Pixels]) -> npt.NDArray[np.float32]:
        """Unit embeddings of uint8 RGB pictures of any sizes: (n, d)."""
        return np.asarray(self.images(pixels).float().cpu().numpy())

    def images(self, pixels: Sequence[Pixels]) -> torch.Tensor:
        """Unit embeddings (n, d) on the device; the last batch is remembered for other metrics of the same folder."""
        if self._last and same_pictures(self._last[0], pixels):
            return self._last[1]
        batch = torch.stack([self.transform(Image.fromarray(picture)) for picture in pixels])
        with scoring_mode():
            found: torch.Tensor = self.model.encode_image(batch.to(self.device), normalize=True)
        if not found.isfinite().all():
            raise BadInput("The CLIP folder gives NaN for a picture: look at its weights.")
        self._last = list(pixels), found
        return found

    def text(self, text: str) -> torch.Tensor:
        """Unit embedding (d,) of a text cut at what the tokenizer holds; each is encoded alone, so it never varies."""
        if text not in self._texts:
            with scoring_mode():
                found = self.model.encode_text(self.tokenizer([text]).to(self.device), normalize=True)[0]
            if not found.isfinite().all():
                raise BadInput(f"The CLIP folder gives NaN for the text '{text[:60]}': look at its weights.")
            self._texts[text] = found
        return self._texts[text]

    @property
    def room(self) -> int:
        """Tokens that a text may have, both its ends included."""
        return int(self.tokenizer([""]).shape[1])

    def length(self, text: str) -> int:
        """Tokens of a text with its two ends, uncut."""
        nothing = self.tokenizer([""])[0]  # start, end, padding, padding …
        padding, end_is_padding = nothing[-1], bool(nothing[1] == nothing[2])
        size = self.room + 2
        while True:
            tokens = self.tokenizer([text], context_length=size)[0]
            if tokens[-1] == tokens[-2] == padding:  # a cut text ends in a word and one end token
                return int((tokens != padding).nonzero().max()) + 1 + int(end_is_padding)
            size *= 2

    def _refuse_lost_ends(self) -> None:
        """Two long texts score alike if the tokenizer cuts the token they are pooled at (torchmetrics issue 2883)."""
        one, other = (self.text(f"{start}, {_TOO_LONG}") for start in ("red eyes", "moon"))
        if torch.equal(one, other):
            raise BadInput(
                "This CLIP folder's tokenizer drops the end-of-text token of long texts, so all of them score alike.\n"
                "Use a tokenizer that truncates before the end-of-text token."
            )


def same_pictures(ours: Sequence[Pixels], theirs: Sequence[Pixels]) -> bool:
    """Whether the same arrays stand in the same order; whoever asks must hold `ours`, lest an address be used again."""
    return len(ours) == len(theirs) and all(one is other for one, other in zip(ours, theirs, strict=True))


_open: WeakValueDictionary[tuple[str, str, str], ClipFolder] = WeakValueDictionary()


def open_clip_folder(source: str, resize_mode: str = "longest", *, device: str = "cpu") -> ClipFolder:
    """The folder `source`, loaded once for as long as a metric holds it. Raises BadSetting, BadInput, MissingObject."""
    if resize_mode not in RESIZE_MODES:
        raise BadSetting(f"resize_mode '{resize_mode}' is not known.\nKnown: {', '.join(RESIZE_MODES)}")
    key = (str(scorer_path(source).resolve()), resize_mode, device)
    found = _open.get(key)
    if found is None:
        found = ClipFolder(source, resize_mode, device)
        _open[key] = found
    return found
