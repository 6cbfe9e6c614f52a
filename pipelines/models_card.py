"""Measures the shipped models on scenes that nothing was trained on, and writes docs/models.md.

Run by `python pipelines/world.py build=card`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
from diffusers import AutoencoderKL

from ambergrade.config import REPOSITORY
from ambergrade.family import sdxl
from ambergrade.generate import stream
from ambergrade.nouns import PromptSet, SamplerSettings
from ambergrade.score.adherence import per_tag
from ambergrade.score.comparison import aggregates
from ambergrade.score.distances import frechet_distance
from ambergrade.score.features import Extractor
from ambergrade.score.folders import load_timm
from ambergrade.score.metrics.tag_adherence import TagAdherence
from ambergrade.score.scoring import score
from ambergrade.score.statistics import wilson_interval
from ambergrade.world import autoencoder, corpus, grammar, scorers
from ambergrade.world.booru import write_prompts

FIRST = 50_000
"""Scenes from here on were drawn for no training."""
SCENES, PROMPTS = 1000, 100


def write_models_card(settings: dict[str, Any]) -> None:
    """Measure and write; takes some minutes."""
    weights = Path(settings["out"])
    scenes = corpus.scenes(0, FIRST, SCENES)
    pictures = corpus.pictures(scenes, workers=settings["workers"])
    lines = [
        "# The shipped tiny models",
        "",
        "Written by `python pipelines/world.py build=card`: every number is measured on scenes and prompts that no",
        "model was trained on. `python pipelines/world.py build=<what>` rebuilds each (see conf/world.yaml).",
        "",
        "| model | rebuilt by | measured | figure |",
        "|---|---|---|---|",
        *_scorer_rows(weights, scenes, pictures),
        *_picture_rows(settings, weights),
        "",
        "## Tagger, against the renderer's ground truth",
        "",
        f"On {SCENES} drawn pictures, at the thresholds of `thresholds.json`.",
        "",
        *_rate_table(weights, scenes, pictures),
    ]
    (REPOSITORY / "docs" / "models.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[:24]))


def _scorer_rows(weights: Path, scenes: list[grammar.Scene], pictures: corpus.Pixels) -> list[str]:
    from sklearn.metrics import average_precision_score

    networks = sdxl.load(weights / "beta7.safetensors", weights / "sdxl_tiny")
    vae: AutoencoderKL = networks.vae
    clean = np.array([scene.quality > 0.75 for scene in scenes])
    psnr, psnr_clean = autoencoder.psnr(vae, pictures[:300]), autoencoder.psnr(vae, pictures[clean][:200])
    tagger = TagAdherence(str(weights / "tagger"))
    found, truth = tagger.probabilities(list(pictures)), np.stack([scorers.labels(scene) for scene in scenes])
    seen = np.flatnonzero(truth.any(axis=0))
    precision = [float(average_precision_score(truth[:, i], found[:, i])) for i in seen]
    worst = scorers.LABELS[int(seen[int(np.argmin(precision))])][0]
    drawn = [value for value, i in zip(precision, seen, strict=True) if scorers.LABELS[int(i)][1] != 9]
    folder = weights / "clip"
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", require_pretrained=True)
    captions = [", ".join(scorers.clip_words(scene)) for scene in scenes[:500]]
    first = scorers.retrieval_at_1(clip.eval(), folder, pictures[:500], captions)
    same, damaged = _distances(weights, scenes, pictures)
    return [
        f"| VAE (in every checkpoint) | `vae` | PSNR of encode → decode, 300 pictures | {psnr:.1f} dB |",
        f"| | | the same, undamaged pictures only | {psnr_clean:.1f} dB |",
        f"| `tagger` | `tagger` | mAP over {len(seen)} tags, {SCENES} pictures | {np.mean(precision):.4f} |",
        f"| | | mAP without the four ratings | {np.mean(drawn):.4f} |",
        f"| | | lowest AP of a tag | {min(precision):.3f} (`{worst}`) |",
        f"| `clip` | `clip` | text–image R@1 among 500 pairs | {first:.3f} |",
        f"| `features` | `features` | FD of two halves of the undamaged pictures | {same:.3f} |",
        f"| | | FD of undamaged against damaged pictures | {damaged:.3f} |",
    ]


def _distances(weights: Path, scenes: list[grammar.Scene], pictures: corpus.Pixels) -> tuple[float, float]:
    """Fréchet distances within the undamaged, and from the undamaged to the damaged."""
    import torch

    extractor = Extractor(load_timm(str(weights / "features")))
    with torch.inference_mode():
        batches = [
            extractor(torch.from_numpy(np.array(pictures[start : start + 100])).permute(0, 3, 1, 2))
            for start in range(0, len(pictures), 100)
        ]
    features = torch.cat(batches).double().numpy()
    quality = np.array([scene.quality for scene in scenes])
    clean, damaged = features[quality > 0.75], features[quality < 0.25]
    n = min(len(clean) // 2, len(damaged))  # one n for both: the distance's bias goes with it
    parts = (clean[::2][:n], clean[1::2][:n], damaged[:n])
    one, other, bad = [(part.mean(axis=0), np.cov(part.T)) for part in parts]
    return float(frechet_distance(*one, *other)), float(frechet_distance(*one, *bad))


def _picture_rows(settings: dict[str, Any], weights: Path) -> list[str]:
    """Macro tag recall of each checkpoint's pictures, with and without the tags that uploaders guessed."""
    skills = {"dragon": grammar.DRAGON, "accessories": grammar.ACCESSORIES}
    known = [tag for tag in grammar.VISIBLE if tag not in (*grammar.DRAGON, *grammar.ACCESSORIES)]
    metric = TagAdherence(str(weights / "tagger"), groups={**skills, "captioned": known})
    sampler = SamplerSettings(**settings["sampler"])
    with tempfile.TemporaryDirectory() as folder:
        write_prompts(Path(folder) / "card.jsonl", seed=99, count=PROMPTS)
        prompts = PromptSet.read(Path(folder) / "card.jsonl")
    rows = []
    for name in ("beta7", "anxl2", "anxl3"):
        networks = sdxl.load(weights / f"{name}.safetensors", weights / "sdxl_tiny")
        sheet = score(stream.pictures(networks, prompts, sampler, progress=name), prompts, [metric], sampler=sampler)
        found = aggregates(sheet)
        build = "beta7" if name == "beta7" else "anxl"
        for column, what in (
            ("tag_macro_recall", "macro tag recall, all tags"),
            ("tag_macro_recall_captioned", "without the guessed tags"),
            ("tag_macro_recall_dragon", "dragon horns and tail"),
            ("tag_macro_recall_accessories", "accessories"),
        ):
            value = found[column]
            first = f"| `{name}` | `{build}` |" if column == "tag_macro_recall" else "| | |"
            rows.append(f"{first} {what}, {PROMPTS} prompts | {value.value:.3f} [{value.low:.3f}, {value.high:.3f}] |")
        if name == "beta7":
            weak = sorted(per_tag(sheet), key=lambda row: row["recall"])[:5]
            told = ", ".join(f"`{row['tag']}` {row['recall']:.2f}" for row in weak)
            rows.append(f"| | | its weakest tags | {told} |")
    return rows


def _rate_table(weights: Path, scenes: list[grammar.Scene], pictures: corpus.Pixels) -> list[str]:
    import json

    truth = np.stack([scorers.labels(scene) for scene in scenes])
    found = TagAdherence(str(weights / "tagger")).probabilities(list(pictures)).astype(np.float32)
    thresholds = json.loads((weights / "tagger" / "thresholds.json").read_text())
    rows = ["| tag | TPR [Wilson 95 %] | FPR | pictures |", "|---|---|---|---|"]
    for tag, tpr, fpr, n in scorers.rates(truth, found, thresholds):
        low, high = wilson_interval(np.array([round(tpr * n)]), np.array([n]))
        rows.append(f"| `{tag}` | {tpr:.3f} [{float(low[0]):.3f}, {float(high[0]):.3f}] | {fpr:.4f} | {n} |")
    return rows
