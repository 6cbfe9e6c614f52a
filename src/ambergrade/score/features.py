"""What a picture is to a network: features of timm folders, open_clip folders and pytorch-fid's Inception file.

Metrics that name the same extractor share one network and one pass: see `feature_source`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakValueDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from ambergrade.errors import BadInput
from ambergrade.identity import digest, file_digest
from ambergrade.score.clip import open_clip_folder, same_pictures
from ambergrade.score.folders import TimmFolder, library_versions, load_timm, scorer_path, scoring_mode
from ambergrade.score.inception import fid_inception

Pixels = npt.NDArray[np.uint8]
Features = npt.NDArray[np.float32]


class Network(Protocol):
    """Pictures to features, with what made them."""

    fingerprint: Mapping[str, Any]

    def __call__(self, pixels: Sequence[Pixels]) -> Features:
        """uint8 RGB pictures of any sizes to (n, d)."""


class FeatureSource:
    """A network that several metrics read; it works each batch out once."""

    def __init__(self, network: Network) -> None:
        self.fingerprint = network.fingerprint
        self._network = network
        self._last: tuple[list[Pixels], Features] | None = None
        self.d = int(self([np.zeros((64, 64, 3), dtype=np.uint8)]).shape[1])

    @property
    def key(self) -> str:
        """Name of the features in a score sheet."""
        return f"features.{digest(self.fingerprint)[:12]}"

    def __call__(self, pixels: Sequence[Pixels]) -> Features:
        """(n, d) float32; the last answer is kept with its pictures."""
        if self._last and same_pictures(self._last[0], pixels):
            return self._last[1]
        found = self._network(pixels)
        self._last = list(pixels), found
        return found


_open: WeakValueDictionary[tuple[str, str], FeatureSource] = WeakValueDictionary()


def feature_source(source: str, *, device: str = "cpu") -> FeatureSource:
    """The extractor `source`: a timm folder, an open_clip folder, or pytorch-fid's Inception as .safetensors.

    The same source on the same device is loaded once for as long as a metric holds it. Raises MissingObject or
    BadInput for what is not there or cannot be loaded; no network ever keeps random weights.
    """
    path = scorer_path(source)
    key = (str(path.resolve()), device)
    found = _open.get(key)
    if found is None:
        found = FeatureSource(_load(path, device))
        _open[key] = found
    return found


def _load(path: Path, device: str) -> Network:
    if path.is_file():
        return _Inception(path, device)
    if (path / "open_clip_config.json").is_file():
        return open_clip_folder(str(path), "squash", device=device)
    return _Timm(load_timm(str(path), device=device))


class _Timm:
    def __init__(self, folder: TimmFolder) -> None:
        self._extractor = Extractor(folder).eval()
        self.fingerprint: Mapping[str, Any] = {
            **folder.fingerprint,
            "preprocessing": f"RGB, antialiased {folder.interpolation} to {folder.size}, squashed, not quantised",
        }

    def __call__(self, pixels: Sequence[Pixels]) -> Features:
        return by_shape(pixels, self._extractor, next(self._extractor.network.parameters()).device)


class _Inception:
    """pytorch-fid's network with its resize (bilinear without antialias), so that its .npz statistics compare."""

    def __init__(self, path: Path, device: str) -> None:
        self._network = fid_inception(path).to(device)
        self._device = torch.device(device)
        self.fingerprint: Mapping[str, Any] = {
            "weights": file_digest(path),
            "architecture": "FID Inception v3, pool3",
            "preprocessing": "RGB, bilinear without antialias to 299 × 299, squashed (pytorch-fid)",
            **library_versions("torch", "torchvision"),
        }

    def __call__(self, pixels: Sequence[Pixels]) -> Features:
        return by_shape(pixels, self._network, self._device)


class Extractor(torch.nn.Module):
    """uint8 RGB pictures (n, 3, height, width) to penultimate features (n, d): what torchmetrics takes as `feature`."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, folder: TimmFolder) -> None:
        super().__init__()
        self.network = folder.network
        self.size = folder.size
        self.interpolation = folder.interpolation
        device = next(folder.network.parameters()).device
        self.register_buffer("mean", torch.tensor(folder.mean, device=device)[:, None, None] * 255)
        self.register_buffer("std", torch.tensor(folder.std, device=device)[:, None, None] * 255)
        blank = torch.zeros((1, 3, *folder.size), dtype=torch.uint8, device=device)
        with scoring_mode():
            self.num_features = int(self(blank).shape[1])

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.prepared(pixels)
        features: torch.Tensor = self.network.forward_head(self.network.forward_features(x), pre_logits=True)
        return features.flatten(1)

    def prepared(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the network is shown: squashed to its size with antialias, not quantised, normalised."""
        x = pixels.float()
        if tuple(x.shape[2:]) != self.size:
            x = functional.interpolate(x, self.size, mode=self.interpolation, antialias=True).clamp(0, 255)
        return (x - self.mean) / self.std


def by_shape(
    pixels: Sequence[Pixels], network: Callable[[torch.Tensor], torch.Tensor], device: torch.device
) -> Features:
    """Pictures of equal size together through `network` of (m, 3, height, width) uint8: (n, d) in the given order."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, picture in enumerate(pixels):
        places.setdefault(picture.shape, []).append(place)
    parts: list[tuple[list[int], Features]] = []
    for same in places.values():
        stacked = torch.from_numpy(np.stack([pixels[k] for k in same]).transpose(0, 3, 1, 2).copy())
        with scoring_mode():
            parts.append((same, network(stacked.to(device)).float().cpu().numpy()))
    found = np.empty((len(pixels), parts[0][1].shape[1]), dtype=np.float32)
    for same, values in parts:
        found[same] = values
    if not np.isfinite(found).all():
        worst = int(np.flatnonzero(~np.isfinite(found).all(1))[0])
        raise BadInput(f"The feature extractor gives NaN or infinity for picture {worst} of the batch.")
    return found
