"""Measures the shipped models on scenes that nothing was trained on, and writes docs/models.md.

Run by `python pipelines/world.py build=card`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from diffusers import AutoencoderKL

from ambergrade.family import sdxl
from ambergrade.generate import stream
from ambergrade.nouns import Measurement, PromptSet, SamplerSettings
from ambergrade.places import CHECKOUT
from ambergrade.score.adherence import Tables, per_tag
from ambergrade.score.comparison import aggregates
from ambergrade.score.distances import frechet_groups
from ambergrade.score.features import Extractor
from ambergrade.score.folders import load_timm
from ambergrade.score.metrics.tag_adherence import TagAdherence
from ambergrade.score.scoring import score
from ambergrade.score.sheet import ScoreSheet
from ambergrade.score.statistics import Floats, jackknife_corrected, mean_interval, wilson_interval
from ambergrade.world import autoencoder, corpus, grammar, scorers
from ambergrade.world.booru import write_prompts

FIRST = 50_000
"""Scenes from here on were drawn for no training."""
SCENES, PROMPTS, REFERENCES = 1000, 100, 384
GROUPS = 50
"""Groups of the jackknife that takes the bias out of a Fréchet distance."""
SKILLS = {"dragon": grammar.DRAGON, "accessories": grammar.ACCESSORIES}


def write_models_card(weights: Path, sampler: SamplerSettings, workers: int) -> None:
    """Measure what stands in `weights`, and write; takes some minutes."""
    scenes = corpus.scenes(0, FIRST, SCENES)
    pictures = corpus.pictures(scenes, workers=workers)
    sheets = {name: _sheet(weights, sampler, name) for name in ("beta7", "anxl2", "anxl3")}
    lines = [
        "# The shipped tiny models",
        "",
        "Written by `python pipelines/world.py build=card`: every number is measured on scenes and prompts that no",
        "model was trained on. `python pipelines/world.py build=<what>` rebuilds each (see conf/world.yaml).",
        "",
        "| model | rebuilt by | measured | figure | target |",
        "|---|---|---|---|---|",
        *_vae_rows(weights, workers, scenes, pictures),
        *_scorer_rows(weights, scenes, pictures),
        *(row for name, sheet in sheets.items() for row in _recall_rows(name, sheet)),
        "",
        "## Skills that answer to the tag",
        "",
        f"Mean probability of a skill's tags where a prompt asks for them and where it does not; {PROMPTS} prompts, "
        f"guidance {sampler.guidance:g}.",
        "base7, and what a merge makes of the skills, are measured by every `make demo`.",
        "",
        *_skill_table(sheets),
        "",
        "## Tagger, against the renderer's ground truth",
        "",
        f"On {SCENES} drawn pictures, at the thresholds of `thresholds.json`.",
        "",
        *_rate_table(weights, scenes, pictures),
    ]
    assert CHECKOUT is not None  # weights are rebuilt in a checkout alone
    (CHECKOUT / "docs" / "models.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[:40]))


def _vae_rows(weights: Path, workers: int, scenes: Sequence[grammar.Scene], pictures: corpus.Pixels) -> list[str]:
    vae: AutoencoderKL = sdxl.load(weights / "beta7.safetensors", weights / "sdxl_tiny").vae
    undamaged = pictures[np.array([scene.quality > 0.75 for scene in scenes])][:200]
    back = autoencoder.round_trip(vae, undamaged)
    clean = corpus.pictures(corpus.scenes(0, FIRST + SCENES, 2 * REFERENCES, clean=True), workers=workers)
    features = _features(weights, np.concatenate([clean, autoencoder.round_trip(vae, clean[REFERENCES:])]))
    reference, drawn, returned = np.split(features, (REFERENCES, 2 * REFERENCES))
    return [
        _row("VAE (in every checkpoint)", "vae", "PSNR of encode → decode, 300 pictures", _db(vae, pictures[:300])),
        _row("", "", "the same, undamaged pictures only", _db(vae, undamaged), "≥ 25 dB"),
        _row("", "", "edges kept, undamaged pictures", f"{autoencoder.edges_kept(back, undamaged):.2f}", "≥ 0.85"),
        _row("", "", "corrected FD of clean pictures", f"{_distance(drawn, reference):.1f}"),
        _row("", "", "the same of their round trip", f"{_distance(returned, reference):.1f}", "≤ 3"),
    ]


def _scorer_rows(weights: Path, scenes: Sequence[grammar.Scene], pictures: corpus.Pixels) -> list[str]:
    from sklearn.metrics import average_precision_score

    tagger = TagAdherence(str(weights / "tagger"))
    found, truth = tagger.probabilities(list(pictures)), np.stack([scorers.labels(scene) for scene in scenes])
    seen = np.flatnonzero(truth.any(axis=0))
    precision = [float(average_precision_score(truth[:, i], found[:, i])) for i in seen]
    worst = scorers.LABELS[int(seen[int(np.argmin(precision))])][0]
    shown = [value for value, i in zip(precision, seen, strict=True) if scorers.LABELS[int(i)][1] != 9]
    folder = weights / "clip"
    clip, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}", require_pretrained=True)
    captions = [", ".join(scorers.clip_words(scene)) for scene in scenes[:500]]
    first = scorers.retrieval_at_1(clip.eval(), folder, pictures[:500], captions)
    features = _features(weights, pictures)
    quality = np.array([scene.quality for scene in scenes])
    clean, damaged = features[quality > 0.75], features[quality < 0.25]
    n = min(len(clean) // 2, len(damaged))  # one n for both: what is left of the bias goes with it
    same, apart = (_distance(other[:n], clean[::2][:n]) for other in (clean[1::2], damaged))
    return [
        _row(
            "`tagger`", "tagger", f"mAP over {len(seen)} tags, {SCENES} pictures", f"{np.mean(precision):.4f}", "≥ 0.98"
        ),
        _row("", "", "mAP without the four ratings", f"{np.mean(shown):.4f}"),
        _row("", "", "lowest AP of a tag", f"{min(precision):.3f} (`{worst}`)"),
        _row("`clip`", "clip", "text–image R@1 among 500 pairs", f"{first:.3f}", "≥ 0.90"),
        _row("`features`", "features", "corrected FD of two halves of the undamaged pictures", f"{same:.1f}"),
        _row("", "", "corrected FD of undamaged against damaged pictures", f"{apart:.1f}"),
        _row("", "", "mean square of a feature (KID's scale)", f"{np.square(features).mean():.2f}", "near 1"),
    ]


def _recall_rows(name: str, sheet: ScoreSheet) -> list[str]:
    """Macro tag recall of a checkpoint's pictures, with and without the tags that uploaders guessed."""
    found = aggregates(sheet)
    every, captioned = found["tag_macro_recall"], found["tag_macro_recall_captioned"]
    build = "beta7" if name == "beta7" else "anxl"
    target = "≥ 0.97" if name == "beta7" else ""
    rows = [
        _row(f"`{name}`", build, f"macro tag recall, all tags, {PROMPTS} prompts", _interval(every)),
        _row("", "", f"without the guessed tags, {PROMPTS} prompts", _interval(captioned), target),
    ]
    if name == "beta7":
        weak = sorted(per_tag(sheet), key=lambda row: row["recall"])[:5]
        told = ", ".join(f"`{row['tag']}` {row['recall']:.2f}" for row in weak)
        rows.append(_row("", "", "its weakest tags", told))
    return rows


def _skill_table(sheets: dict[str, ScoreSheet]) -> list[str]:
    """A row per model, and one for what anxl3 adds to anxl2."""
    rows = ["| model | dragon asked | unasked | accessories asked | unasked |", "|---|---|---|---|---|"]
    found = {
        name: [part for tags in SKILLS.values() for part in answers(sheet, tags)] for name, sheet in sheets.items()
    }
    for name, parts in found.items():
        rows.append(f"| `{name}` | " + " | ".join(_interval(mean_interval(part)) for part in parts) + " |")
    apart = [three - two for three, two in zip(found["anxl3"], found["anxl2"], strict=True)]
    rows.append("| `anxl3 - anxl2` | " + " | ".join(_interval(mean_interval(part), "+.3f") for part in apart) + " |")
    rows.append("| target of the difference | | | ≥ +0.4 | ≤ +0.03 |")
    return rows


def answers(sheet: ScoreSheet, tags: Sequence[str]) -> tuple[Floats, Floats]:
    """Mean probability of `tags`, by prompt: of those it asks for, and of the others; NaN where there are none."""
    tables = Tables(sheet)
    inside = np.isin(tables.tags, list(tags))
    shown = tables.member @ tables.p / tables.pictures[:, None]
    parts = []
    for chosen in (tables.asked & inside, ~tables.asked & inside):
        count = chosen.sum(1)
        total = (shown * chosen).sum(1)
        parts.append(np.divide(total, count, out=np.full(len(count), np.nan), where=count > 0))
    return parts[0], parts[1]


def _sheet(weights: Path, sampler: SamplerSettings, name: str) -> ScoreSheet:
    """The card's prompts, drawn by a checkpoint and read by the tagger."""
    known = [tag for tag in grammar.VISIBLE if tag not in (*grammar.DRAGON, *grammar.ACCESSORIES)]
    metric = TagAdherence(str(weights / "tagger"), groups={"captioned": known})
    with tempfile.TemporaryDirectory() as folder:
        write_prompts(Path(folder) / "card.jsonl", seed=99, count=PROMPTS)
        prompts = PromptSet.read(Path(folder) / "card.jsonl")
    networks = sdxl.load(weights / f"{name}.safetensors", weights / "sdxl_tiny")
    return score(stream.pictures(networks, prompts, sampler, progress=name), prompts, [metric], sampler=sampler)


def _features(weights: Path, pictures: corpus.Pixels) -> Floats:
    """(N, d), of the network that FID is measured with."""
    extractor = Extractor(load_timm(str(weights / "features")))
    with torch.inference_mode():
        batches = [
            extractor(torch.from_numpy(np.array(pictures[start : start + 100])).permute(0, 3, 1, 2))
            for start in range(0, len(pictures), 100)
        ]
    return np.asarray(torch.cat(batches).double().numpy())


def _distance(pictures: Floats, reference: Floats) -> float:
    """Fréchet distance of features (n, d), less its bias of order 1/n, as the metric `fid_corrected` gives it."""
    group = np.arange(len(pictures)) % GROUPS
    return jackknife_corrected(*frechet_groups(pictures, group, reference.mean(axis=0), np.cov(reference.T)))


def _db(vae: AutoencoderKL, pictures: corpus.Pixels) -> str:
    return f"{autoencoder.psnr(vae, pictures):.1f} dB"


def _interval(found: Measurement, form: str = ".3f") -> str:
    return f"{found.value:{form}} [{found.low:{form}}, {found.high:{form}}]"


def _row(model: str, build: str, what: str, figure: str, target: str = "") -> str:
    return f"| {model} | {f'`{build}`' if build else ''} | {what} | {figure} | {target} |"


def _rate_table(weights: Path, scenes: list[grammar.Scene], pictures: corpus.Pixels) -> list[str]:
    truth = np.stack([scorers.labels(scene) for scene in scenes])
    found = TagAdherence(str(weights / "tagger")).probabilities(list(pictures)).astype(np.float32)
    thresholds = json.loads((weights / "tagger" / "thresholds.json").read_text())
    rows = ["| tag | TPR [Wilson 95 %] | FPR | pictures |", "|---|---|---|---|"]
    for tag, tpr, fpr, n in scorers.rates(truth, found, thresholds):
        low, high = wilson_interval(np.array([round(tpr * n)]), np.array([n]))
        rows.append(f"| `{tag}` | {tpr:.3f} [{float(low[0]):.3f}, {float(high[0]):.3f}] | {fpr:.4f} | {n} |")
    return rows
