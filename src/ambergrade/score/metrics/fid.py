"""FID: distance of the generated pictures' feature distribution from that of real reference pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from torch.nn import functional
from torchmetrics.image.fid import FrechetInceptionDistance
from tqdm import tqdm

from ambergrade.errors import BadInput, MissingObject
from ambergrade.identity import digest, file_digest
from ambergrade.nouns import Measurement, Picture, Prompt
from ambergrade.score.folders import TimmFolder, library_versions, load_timm, scoring_mode
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import Z95, Floats, PairedDifference, jackknife_error, normal_p
from ambergrade.store import find_file

GROUPS = 50
"""Jackknife groups of prompts, at most."""


class Fid:
    """Fréchet distance (Heusel et al. 2017, eq. 6) by torchmetrics, between penultimate features of a timm folder.

    Features of every picture are kept, so the value, its jackknife error and paired differences are
    recomputed from a sheet. FID must never be bootstrapped: duplicates double its bias (facts 2).
    """

    name = "fid"
    columns: Mapping[str, bool] = {}

    def __init__(self, extractor: str, reference: str, pictures: str, batch: int = 32, device: str = "cpu") -> None:
        """`reference`: a text file of picture file names, one a line, relative to the folder `pictures`."""
        self._device = device
        folder = load_timm(extractor, device=device)
        self._extractor = Extractor(folder).eval()
        files = _listed(find_file(reference), find_file(pictures))
        moments = FrechetInceptionDistance(feature=self._extractor).to(device)
        starts = tqdm(range(0, len(files), batch), desc="FID reference", unit="batch", disable=None)
        for start in starts:
            for pixels, _ in _by_shape([_read_rgb(path) for path in files[start : start + batch]]):
                with scoring_mode():
                    moments.update(pixels.to(device), real=True)
        self._constants = {
            "n": len(files),
            "sum": moments.real_features_sum.tolist(),
            "outer_sum": moments.real_features_cov_sum.tolist(),
        }
        self.fingerprint: Mapping[str, Any] = {
            **folder.fingerprint,
            **library_versions("torchmetrics", "pillow"),
            "reference": digest([file_digest(path) for path in files]),
            "reference_pictures": len(files),
            "dimensions": self._extractor.num_features,
            "preprocessing": f"RGB, antialiased {folder.interpolation} to {folder.size}, squashed, not quantised",
        }

    def rows(self, pictures: Sequence[Picture], prompts: Mapping[str, Prompt]) -> Mapping[str, npt.NDArray[Any]]:
        """`fid.features`: (n, d) float32."""
        features = np.empty((len(pictures), self._extractor.num_features), dtype=np.float32)
        for pixels, places in _by_shape([picture.pixels for picture in pictures]):
            with scoring_mode():
                features[places] = self._extractor(pixels.to(self._device)).cpu().numpy()
        return {"fid.features": features}

    def constants(self, prompts: Mapping[str, Prompt]) -> Mapping[str, Any]:
        """The reference's count, Σx and Σxxᵀ: torchmetrics' own state."""
        return self._constants

    @staticmethod
    def aggregates(sheet: ScoreSheet, *, seed: int) -> dict[str, Measurement]:
        """`fid`, with value ± 1.96 jackknife errors over groups of prompts: sampling noise, not FID's bias."""
        value = _value(sheet)
        half = Z95 * jackknife_error(_leave_out(sheet))
        return {"fid": Measurement(value, max(0.0, value - half), value + half, sheet.n, higher_is_better=False)}

    @staticmethod
    def differences(sheet: ScoreSheet, baseline: ScoreSheet, *, seed: int) -> dict[str, PairedDifference]:
        """Paired jackknife: both sheets leave out the same prompts at once."""
        value = _value(sheet) - _value(baseline)
        error = jackknife_error(_leave_out(sheet) - _leave_out(baseline))
        low, high = value - Z95 * error, value + Z95 * error
        prompts = len(set(sheet.prompt_ids))
        return {"fid": PairedDifference(value, low, high, normal_p(value, error), prompts, 2.8 * error, False)}

    @staticmethod
    def remarks(sheet: ScoreSheet) -> list[str]:
        n, reference = sheet.n, sheet.constants["fid"]["n"]
        d = sheet.features["fid.features"].shape[1]
        if min(n, reference) > d:
            return []
        return [
            f"fid: {n} pictures and {reference} references for {d} features: a covariance lacks rank (n ≤ d), so the "
            "value is mostly FID's own bias. Compare it at equal n only."
        ]


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
        x = pixels.float()
        if tuple(x.shape[2:]) != self.size:
            x = functional.interpolate(x, self.size, mode=self.interpolation, antialias=True).clamp(0, 255)
        x = (x - self.mean) / self.std
        features: torch.Tensor = self.network.forward_head(self.network.forward_features(x), pre_logits=True)
        return features.flatten(1)


class _AsIs(torch.nn.Module):
    """Hands features through, so that torchmetrics can be fed stored ones."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(mean: Floats, covariance: Floats, mean_2: Floats, covariance_2: Floats) -> Floats:
    """‖μ₁-μ₂‖² + tr(Σ₁+Σ₂) - 2·tr((Σ₁Σ₂)^½); the first pair may be stacked, (..., d) and (..., d, d).

    The trace is the sum of roots of the eigenvalues of S₂Σ₁S₂ with S₂ = Σ₂^½: symmetric, so all real.
    """
    values, vectors = np.linalg.eigh(covariance_2)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    crossed = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ covariance @ root), 0)).sum(-1)
    traces = np.trace(covariance, axis1=-2, axis2=-1) + np.trace(covariance_2)
    distance: Floats = np.square(mean - mean_2).sum(-1) + traces - 2 * crossed
    return distance


def _value(sheet: ScoreSheet) -> float:
    """torchmetrics' FID of the stored features against the stored reference."""
    features = torch.from_numpy(sheet.features["fid.features"].astype(np.float64))
    _enough(features.shape[0])
    reference = sheet.constants["fid"]
    fid = FrechetInceptionDistance(feature=_AsIs(features.shape[1]))
    fid.real_features_num_samples = torch.tensor(reference["n"])
    fid.real_features_sum = torch.tensor(reference["sum"], dtype=torch.float64)
    fid.real_features_cov_sum = torch.tensor(reference["outer_sum"], dtype=torch.float64)
    fid.update(features, real=False)
    return float(fid.compute())


def _leave_out(sheet: ScoreSheet) -> Floats:
    """FID with each group of prompts left out in turn: (G,). Prompt k belongs to group k mod G."""
    features = sheet.features["fid.features"].astype(np.float64)
    place = {prompt_id: k for k, prompt_id in enumerate(dict.fromkeys(sheet.prompt_ids))}
    groups = min(GROUPS, len(place))
    group = np.array([place[prompt_id] % groups for prompt_id in sheet.prompt_ids])
    member = (np.arange(groups)[:, None] == group[None, :]).astype(np.float64)
    n = features.shape[0] - member.sum(1)
    _enough(int(n.min()))
    mean = (features.sum(0) - member @ features) / n[:, None]
    distances = np.empty(groups)
    reference = _moments(sheet.constants["fid"])
    outer = features.T @ features
    for g in range(groups):  # one (d, d) covariance at a time: d may be 2048
        inside = features[group == g]
        covariance = (outer - inside.T @ inside - n[g] * np.outer(mean[g], mean[g])) / (n[g] - 1)
        distances[g] = frechet_distance(mean[g], covariance, *reference)
    return distances


def _moments(reference: Mapping[str, Any]) -> tuple[Floats, Floats]:
    n = reference["n"]
    mean = np.array(reference["sum"]) / n
    return mean, (np.array(reference["outer_sum"]) - n * np.outer(mean, mean)) / (n - 1)


def _enough(n: int) -> None:
    if n < 2:
        raise BadInput("FID's interval needs pictures of at least 3 prompts.")


def _listed(reference: Path, pictures: Path) -> list[Path]:
    """The picture files that a list names; raises BadInput or MissingObject for a list that cannot serve."""
    names = [line.strip() for line in reference.read_text().splitlines() if line.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise BadInput(
            f"{reference} must name at least 2 pictures, each once; found {len(set(names))} of {len(names)}."
        )
    files = [pictures / name for name in names]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise MissingObject(f"{len(missing)} of {len(files)} reference pictures are not in {pictures}: {missing[:3]} …")
    return files


def _read_rgb(path: Path) -> npt.NDArray[np.uint8]:
    """A picture as it is seen: EXIF turned, transparency on white."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))


def _by_shape(pixels: Sequence[npt.NDArray[np.uint8]]) -> list[tuple[torch.Tensor, list[int]]]:
    """Pictures of equal size stacked as uint8 (m, 3, height, width), with their places."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, picture in enumerate(pixels):
        places.setdefault(picture.shape, []).append(place)
    return [
        (torch.from_numpy(np.stack([pixels[k] for k in same]).transpose(0, 3, 1, 2).copy()), same)
        for same in places.values()
    ]
