"""A WD v3 tagger folder: selected_tags.csv with a timm model (config.json + model.safetensors) or model.onnx."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from ambergrade.errors import BadInput, BadSetting, MissingObject
from ambergrade.identity import digest, file_digest
from ambergrade.score.folders import (
    TimmFolder,
    library_versions,
    load_timm,
    read_json,
    require_files,
    scorer_path,
    scoring_mode,
)
from ambergrade.store import written_aside

Floats = npt.NDArray[np.float64]
Pixels = npt.NDArray[np.uint8]

CATEGORIES = {"0": "general", "1": "artist", "3": "copyright", "4": "character", "5": "meta", "9": "rating"}
"""Danbooru's numbers in selected_tags.csv; 9 is WD's own, its four rows are ratings, not tags."""
CARD_THRESHOLDS = {
    "vit_base_patch16": 0.2614,
    "convnext_base": 0.2682,
    "swinv2_base": 0.2653,
    "eva02_large_patch14": 0.5296,
}
"""Architecture to the threshold where precision equals recall, from the WD v3 cards; v2's are not comparable."""
WD_V3_TAGS = 10861
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Tag:
    """One output of the tagger."""

    name: str
    category: str
    count: int
    """Training pictures with it, as the csv says; 0 where it does not."""


class _Backend(Protocol):
    size: tuple[int, int]
    outputs: int | None
    fingerprint: Mapping[str, Any]

    def __call__(self, pixels: Sequence[Pixels]) -> Floats: ...


class Tagger:
    """Probabilities of tags and ratings."""

    def __init__(
        self,
        source: str,
        thresholds: Mapping[str, float] | None = None,
        device: str = "cpu",
        *,
        key: str = "suite.metrics.tag_adherence.thresholds",
    ) -> None:
        """`thresholds`: category to probability; by default the folder's thresholds.json, else its model card's.

        `key`: the setting that an error message advises to give.
        """
        self._key = key
        self.path = scorer_path(source)
        listed = require_files(self.path, "selected_tags.csv")[0]
        self.tags = _read_tags(listed)
        self.backend = _open(self.path, device)
        if self.backend.outputs is not None and self.backend.outputs != len(self.tags):
            rows, outputs = len(self.tags), self.backend.outputs
            raise BadInput(f"{self.path}: {rows} rows in selected_tags.csv, {outputs} outputs in the network.")
        needed = {tag.category for tag in self.tags} - {"rating"}
        found = thresholds if thresholds is not None else self._stated_thresholds(needed)
        origin = key if thresholds is not None else f"{self.path}/thresholds.json"
        if not needed <= found.keys():
            raise BadSetting(f"{origin}: thresholds are needed for {sorted(needed)}, found {sorted(found)}.")
        self.thresholds = {category: _threshold(found[category], category, origin) for category in sorted(needed)}
        self.known = {tag.name: k for k, tag in enumerate(self.tags) if tag.category != "rating"}
        """Tag name to output, in the order of the csv; ratings are no tags."""
        self.ratings = {tag.name: k for k, tag in enumerate(self.tags) if tag.category == "rating"}
        self.fingerprint: Mapping[str, Any] = {
            **self.backend.fingerprint,
            "tags": file_digest(listed),
            "thresholds": self.thresholds,
        }

    def threshold(self, tag: str) -> float:
        return self.thresholds[self.tags[self.known[tag]].category]

    def probabilities(self, pixels: Sequence[Pixels]) -> Floats:
        """Probability of every output for pictures of any size, uint8 RGB: (n, T)."""
        found = self.backend(pixels)
        if not np.isfinite(found).all():
            broken = np.flatnonzero(~np.isfinite(found).all(1)).tolist()
            raise BadInput(
                f"The tagger {self.path} gives NaN for pictures {broken[:4]} of the batch: look at its weights."
            )
        return found

    def _stated_thresholds(self, needed: Iterable[str]) -> dict[str, float]:
        file = self.path / "thresholds.json"
        if file.is_file():
            return read_json(file)
        config = self.path / "config.json"
        about = read_json(config) if config.is_file() else {}
        for start, value in CARD_THRESHOLDS.items():
            if about.get("num_classes") == WD_V3_TAGS and str(about.get("architecture")).startswith(start):
                return dict.fromkeys(needed, value)
        raise MissingObject(
            f"The tagger {self.path} lacks thresholds.json.\n"
            "Take its model card's value (there precision equals recall), for example\n"
            f"  '{self._key}={{{', '.join(f'{category}: 0.35' for category in sorted(needed))}}}'"
        )


def _threshold(value: object, category: str, origin: str) -> float:
    if not isinstance(value, int | float) or not 0 < value < 1:
        raise BadSetting(f"{origin}: the threshold of '{category}' must lie between 0 and 1, found {value!r}.")
    return float(value)


def prepare(pixels: Pixels, size: tuple[int, int], interpolation: str) -> npt.NDArray[np.float32]:
    """uint8 RGB to what WD networks are shown: a white square, resized, BGR, (height, width, 3), 0 to 255."""
    height, width, _ = pixels.shape
    side = max(height, width)
    square = np.full((side, side, 3), 255, dtype=np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = pixels
    image = Image.fromarray(square)
    if image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), _FILTERS[interpolation])
    return np.asarray(image, dtype=np.float32)[:, :, ::-1]


class TimmTagger:
    """WD v3 through timm: normalised NCHW, sigmoid outside."""

    def __init__(self, folder: TimmFolder, device: str) -> None:
        self.folder = folder
        self.size = folder.size
        self.outputs: int | None = int(folder.network.num_classes)
        self._device = device
        self.fingerprint: Mapping[str, Any] = {
            **folder.fingerprint,
            "preprocessing": f"white pad to square, PIL {folder.interpolation} to {folder.size}, BGR",
        }

    def __call__(self, pixels: Sequence[Pixels]) -> Floats:
        batch = torch.from_numpy(np.stack([self.prepare(picture) for picture in pixels]))
        with scoring_mode():
            logits: torch.Tensor = self.folder.network(batch.to(self._device))
        probabilities: Floats = logits.float().sigmoid().double().cpu().numpy()
        return probabilities

    def prepare(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """uint8 RGB (height, width, 3) to BGR (3, size, size): mean and std stand in RGB order, the swap is last."""
        scaled = prepare(pixels, self.size, self.folder.interpolation)[:, :, ::-1] / 255
        normal = (scaled - np.array(self.folder.mean, np.float32)) / np.array(self.folder.std, np.float32)
        return np.ascontiguousarray(normal[:, :, ::-1].transpose(2, 0, 1))


class OnnxTagger:
    """WD through onnxruntime (the extra `onnx`): NHWC, BGR, 0–255 in float32, sigmoid inside the graph."""

    def __init__(self, file: Path, device: str) -> None:
        try:
            import onnxruntime  # type: ignore[import-untyped,unused-ignore]
        except ImportError as error:
            raise BadSetting(
                f"{file} needs onnxruntime: pip install 'ambergrade[onnx]'.\nOr use a folder with model.safetensors."
            ) from error
        wanted = ["CUDAExecutionProvider"] if device.startswith("cuda") else []
        providers = [
            name for name in [*wanted, "CPUExecutionProvider"] if name in onnxruntime.get_available_providers()
        ]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=providers)
        except Exception as error:  # onnxruntime's own exceptions share no base class but this
            raise BadInput(f"onnxruntime cannot load {file}:\n{str(error)[:400]}") from error
        given = self._session.get_inputs()[0]
        if len(given.shape) != 4 or given.shape[3] != 3:
            raise BadInput(f"{file} reads {given.shape}; a WD tagger reads (n, height, width, 3).")
        self._input = given.name
        self.size = int(given.shape[1]), int(given.shape[2])
        outputs = self._session.get_outputs()[0].shape[-1]
        self.outputs = outputs if isinstance(outputs, int) else None
        self._one_by_one = isinstance(given.shape[0], int)  # v2 graphs have a fixed batch of one
        self.fingerprint: Mapping[str, Any] = {
            "weights": _all_weights(file),
            "preprocessing": f"white pad to square, PIL bicubic to {self.size}, BGR, 0-255",
            **library_versions("onnxruntime", "pillow"),
        }

    def __call__(self, pixels: Sequence[Pixels]) -> Floats:
        batch = np.stack([prepare(picture, self.size, "bicubic") for picture in pixels])
        parts = [batch[k : k + 1] for k in range(len(batch))] if self._one_by_one else [batch]
        found = np.concatenate([self._session.run(None, {self._input: part})[0] for part in parts])
        if found.min() < 0 or found.max() > 1:
            raise BadInput(
                f"This ONNX tagger answers {found.min():.3g} to {found.max():.3g}, which are no probabilities."
            )
        return found.astype(np.float64)


def _all_weights(file: Path) -> str:
    """Digest of an ONNX file, and of all others in its folder where there are any: tensors may lie outside the graph.

    A graph names files for its large tensors, under any name. The tables that have digests of their own are left out.
    """
    own = {file.parent / name for name in ("selected_tags.csv", "thresholds.json", "rates.csv")} | {file}
    others = sorted(path for path in file.parent.rglob("*") if path.is_file() and path not in own)
    if not others:
        return file_digest(file)
    return digest([[path.relative_to(file.parent).as_posix(), file_digest(path)] for path in (file, *others)])


def rates_of(
    tagger: Tagger, batches: Iterable[tuple[Sequence[Pixels], Sequence[Sequence[str]]]]
) -> list[dict[str, Any]]:
    """True and false positive rates of every tag, measured on pictures whose tags are known.

    `batches` are (pictures, tags of each). One row a tag that some but not all pictures have: tag, tpr, fpr, pictures.
    """
    seen: list[npt.NDArray[np.bool_]] = []
    truth: list[npt.NDArray[np.bool_]] = []
    names = [*tagger.known]
    for pixels, tags in batches:
        p = tagger.probabilities(pixels)[:, [tagger.known[name] for name in names]]
        seen.append(p > np.array([tagger.threshold(name) for name in names]))
        truth.append(np.array([[name in asked for name in names] for asked in map(set, tags)]))
    if not seen:
        raise BadInput("A tagger is calibrated on pictures with known tags; there were none.")
    hit, real = np.concatenate(seen), np.concatenate(truth)
    return [
        {
            "tag": name,
            "tpr": float(hit[real[:, k], k].mean()),
            "fpr": float(hit[~real[:, k], k].mean()),
            "pictures": int(real[:, k].sum()),
            "without": int((~real[:, k]).sum()),
        }
        for k, name in enumerate(names)
        if real[:, k].any() and not real[:, k].all()
    ]


def write_rates(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """rates.csv: tag,tpr,fpr,pictures,without."""
    with written_aside(path) as aside, aside.open("w", newline="") as file:
        table = csv.DictWriter(file, ["tag", "tpr", "fpr", "pictures", "without"], lineterminator="\n")
        table.writeheader()
        for row in rows:
            table.writerow({**row, "tpr": f"{row['tpr']:.4f}", "fpr": f"{row['fpr']:.4f}"})


def read_rates(path: Path) -> dict[str, list[float]]:
    """Tag to [tpr, fpr, pictures with it, pictures without it] of a rates.csv; raises BadInput for another file."""
    rows = _rows(path, ("tag", "tpr", "fpr", "pictures"))
    found = {}
    try:
        most = max(float(row["pictures"]) for row in rows)
        for row in rows:
            tpr, fpr, pictures = (float(row[key]) for key in ("tpr", "fpr", "pictures"))
            if not (0 <= tpr <= 1 and 0 <= fpr <= 1 and 0 < pictures < math.inf):
                raise ValueError(f"tag '{row['tag']}' has tpr {tpr}, fpr {fpr}, {pictures} pictures")
            found[row["tag"]] = [tpr, fpr, pictures, float(row.get("without") or most)]
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path} holds a value that is no rate: {error}.") from error
    return found


def _open(path: Path, device: str) -> _Backend:
    if (path / "model.safetensors").is_file() or not (path / "model.onnx").is_file():
        return TimmTagger(load_timm(str(path), device=device), device)
    return OnnxTagger(path / "model.onnx", device)


def _read_tags(path: Path) -> list[Tag]:
    rows = _rows(path, ("name", "category"))
    strange = sorted({str(row["category"]) for row in rows} - CATEGORIES.keys())
    if strange:
        raise BadInput(f"{path}: unknown categories {', '.join(strange)}; known are {', '.join(CATEGORIES)}.")
    try:
        return [Tag(row["name"], CATEGORIES[row["category"]], int(row.get("count") or 0)) for row in rows]
    except ValueError as error:
        raise BadInput(f"{path}: count must be a whole number: {error}.") from error


def _rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """The rows of a CSV file; raises BadInput unless all of them have the columns."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path} is not CSV in UTF-8: {error}.") from error
    if not rows or any(row.get(column) is None for row in rows for column in columns):
        raise BadInput(f"{path} must have the columns {','.join(columns)} in every row.")
    return rows
