"""Aesthetic: how good a picture looks without its prompt, by a head on CLIP embeddings or by a network of grades."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ambergrade.errors import BadInput, BadSetting
from ambergrade.family.files import read_tensors
from ambergrade.identity import file_digest
from ambergrade.nouns import Picture, Prompt
from ambergrade.score.scoring import Metric
from ambergrade.store import find_file

if TYPE_CHECKING:
    from torch import Tensor, nn

ACTIVATIONS = ("none", "relu")


class Aesthetic(Metric):
    """`aesthetic`: with `head`, a perceptron on an open_clip folder's unit embeddings (LAION's, waifu-scorer's).

    Without it, `model` is a timm folder whose outputs are grades (deepghs' anime_aesthetic): the expected grade
    Σ g_i·p_i, with g_i counted up from 0 unless `grades` says otherwise.
    """

    name = "aesthetic"
    columns: Mapping[str, bool] = {"aesthetic": True}
    needs_prompts = False

    def __init__(
        self,
        model: str,
        head: str | None = None,
        activation: str = "none",
        grades: Sequence[float] | None = None,
        resize_mode: str = "shortest",
        device: str = "cpu",
    ) -> None:
        """`head`: a .safetensors of linear layers and batch norms (`layers.0.weight`, …; or `weight`, `bias`).

        `activation` follows every linear layer but the last: `none` as LAION's, `relu` as waifu-scorer's; weights do
        not tell.
        """
        if activation not in ACTIVATIONS:
            raise BadSetting(f"activation '{activation}' is not known.\nKnown: {', '.join(ACTIVATIONS)}")
        if head is None:
            self._score, made = _graded(model, grades, device)
        else:
            self._score, made = _headed(model, find_file(head), activation, resize_mode, device)
        self.fingerprint: Mapping[str, Any] = made

    def rows(self, pictures: Sequence[Picture], prompts: Mapping[str, Prompt]) -> Mapping[str, npt.NDArray[Any]]:
        """(n,) in the head's or the grades' own unit."""
        return {"aesthetic": self._score([picture.pixels for picture in pictures])}


def _graded(model: str, grades: Sequence[float] | None, device: str) -> tuple[Any, dict[str, Any]]:
    import torch

    from ambergrade.score.features import Extractor, by_shape
    from ambergrade.score.folders import load_timm, scorer_path

    if (scorer_path(model) / "open_clip_config.json").is_file():
        raise BadSetting(f"{model} is a CLIP, which has no grades of its own.\nName its head: head=FILE.safetensors")
    folder = load_timm(model, device=device)
    classes = int(folder.network.num_classes)
    values = [float(k) for k in range(classes)] if grades is None else [float(value) for value in grades]
    if len(values) != classes:
        raise BadSetting(f"{model} has {classes} outputs, but {len(values)} grades are given.")
    extractor, worth = Extractor(folder).eval(), torch.tensor(values, device=device)

    def network(pixels: Tensor) -> Tensor:
        shares: Tensor = extractor.network(extractor.prepared(pixels)).float().softmax(1)
        return (shares * worth).sum(1, keepdim=True)

    preparing = f"RGB, antialiased {folder.interpolation} to {folder.size}, squashed, not quantised"
    made = {**folder.fingerprint, "grades": values, "preprocessing": preparing}
    return lambda pixels: by_shape(pixels, network, torch.device(device))[:, 0].astype(np.float64), made


def _headed(model: str, file: Path, activation: str, resize_mode: str, device: str) -> tuple[Any, dict[str, Any]]:
    import torch

    from ambergrade.score.clip import open_clip_folder

    clip = open_clip_folder(model, resize_mode, device=device)
    head = perceptron(file, activation).to(device)
    width = next(head.parameters()).shape[1]
    dimensions = int(clip.text("").shape[0])
    if width != dimensions:
        raise BadInput(f"{file} reads {width} numbers, the embeddings of {model} have {dimensions}.")

    def score(pixels: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float64]:
        embeddings = clip.images(pixels)
        with torch.inference_mode():
            found: Tensor = head(embeddings.float())
        return np.asarray(found[:, 0].double().cpu().numpy())

    return score, {**clip.fingerprint, "head": file_digest(file), "activation": activation}


def perceptron(file: Path, activation: str) -> nn.Sequential:
    """The layers of a state dict in the order of their numbers, in eval mode. Raises BadInput for other tensors."""
    import torch
    from torch import nn

    state = {key: value.float() for key, value in read_tensors(file).items()}
    if state.keys() <= {"weight", "bias"}:
        state = {f"layers.0.{key}": value for key, value in state.items()}
    numbers: dict[int, dict[str, Tensor]] = {}
    for key, value in state.items():
        parts = key.split(".")
        if len(parts) < 3 or not parts[-2].isdigit():
            raise BadInput(f"{file}: '{key}' is no layer's tensor; a head holds layers.<number>.weight and .bias.")
        numbers.setdefault(int(parts[-2]), {})[parts[-1]] = value
    linear = [number for number, found in numbers.items() if "weight" in found and found["weight"].ndim == 2]
    if not linear or numbers[max(linear)]["weight"].shape[0] != 1:
        raise BadInput(f"{file} is no head: its last linear layer must give one number.")
    made: list[nn.Module] = []
    for number, found in sorted(numbers.items()):
        if number in linear:
            rows, columns = found["weight"].shape
            layer: nn.Module = nn.Linear(columns, rows, bias="bias" in found)
        elif "running_mean" in found:
            layer = nn.BatchNorm1d(len(found["running_mean"]))
            found.setdefault("num_batches_tracked", torch.tensor(0))
        else:
            raise BadInput(f"{file}: layer {number} with {sorted(found)} is neither linear nor a batch norm.")
        layer.load_state_dict(found)
        made.append(layer)
        if number in linear and number != max(linear) and activation == "relu":
            made.append(nn.ReLU())
    return nn.Sequential(*made).eval().requires_grad_(False)
