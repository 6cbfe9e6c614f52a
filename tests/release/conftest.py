"""A merge of four small files, all that its release says (`draft`), what goes into it (`payload`), and a sound one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from ambergrade.chain.numbers import numbers
from ambergrade.door import files as command
from ambergrade.identity import digest
from ambergrade.merge.files import from_values, recipe_document
from ambergrade.nouns import Measurement, Picture, Prompt, PromptSet, SamplerSettings
from ambergrade.release.build import Payload, build_release
from ambergrade.release.facts import (
    Captions,
    Draft,
    Environment,
    Evaluation,
    Origin,
    Parent,
    Prompts,
    Recipe,
    Sample,
    Score,
    Scorer,
    Training,
)
from ambergrade.release.licenses import derive, load_license
from ambergrade.score.scoring import load_metric
from ambergrade.score.scoring import score as judged
from ambergrade.score.sheet import ScoreSheet

FORMULA = "gamma rev1   = beta7 + a*(anxl3 - anxl2) + b * (base7 - beta7)"
NAN = float("nan")
ORIGINS = {
    "beta7": Origin("openrail++", author="KBlueLeaf"),
    "anxl3": Origin("faipl-1.0-sd", hub="cagliostrolab/animagine-xl-3.0", author="Cagliostro | Lab"),
    "anxl2": Origin("openrail++", hub="Linaqruf/animagine-xl-2.0"),
    "base7": Origin("openrail++", note="fine-tuned from beta7"),
}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    random = np.random.default_rng(0)
    for name in ("beta7", "anxl3", "anxl2", "base7"):
        tensors = {"w": random.standard_normal((9, 7)).astype(np.float16), "b": np.ones(3, np.float32)}
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def score(value: float, low: float, high: float, *, better: bool = True) -> Score:
    return Score.of(Measurement(value, low, high, 48, better))


def evaluation() -> Evaluation:
    return Evaluation(
        prompts=Prompts("heldout", 48),
        sampler=SamplerSettings("euler", 12, 3.0, 128, 128),
        objective="tag_balance",
        columns=("tag_recall", "fid"),
        sheets={"gamma": "scores/released.parquet", "beta7": "scores/beta7.parquet"},
        scores={
            "tag_recall": {"gamma": score(0.81, 0.78, 0.84), "beta7": score(0.41, 0.35, 0.47)},
            "fid": {"gamma": score(12.0, 11.0, 13.0, better=False), "beta7": score(NAN, NAN, NAN, better=False)},
            "mosaic": {"gamma": score(0.3, 0.2, 0.4, better=False), "beta7": score(0.2, 0.1, 0.3, better=False)},
        },
        differences={"tag_recall": {"beta7": score(0.40, 0.33, 0.47)}},
        winner_set=({"a": 0.8, "b": 0.5}, {"a": 0.8, "b": 0.75}),
        scorers={"tagger": Scorer("ab" * 32, tiny=True)},
    )


@pytest.fixture(scope="module")
def both(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Draft, Payload]:
    folder = tmp_path_factory.mktemp("inputs")
    given = {"formula": FORMULA, "coefficients": {"a": 0.8, "b": 0.5}}
    given |= {"models": {path.stem: str(path) for path in models.iterdir()}}
    checkpoint = folder / "model.safetensors"
    command.run_recipe(from_values(given, folder), out=checkpoint)
    checkpoint.chmod(0o444)  # as the store keeps it
    files = {}
    for number, name in enumerate(["contact_sheet.png", "heat_map.png"]):
        Image.new("RGB", (8, 8), (number, 20, 30)).save(folder / name)
        files[name] = folder / name
    for name in ("released", "beta7"):
        (folder / f"{name}.parquet").write_bytes(name.encode())
        files[f"scores/{name}.parquet"] = folder / f"{name}.parquet"
    config = folder / "config"
    (config / "unet").mkdir(parents=True)
    (config / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}\n')
    (config / "unet" / "config.json").write_text("{}\n")
    (config / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"no weights are taken")
    document = recipe_document(checkpoint, formula=FORMULA)
    parents = {
        alias: Parent(**row, name=f"{alias}.safetensors", origin=ORIGINS[alias])
        for alias, row in document["models"].items()
    }
    keys = ("formula", "coefficients", "dtype", "policies")
    licenses = {alias: parent.origin.license for alias, parent in parents.items()}
    derived = derive(licenses)
    captions = Captions("kohaku-2024-01", "cd" * 32, 9, ("special", "general"), {"general": ("safe",)}, ("best",), ())
    trainer = {"lr": {"unet": 1e-5}, "batch": 32}
    prompts = PromptSet("heldout", (Prompt("1", "1girl, smile", 7, "nsfw"), Prompt("2", "2girls", 8)))
    draft = Draft(
        name="gamma",
        version="rev1",
        summary="A merge. [Its page](https://x.org) and [a trap](javascript:alert(1)) <script>.",
        author="Kim",
        license=derived.name,
        license_why=derived.why,
        licenses={name: load_license(name) for name in dict.fromkeys([derived.name, *licenses.values()])},
        family="sdxl_tiny",
        architecture="stable-diffusion-xl-v1-base",
        pipeline="StableDiffusionXLPipeline",
        resolution=128,
        recipe=Recipe(**{key: document[key] for key in keys}, models=parents),
        training=Training("base7", "beta7", "ef" * 32, {"LR": "1e-5", "images": 12800}, trainer, captions),
        evaluation=evaluation(),
        samples=tuple(Sample(f"samples/{p.id}.png", p.text, p.negative, p.seed) for p in prompts.prompts),
        environment=Environment("0.1.0", "3.11.7", "AVX2", "12" * 32, {"numpy": "2.0.0", "torch": "2.13.0+cpu"}),
    )
    pixels = [np.full((64, 64, 3), 40 * number, np.uint8) for number in (1, 2)]
    return draft, Payload(checkpoint, config, prompts, files=files, samples=pixels)


@pytest.fixture(scope="module")
def draft(both: tuple[Draft, Payload]) -> Draft:
    return both[0]


@pytest.fixture(scope="module")
def payload(both: tuple[Draft, Payload]) -> Payload:
    return both[1]


@pytest.fixture(scope="module")
def sound(both: tuple[Draft, Payload], models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release that holds at every level: its scores follow from its sheets, and its parents are in it."""
    folder = tmp_path_factory.mktemp("sound")
    draft, payload = both
    rows = tuple(Prompt(str(number), f"{number} girls", number) for number in range(12))
    prompts, files, sheets = PromptSet("heldout", rows), dict(payload.files), {}
    for strength, label in ((9, "gamma"), (12, "beta7")):
        random = np.random.default_rng(strength)
        shapes = [random.normal(128, strength, (64, 64, 3)).clip(0, 255).astype(np.uint8) for _ in rows]
        pictures = [Picture(prompt.id, prompt.seed, pixels) for prompt, pixels in zip(rows, shapes, strict=True)]
        file = folder / f"{label}.parquet"
        judged(pictures, prompts, [load_metric("mosaic")], sampler=draft.evaluation.sampler).write(file)
        sheets[label] = ScoreSheet.read(file)
        files[draft.evaluation.sheets[label]] = file
    scores, apart = numbers(sheets)
    files |= {f"parents/{path.name}": path for path in models.iterdir()}
    made = {name: Scorer(digest(made_of), settings={}) for name, made_of in sheets["gamma"].fingerprints.items()}
    evaluation = replace(
        draft.evaluation,
        prompts=Prompts("heldout", len(rows), prompts.digest),
        columns=("mosaic",),
        scores=scores,
        differences=apart,
        scorers=made,
    )
    draft = replace(draft, evaluation=evaluation)
    return build_release(folder / "gamma-rev1", draft, replace(payload, prompts=prompts, files=files)).path
