"""Trains the tiny scorers: a tagger (WD v3 folder), a feature extractor for FID and an open_clip model."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import open_clip
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ambergrade.identity import random_seed
from ambergrade.world import grammar, tokenizer
from ambergrade.world.corpus import Pixels
from ambergrade.world.grammar import Scene

LABELS: tuple[tuple[str, int], ...] = (
    *((name, 9) for name in grammar.RATING_NAMES),
    *((name, 0) for name in grammar.VISIBLE),
    *((name, 4) for name in grammar.CHARACTERS),
)
"""(tag, WD v3 category: 9 rating, 0 general, 4 character), in the order of the tagger's outputs."""

MEAN_STD = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def labels(scene: Scene) -> npt.NDArray[np.float32]:
    """Multi-hot over LABELS."""
    shown = {*grammar.visible_tags(scene), scene.rating, scene.character}
    return np.array([tag in shown for tag, _ in LABELS], dtype=np.float32)


def appearance(scene: Scene) -> npt.NDArray[np.float32]:
    """What the feature extractor is told of a picture, each 0–1: the tags, and the style and damage no tag shows."""
    style = [float(scene.artist == artist) for artist in grammar.ARTISTS]
    return np.concatenate([labels(scene), [scene.quality, (scene.year - 2004) / 20, *style]], dtype=np.float32)


def clip_words(scene: Scene) -> list[str]:
    """The words of a scene's caption, in order, as the CLIP model reads them."""
    ratings = {
        "general": ["safe"],
        "sensitive": ["sensitive"],
        "questionable": ["nsfw"],
        "explicit": ["explicit", "nsfw"],
    }
    tags = [tag for kind in ("character", "copyright", "artist", "general") for tag in grammar.tags(scene)[kind]]
    return [tag.replace("_", " ") for tag in tags] + ratings[scene.rating]


def counts(truth: npt.NDArray[np.float32]) -> dict[str, int]:
    """Tag to number of pictures, of N × len(LABELS) multi-hot truth."""
    return {tag: int(truth[:, column].sum()) for column, (tag, _) in enumerate(LABELS)}


def balanced_thresholds(truth: npt.NDArray[np.float32], found: npt.NDArray[np.float32]) -> dict[str, float]:
    """Per category the threshold where micro precision equals recall, as WD v3's model cards state them."""
    thresholds = {}
    for name, category in (("general", 0), ("character", 4)):
        columns = [column for column, (_, kind) in enumerate(LABELS) if kind == category]
        scores = np.sort(found[:, columns].ravel())[::-1]
        thresholds[name] = round(float(scores[int(truth[:, columns].sum())]), 4)
    return thresholds


def rates(
    truth: npt.NDArray[np.float32], found: npt.NDArray[np.float32], thresholds: Mapping[str, float]
) -> list[tuple[str, float, float, int]]:
    """(tag, true positive rate, false positive rate, pictures with it) against the renderer's ground truth."""
    rows = []
    for column, (tag, category) in enumerate(LABELS):
        threshold = thresholds["character" if category == 4 else "general"]
        seen, real = found[:, column] > threshold, truth[:, column] > 0
        if real.any() and not real.all():
            rows.append((tag, float(seen[real].mean()), float(seen[~real].mean()), int(real.sum())))
    return rows


def write_rates(path: Path, rows: Sequence[tuple[str, float, float, int]]) -> None:
    """rates.csv: tag,tpr,fpr,pictures."""
    with path.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("tag", "tpr", "fpr", "pictures"))
        table.writerows((tag, f"{tpr:.4f}", f"{fpr:.4f}", n) for tag, tpr, fpr, n in rows)


def backbone(channels: Sequence[int], classes: int) -> nn.Module:
    """timm's resnet18, narrower."""
    model: nn.Module = timm.create_model("resnet18", num_classes=classes, channels=tuple(channels), layers=(1, 1, 1, 1))
    return model


def fit(
    model: nn.Module,
    pictures: Pixels,
    targets: npt.NDArray[np.float32],
    *,
    steps: int,
    seed: int,
    batch: int = 64,
    rate: float = 4e-3,
    weight: npt.NDArray[np.float32] | None = None,
    bgr: bool = False,
    soften: bool = True,
    name: str = "scorer",
) -> nn.Module:
    """Fit `model` by binary cross-entropy to multi-hot (or 0–1) `targets`, under small shifts and re-softening.

    `weight` (classes,) weighs the targets. A model that is told of damage must not be softened: blur is damage.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    weights = torch.from_numpy(weight) if weight is not None else None
    bar = tqdm(range(steps), name, unit="step", disable=None)
    model.train()
    for step in bar:
        chosen, pixels = augmented(pictures, seed, step, batch, soften=soften)
        pixels = pixels.flip(1) if bgr else pixels
        loss = F.binary_cross_entropy_with_logits(model(pixels), torch.from_numpy(targets[chosen]), weight=weights)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            bar.write(f"{name} step {step} loss {loss.item():.4f}")
    return model.eval()


def augmented(
    pictures: Pixels, seed: int, step: int, batch: int, *, soften: bool = True
) -> tuple[npt.NDArray[np.int64], Tensor]:
    """(indices, N × 3 × H × W in -1 … 1): a batch keyed by (seed, step), shifted by up to 6 pixels, half softened.

    Softening (down and up again by 1.3 to 2) is the blur a VAE leaves, so that generated pictures are read as well.
    """
    random = np.random.default_rng(random_seed(seed, "scorer batch", step))
    chosen = random.choice(len(pictures), batch, replace=False)
    pixels = torch.from_numpy(np.ascontiguousarray(pictures[chosen])).permute(0, 3, 1, 2).float() / 127.5 - 1
    dy, dx = (int(d) for d in random.integers(-6, 7, 2))
    pixels = F.pad(pixels, (6, 6, 6, 6), mode="replicate")[:, :, 6 + dy : 134 + dy, 6 + dx : 134 + dx]
    if not soften:
        return chosen, pixels
    half = batch // 2
    small = F.interpolate(pixels[:half], scale_factor=float(random.uniform(0.5, 0.77)), mode="area")
    softened = F.interpolate(small, size=pixels.shape[-2:], mode="bilinear", align_corners=False)
    return chosen, torch.cat([softened, pixels[half:]])


def scale_features(model: Any, pictures: Pixels) -> None:
    """Scale the last block's output, in place, so that a pooled feature's mean square is 1: KID's kernel expects it.

    The last operation before the pooling is a ReLU of a sum, so both addends (the block's last normalisation and its
    shortcut's) are scaled alike, and the classifier by the inverse.
    """
    with torch.inference_mode():
        batches = [
            model.forward_head(model.forward_features(_normalised(pictures[start : start + 100])), pre_logits=True)
            for start in range(0, len(pictures), 100)
        ]
        factor = 1 / torch.cat(batches).square().mean().sqrt()
    last = model.layer4[-1]
    with torch.no_grad():
        for norm in (last.bn2, last.downsample[-1]):
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
        model.fc.weight.div_(factor)


def _normalised(pictures: Pixels) -> Tensor:
    """N × H × W × 3 uint8 to N × 3 × H × W in -1 … 1."""
    return torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def outputs(model: nn.Module, pictures: Pixels, bgr: bool = False) -> npt.NDArray[np.float32]:
    """Sigmoid outputs, N × classes."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(pictures), 128):
            part = np.ascontiguousarray(pictures[start : start + 128])
            pixels = torch.from_numpy(part).permute(0, 3, 1, 2).float() / 127.5 - 1
            found.append(torch.sigmoid(model(pixels.flip(1) if bgr else pixels)).numpy())
    return np.concatenate(found)


def write_timm(folder: Path, model: nn.Module, channels: Sequence[int], classes: int) -> None:
    """config.json + model.safetensors (fp16) that timm loads through `local-dir:`, as WD v3 folders are."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": "resnet18",
        "num_classes": classes,
        "num_features": channels[-1],
        "model_args": {"channels": list(channels), "layers": [1, 1, 1, 1]},
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, 128, 128],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            **MEAN_STD,
            "num_classes": classes,
            "pool_size": None,
            "first_conv": "conv1",
            "classifier": "fc",
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_half(folder / "model.safetensors", model)


def save_half(path: Path, model: nn.Module) -> None:
    """State in fp16; counters (BatchNorm's num_batches_tracked) stay integers."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    save_file({k: v.contiguous() for k, v in state.items()}, path)


def write_tags(folder: Path, counts: Mapping[str, int], thresholds: Mapping[str, float]) -> None:
    """selected_tags.csv (tag_id,name,category,count, as WD v3) and thresholds.json per category."""
    with (folder / "selected_tags.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("tag_id", "name", "category", "count"))
        for number, (tag, category) in enumerate(LABELS):
            table.writerow((9999990 + number if category == 9 else number, tag, category, counts[tag]))
    (folder / "thresholds.json").write_text(json.dumps(thresholds, indent=2) + "\n")


def clip_config(width: int = 6) -> dict[str, Any]:
    """open_clip_config.json of the tiny CLIP: a ModifiedResNet over 128 px and a small text transformer."""
    words = len(tokenizer.build())
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {"image_size": 128, "layers": [1, 1, 1, 1], "width": width, "patch_size": None},
            "text_cfg": {
                "context_length": 77,
                "vocab_size": words,
                "width": 64,
                "heads": 2,
                "layers": 2,
                "hf_tokenizer_name": "local",
                "tokenizer_kwargs": {"clean": "whitespace"},
            },
        },
        "preprocess_cfg": {**MEAN_STD, "interpolation": "bicubic", "resize_mode": "squash"},
    }


def write_clip_shell(folder: Path) -> None:
    """Everything of the open_clip folder but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(clip_config(), indent=2) + "\n")
    tokenizer.build().save_pretrained(folder)


def fit_clip(
    folder: Path, pictures: Pixels, captions: Sequence[Sequence[str]], *, steps: int, seed: int, batch: int = 128
) -> Any:
    """Train the model of `folder` on (picture, tags) pairs by the symmetric InfoNCE loss (Radford et al. 2021)."""
    torch.manual_seed(random_seed(seed, "clip init"))
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", require_pretrained=False)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    model.train()
    bar = tqdm(range(steps), "clip", unit="step", disable=None)
    for step in bar:
        chosen, pixels = augmented(pictures, seed, step, batch)
        texts = []
        for index in chosen:
            random = np.random.default_rng(random_seed(seed, "clip caption", step, int(index)))
            tags = np.asarray(captions[int(index)], dtype=object)
            kept = tags[random.random(len(tags)) > 0.1]
            texts.append(", ".join(kept[random.permutation(len(kept))]))
        image, text, scale = model(pixels, tokens(texts))
        logits = scale * image @ text.T
        target = torch.arange(batch)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.logit_scale.data.clamp_(max=float(np.log(100)))
        if step % 50 == 0:
            bar.write(f"clip step {step} loss {loss.item():.4f}")
    return model.eval()


def retrieval_at_1(model: Any, folder: Path, pictures: Pixels, captions: Sequence[str]) -> float:
    """Share of captions whose nearest picture among all is their own."""
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")
    images, texts = [], []
    with torch.inference_mode():
        for start in range(0, len(pictures), 100):
            part = torch.from_numpy(np.ascontiguousarray(pictures[start : start + 100])).permute(0, 3, 1, 2)
            images.append(model.encode_image(part.float() / 127.5 - 1, normalize=True))
            texts.append(model.encode_text(tokens(list(captions[start : start + 100])), normalize=True))
    similarity = torch.cat(texts) @ torch.cat(images).T
    return float((similarity.argmax(1) == torch.arange(len(similarity))).float().mean())
