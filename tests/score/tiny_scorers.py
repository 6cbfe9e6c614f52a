"""Tiny random scorers, in the same files as the real ones: made from nothing, in a second."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

TAGS = (
    ("general", 9),
    ("sensitive", 9),
    ("questionable", 9),
    ("explicit", 9),
    ("1girl", 0),
    ("red_hair", 0),
    ("green_hair", 0),
    ("blue_hair", 0),
    (">_<", 0),
    ("kohaku_(world)", 4),
)
CHANNELS = (8, 16, 24, 32)


def make_timm(folder: Path, classes: int, size: int = 32, seed: int = 0) -> Path:
    """A random resnet10t, narrowed through model_args; 32 penultimate features."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    model_args: dict[str, Any] = {"channels": list(CHANNELS), "stem_width": 8}
    model = timm.create_model("resnet10t", num_classes=classes, **model_args)
    for module in model.modules():  # a fresh batch norm passes activations nearly unchanged in scale: mix them
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.weight, 1.0, 0.3)
            torch.nn.init.normal_(module.bias, 0.0, 0.3)
    torch.nn.init.normal_(model.fc.weight, 0.0, 1.0)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "resnet10t",
        "num_classes": classes,
        "num_features": CHANNELS[-1],
        "model_args": model_args,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, size, size],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_classes": classes,
            "pool_size": None,
            "first_conv": "conv1.0",
            "classifier": "fc",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_tagger(folder: Path, tags: Sequence[tuple[str, int]] = TAGS, size: int = 32, seed: int = 0) -> Path:
    """WD v3 layout."""
    make_timm(folder, len(tags), size, seed)
    lines = [f"{number},{name},{category},{1000 - number}" for number, (name, category) in enumerate(tags)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *lines]) + "\n")
    (folder / "thresholds.json").write_text('{"general": 0.4, "character": 0.6}')
    return folder


def make_clip(folder: Path, size: int = 32, seed: int = 0) -> Path:
    """A random open_clip CLIP with OpenAI's vocabulary."""
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    model_cfg: dict[str, Any] = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": size, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    model = open_clip.CLIP(**model_cfg)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "interpolation": "bicubic"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess}))
    return folder


def make_pictures(folder: Path, count: int, size: tuple[int, int] = (40, 32), seed: int = 0) -> Path:
    """`count` noise pictures in `folder`/pictures, listed in `folder`/reference.txt."""
    rng = np.random.default_rng(seed)
    (folder / "pictures").mkdir(parents=True)
    names = [f"{number:03}.png" for number in range(count)]
    for name in names:
        flat = rng.integers(0, 256, size=(1, 1, 3)) + rng.normal(0, 40, size=(size[1], size[0], 3))
        Image.fromarray(flat.clip(0, 255).astype(np.uint8)).save(folder / "pictures" / name)
    (folder / "reference.txt").write_text("\n".join(names) + "\n")
    return folder / "reference.txt"


def onnx_weights() -> np.ndarray:
    """(3, 10): the linear tagger's weights on the mean colour (BGR)."""
    return np.random.default_rng(3).normal(0, 2, (3, len(TAGS))).astype(np.float32)


def make_onnx_tagger(folder: Path, onnx: Any) -> Path:
    """WD's ONNX layout with a linear network in it: (n, 32, 32, 3) BGR 0-255 in, probabilities out."""
    folder.mkdir(parents=True)
    helper, number = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("ReduceMean", ["input"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("Div", ["mean", "half"], ["scaled"]),
        helper.make_node("Sub", ["scaled", "one"], ["centred"]),
        helper.make_node("MatMul", ["centred", "weight"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["output"]),
    ]
    constants = {"half": np.float32([127.5]), "one": np.float32([1]), "weight": onnx_weights()}
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("input", number, ["batch", 32, 32, 3])],
        [helper.make_tensor_value_info("output", number, ["batch", len(TAGS)])],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    lines = [f"{number},{name},{category},{1000 - number}" for number, (name, category) in enumerate(TAGS)]
    (folder / "selected_tags.csv").write_text("\n".join(["tag_id,name,category,count", *lines]) + "\n")
    (folder / "thresholds.json").write_text('{"general": 0.4, "character": 0.6}')
    return folder
