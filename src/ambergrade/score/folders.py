"""Finds a scorer's files, and loads timm folders (config.json + model.safetensors), as WD taggers ship."""

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
    path = scorer_path(source)
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


def scorer_path(source: str) -> Path:
    """The local path of a scorer: `builtin://name`, a path, or `hub://owner/name` from the model hub or its cache.

    Raises MissingObject where the hub cannot be reached and its cache does not hold the folder.
    """
    if not source.startswith("hub://"):
        return find_file(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name = source.removeprefix("hub://")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.csv", "*.safetensors", "*.onnx", "*.txt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise MissingObject(
            f"The hub folder '{name}' is neither in the local cache nor to be had: {str(error).splitlines()[0][:160]}\n"
            "Give the path of a local copy instead."
        ) from error


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
    """No gradients, and full fp32 whatever the caller set: TF32 moves features by 1e-3 (facts 5.20)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode(), torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
