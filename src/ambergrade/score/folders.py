"""Finds a scorer's files, and loads timm folders (config.json + model.safetensors), as WD taggers ship.

A folder may come from anybody. Only its weights, its tables and a checked copy of its config reach a library, so no
key of a config can run code, read another file or ask a network.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
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


BUILD_ERRORS = (RuntimeError, LookupError, TypeError, ValueError, AttributeError, AssertionError, ArithmeticError)
"""What timm and open_clip raise for a config that fits no network."""
HUB_FILES = ["*.json", "*.csv", "*.safetensors", "*.onnx", "*.onnx_data", "*.txt"]
"""What is fetched of a folder on the hub: no code and no pickles."""
_NOT_A_NETWORKS = ("pretrained", "checkpoint_path", "cache_dir", "features_only", "feature_cls", "pruned")
"""Beginnings of names in `model_args` that choose where weights come from, not what the network is."""


def load_timm(source: str, *, device: str = "cpu") -> TimmFolder:
    """Load `builtin://name` or a local folder through timm's `local-dir:`.

    Architecture, model_args, num_classes, input size, mean and std all come from the folder's config.json.
    Raises MissingObject or BadInput for a folder without safetensors weights or of another shape, and BadInput for a
    config that names weights of another place.
    """
    path = scorer_path(source)
    listed, weights = require_files(path, "config.json", "model.safetensors")
    about = read_json(listed)
    architecture, arguments = about.get("architecture"), about.get("model_args") or {}
    if not isinstance(architecture, str) or not timm.is_model(architecture):
        raise BadInput(f"{listed}: architecture {architecture!r} is no network of timm {version('timm')}.")
    if not isinstance(arguments, dict):
        raise BadInput(f"{listed}: model_args must be an object, found {str(arguments)[:60]}.")
    refuse_keys(listed, "model_args", [key for key in arguments if key.startswith(_NOT_A_NETWORKS)])
    try:
        with only_these("config.json", about, weights) as folder:
            network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    except BUILD_ERRORS as error:
        raise BadInput(f"timm cannot load {path}:\n{str(error)[:400]}") from error
    network.requires_grad_(False).to(device)
    config = network.pretrained_cfg
    fingerprint = {
        "weights": file_digest(weights),
        "config": file_digest(listed),
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


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises BadInput for text that is no JSON, or JSON that is no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise BadInput(f"{path} must hold a JSON object, found {type(found).__name__}.")
    return found


def refuse_keys(file: Path, where: str, keys: list[str]) -> None:
    """Raise BadInput naming settings of a downloaded config that choose code, files or a network address."""
    if keys:
        raise BadInput(
            f"{file}: {where} sets {', '.join(sorted(keys))}, which could run code or read other files.\n"
            "Take the setting out if you trust the folder, or use another one."
        )


@contextmanager
def only_these(name: str, config: Mapping[str, Any], weights: Path) -> Iterator[Path]:
    """A temporary folder that holds a checked config and a link to one weight file, and nothing else to be loaded."""
    with TemporaryDirectory(prefix="ambergrade-") as made:
        folder = Path(made)
        (folder / name).write_text(json.dumps(config), encoding="utf-8")
        (folder / "model.safetensors").symlink_to(weights.resolve())
        yield folder


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
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
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
    """No gradients, and full fp32: TF32 moves features by 1e-3 (facts 5.20).

    The switches are the whole process's. They are left alone where they are set already, as `generate.fast` sets them
    for as long as another thread draws.
    """
    before, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    changes = before != "highest" or tf32
    if changes:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.inference_mode():
            yield
    finally:
        if changes:
            torch.set_float32_matmul_precision(before)
            torch.backends.cudnn.allow_tf32 = tf32
