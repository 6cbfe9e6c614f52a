"""Loads a scorer's network from a timm folder (config.json + model.safetensors), as WD taggers ship."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch

from ambergrade.errors import BadInput, MissingObject
from ambergrade.identity import file_digest
from ambergrade.store import find_file


@dataclass(frozen=True)
class TimmFolder:
    """A network and how its pictures must be prepared."""

    path: Path
    network: Any
    """A timm model in eval mode: num_classes, forward_features, forward_head(x, pre_logits=True)."""
    size: tuple[int, int]
    """(height, width) of the input, pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    fingerprint: Mapping[str, Any]


def load_timm(source: str, *, device: str = "cpu") -> TimmFolder:
    """Load `builtin://name` or a local folder through timm's `local-dir:`.

    Architecture, model_args, num_classes, input size, mean and std all come from the folder's config.json.
    Raises MissingObject or BadInput for a folder without safetensors weights or of another shape.
    """
    path = find_file(source)
    weights = require_files(path, "config.json", "model.safetensors")[1]
    try:
        network = timm.create_model(f"local-dir:{path}", pretrained=True).eval().requires_grad_(False).to(device)
    except (RuntimeError, KeyError) as error:
        raise BadInput(f"timm cannot load {path}:\n{str(error)[:400]}") from error
    config = network.pretrained_cfg
    fingerprint = {
        "weights": file_digest(weights),
        "config": file_digest(path / "config.json"),
        **library_versions("timm", "torch", "torchvision"),
    }
    return TimmFolder(
        path,
        network,
        tuple(config["input_size"][1:]),
        config["mean"],
        config["std"],
        config["interpolation"],
        fingerprint,
    )


def require_files(folder: Path, *names: str) -> list[Path]:
    """The files `names` of a folder; raises MissingObject naming those that are not there."""
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        found = sorted(p.name for p in folder.iterdir())[:12] if folder.is_dir() else []
        raise MissingObject(
            f"The scorer folder {folder} lacks {', '.join(missing)}.\n"
            f"Found: {', '.join(found) or 'nothing'}.\nPickled weights are not read: convert them to safetensors."
        )
    return [folder / name for name in names]


def library_versions(*packages: str) -> dict[str, str]:
    """Versions that may change a score's digits."""
    return {package: version(package) for package in packages}


@contextmanager
def scoring_mode() -> Iterator[None]:
    """No gradients, and full fp32 in cuDNN: TF32 moves features by 1e-3 (facts 5.20)."""
    with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
        yield
