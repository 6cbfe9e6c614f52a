"""What a checkpoint's weights predict, from every place where files say so: one reader for all rooms.

Places, from the most to the least trusted: empty tensors in the file (NoobAI's and ComfyUI's convention), the scheduler
of a diffusers folder, and `modelspec.prediction_type` of the header (Stability's ModelSpec 1.0.0, written by kohya).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambergrade.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor

MARKS: Mapping[str, tuple[str, Any]] = {
    "v_pred": ("prediction_type", "v_prediction"),
    "ztsnr": ("rescale_betas_zero_snr", True),
}
"""Empty tensors by which a single file says what its weights predict, and the scheduler's setting of each."""
_EDM = {"edm_vpred.sigma_max": "edm v", "edm_mean": "edm"}
"""ComfyUI's keys for models that predict in the terms of Karras et al. 2022."""
_WORDS = {
    **dict.fromkeys(("epsilon", "eps"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v-prediction", "v_pred"), "v"),
    **dict.fromkeys(("flow", "flow_prediction", "flow_matching", "rectified_flow"), "flow"),
}


def prediction_type(
    keys: Collection[str], metadata: Mapping[str, str] | None = None, scheduler: Mapping[str, Any] | None = None
) -> str | None:
    """`epsilon`, `v`, `flow`, or the file's own word for something else; None where nothing says.

    >>> prediction_type(["v_pred"]), prediction_type([], {"modelspec.prediction_type": "v"}), prediction_type([])
    ('v', 'v', None)
    """
    if "v_pred" in keys:
        return "v"
    for key, word in _EDM.items():
        if key in keys:
            return word
    scheduler = scheduler or {}
    if str(scheduler.get("_class_name", "")).startswith("FlowMatch"):
        return "flow"
    said = str(scheduler.get("prediction_type") or (metadata or {}).get("modelspec.prediction_type") or "")
    return _WORDS.get(said.lower(), said) or None


def lacking_marks(
    keys: Collection[str], metadata: Mapping[str, str] | None = None, scheduler: Mapping[str, Any] | None = None
) -> list[str]:
    """The marks that a single file of these weights should bear and does not, since another place says it."""
    found = {mark for mark in scheduler_marks(scheduler or {}) if mark != "v_pred"}
    if prediction_type(keys, metadata, scheduler) == "v":
        found.add("v_pred")
    return sorted(found - set(keys))


def scheduler_marks(scheduler: Mapping[str, Any]) -> list[str]:
    """The marks for what a folder says in its scheduler's config."""
    return [mark for mark, (key, value) in MARKS.items() if scheduler.get(key) == value]


def scheduler_settings(keys: Collection[str]) -> dict[str, Any]:
    """What a scheduler's config must say where a file has these keys."""
    return dict(MARKS[mark] for mark in MARKS if mark in keys)


def marks(scheduler: Mapping[str, Any]) -> dict[str, Tensor]:
    """The marks of a scheduler's config as tensors of a single file."""
    import torch

    return {mark: torch.empty(0) for mark in scheduler_marks(scheduler)}


def from_noise(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """The config with sampling from the schedule's last step where that is all noise (Lin et al. 2023, section 3.3)."""
    spacing = {"timestep_spacing": "trailing"} if scheduler.get("rescale_betas_zero_snr") else {}
    return {**scheduler, **spacing}


def read_scheduler(folder: Path) -> dict[str, Any]:
    """The scheduler's config of a diffusers folder; empty where there is none. Raises BadInput for no JSON object."""
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise BadInput(f"{path} is no JSON object. Fetch or write it again.")
    return config
