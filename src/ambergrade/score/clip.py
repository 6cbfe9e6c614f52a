"""An open_clip folder (open_clip_config.json + one .safetensors) as unit embeddings of pictures and texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import open_clip
import timm
import torch
from open_clip.tokenizer import get_clean_fn
from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict
from PIL import Image

from ambergrade.errors import BadInput, BadSetting
from ambergrade.identity import file_digest
from ambergrade.score.folders import (
    BUILD_ERRORS,
    library_versions,
    only_these,
    read_json,
    refuse_keys,
    require_files,
    scorer_path,
    scoring_mode,
)

Pixels = npt.NDArray[np.uint8]

RESIZE_MODES = ("longest", "squash", "shortest")
_TOO_LONG = ", ".join(["long hair"] * 300)


class ClipFolder:
    """One open_clip model. Texts are kept once encoded, and so is the last batch of pictures."""

    def __init__(self, source: str, resize_mode: str = "longest", device: str = "cpu") -> None:
        folder = scorer_path(source)
        config, weights = require_files(folder, "open_clip_config.json")[0], _weights(folder)
        about = checked_config(config)
        try:
            # require_pretrained: without weights open_clip would score with random ones and say nothing.
            with only_these(config.name, about, weights) as safe:
                self.model = open_clip.create_model(f"local-dir:{safe}", device=device, require_pretrained=True)
        except BUILD_ERRORS as error:
            raise BadInput(f"open_clip cannot load {folder}:\n{str(error)[:400]}") from error
        self.model.eval().requires_grad_(False)
        self.tokenizer = _tokenizer(folder, about["model_cfg"]["text_cfg"])
        preprocess = PreprocessCfg(
            **merge_preprocess_dict(self.model.visual.preprocess_cfg, {"resize_mode": resize_mode})
        )
        self.transform = image_transform_v2(preprocess, is_train=False)
        self.device = device
        self._texts: dict[str, torch.Tensor] = {}
        self._last: tuple[list[Pixels], torch.Tensor] | None = None
        self._refuse_lost_ends()
        self.fingerprint: Mapping[str, Any] = {
            "weights": file_digest(weights),
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


def checked_config(file: Path) -> dict[str, Any]:
    """An open_clip_config.json whose settings describe networks of open_clip and timm alone.

    Raises BadInput for a config that names a network or a tokenizer of another place, or switches their code on.
    """
    about = read_json(file)
    model = about.get("model_cfg")
    if not isinstance(model, dict) or not all(isinstance(model.get(key), dict) for key in ("vision_cfg", "text_cfg")):
        raise BadInput(f"{file} lacks model_cfg with vision_cfg and text_cfg: it is no open_clip config.")
    text, trunk = model["text_cfg"], model["vision_cfg"].get("timm_model_name")
    if text.get("hf_model_name"):
        raise BadInput(
            f"{file}: the text network '{text['hf_model_name']}' would be fetched from the hub, config and code.\n"
            "Use a CLIP whose text network is open_clip's own (text_cfg without hf_model_name)."
        )
    if trunk and not (isinstance(trunk, str) and timm.is_model(trunk)):
        raise BadInput(f"{file}: timm_model_name {trunk!r} is no network of the installed timm.")
    known = {"clean", "strip_sep_token"} if text.get("hf_tokenizer_name") else {"clean"}
    refuse_keys(file, "tokenizer_kwargs", sorted((text.get("tokenizer_kwargs") or {}).keys() - known))
    refuse_keys(file, "text_cfg", ["tokenizer_mode"] if text.get("tokenizer_mode") else [])
    return about


def _weights(folder: Path) -> Path:
    """The folder's weights: `open_clip_model.safetensors`, as open_clip names it, else the only .safetensors."""
    found = sorted(folder.glob("*.safetensors"))
    named = [path for path in found if path.name == "open_clip_model.safetensors"]
    if not named and len(found) != 1:
        raise BadInput(
            f"The CLIP folder {folder} must hold open_clip_model.safetensors, or one .safetensors file.\n"
            f"Found: {', '.join(path.name for path in found) or 'none'}."
        )
    return (named or found)[0]


def _tokenizer(folder: Path, text: Mapping[str, Any]) -> Tokenizer:
    length = int(text.get("context_length", 77))
    given = text.get("tokenizer_kwargs") or {}
    if not text.get("hf_tokenizer_name"):
        made: Tokenizer = open_clip.SimpleTokenizer(context_length=length, **given)
        return made
    return _FileTokenizer(folder, length, given.get("clean", "whitespace"), bool(given.get("strip_sep_token")))


class Tokenizer(Protocol):
    """Texts to token ids, as open_clip's own."""

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> torch.Tensor:
        """(n, context_length) int64."""


class _FileTokenizer:
    """A tokenizer.json of the folder, padded and cut as open_clip's HFTokenizer does; no class that a config names."""

    def __init__(self, folder: Path, length: int, clean: str, strip_separator: bool) -> None:
        from tokenizers import Tokenizer as Loaded

        file, settings = require_files(folder, "tokenizer.json", "tokenizer_config.json")
        try:
            self._loaded, self._clean = Loaded.from_file(str(file)), get_clean_fn(clean)
        except Exception as error:  # tokenizers raises nothing narrower
            raise BadInput(f"{file} is no tokenizer: {str(error)[:200]}") from error
        self._length = length
        self._pad, self._pad_id = self._special(settings, "pad_token")
        self._separator = self._special(settings, "sep_token")[1] if strip_separator else None

    def __call__(self, texts: Sequence[str], context_length: int | None = None) -> torch.Tensor:
        length = context_length or self._length
        self._loaded.enable_truncation(length)
        self._loaded.enable_padding(length=length, pad_id=self._pad_id, pad_token=self._pad)
        found = self._loaded.encode_batch([self._clean(text) for text in texts])
        ids = torch.tensor([one.ids for one in found])
        return ids if self._separator is None else torch.where(ids == self._separator, 0, ids)

    def _special(self, settings: Path, name: str) -> tuple[str, int]:
        stated = read_json(settings).get(name)
        token = stated.get("content") if isinstance(stated, dict) else stated
        number = self._loaded.token_to_id(token) if isinstance(token, str) else None
        if number is None:
            raise BadInput(f"{settings}: {name} {stated!r} is not in tokenizer.json.")
        return str(token), number


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
