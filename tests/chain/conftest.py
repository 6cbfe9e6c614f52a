"""A context without MLflow, a drawn world of a few pictures, and a small release that nothing was trained for."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image

from ambergrade.chain.context import Context
from ambergrade.chain.dataset import draw_world
from ambergrade.chain.environment import environment
from ambergrade.chain.numbers import numbers
from ambergrade.chain.settings import Compute, DataSettings, Drawing, GammaSettings
from ambergrade.door.compose import compose, read
from ambergrade.door.files import run_recipe
from ambergrade.family.load import family
from ambergrade.generate import stream
from ambergrade.generate.contact_sheet import write_png
from ambergrade.identity import digest, random_seed
from ambergrade.merge.files import from_values, recipe_document
from ambergrade.nouns import Picture, PromptSet, SamplerSettings
from ambergrade.release.build import Payload, build_release
from ambergrade.release.facts import Draft, Evaluation, Parent, Prompts, Recipe, Sample, Scorer
from ambergrade.release.licenses import load_license
from ambergrade.score.scoring import load_metric, score
from ambergrade.score.sheet import ScoreSheet
from ambergrade.store import BUILTIN
from ambergrade.track.journal import Journal, Run
from ambergrade.world import grammar
from ambergrade.world.booru import prompt as world_prompt

COMPUTE = Compute("cpu", 1, 1)


def context_of(root: Path) -> Context:
    """A context whose journal is closed: nothing is told to MLflow."""
    journal = Journal(None, "", "", root)
    return Context(root, journal, Run(journal, "", "", "", done=False, resumed=False), COMPUTE)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return context_of(tmp_path / "root")


@pytest.fixture(scope="session")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> GammaSettings:
    """The settings of gamma_smoke on a world of 40 posts that is drawn once."""
    root = tmp_path_factory.mktemp("smoke")
    settings = read(GammaSettings, compose("gamma", ["experiment=gamma_smoke", f"root={root}", "data.draw.count=40"]))
    draw_world(settings.data, COMPUTE)
    return settings


@pytest.fixture
def data(smoke: GammaSettings) -> DataSettings:
    return smoke.data


@dataclass(frozen=True)
class Small:
    """What a small release is built of, without any training."""

    draft: Draft
    payload: Payload

    def build(self, folder: Path) -> Path:
        build_release(folder, self.draft, self.payload)
        return folder


ALIASES = ("beta7", "anxl3", "anxl2")
SAMPLER = SamplerSettings("euler", 2, 2.0, 128, 128, batch=4)
METRICS = {"mosaic": {}, "clip_score": {"model": "builtin://clip"}}


def drawn(model: Path, prompts: PromptSet) -> list[Picture]:
    networks = family("sdxl_tiny").load(model, BUILTIN / "sdxl_tiny")
    return list(stream.pictures(networks, prompts, SAMPLER, progress=None))


def make_small(folder: Path, version: str, a: float) -> Small:
    """Merge the shipped models at one coefficient, draw a dozen prompts with the merge and with its base, and score."""
    folder.mkdir()
    paths = {alias: BUILTIN / f"{alias}.safetensors" for alias in ALIASES}
    formula = "small = beta7 + a * (anxl3 - anxl2)"
    given = {"formula": formula, "coefficients": {"a": a}, "models": {k: str(v) for k, v in paths.items()}}
    merged = folder / "merged.safetensors"
    run_recipe(from_values(given, folder), out=merged)
    scenes = [grammar.sample(5, k, clean=True) for k in range(12)]
    rows = [world_prompt(scene, f"{k:03}", random_seed(5, "x", k) % 2**32) for k, scene in enumerate(scenes)]
    prompts = PromptSet("heldout", tuple(rows))
    pictures = {"small": drawn(merged, prompts), "beta7": drawn(paths["beta7"], prompts)}
    metrics = [load_metric(name, **settings, device="cpu") for name, settings in METRICS.items()]
    files, sheets = {}, {}
    for label, found in pictures.items():
        sheets[label] = score(found, prompts, metrics, sampler=SAMPLER)
        sheets[label].write(folder / f"{label}.parquet")
        files[f"scores/{label}.parquet"] = folder / f"{label}.parquet"
        sheets[label] = ScoreSheet.read(folder / f"{label}.parquet")
    write_png(folder / "contact_sheet.png", Image.new("RGB", (8, 8), (1, 20, 30)))
    files["contact_sheet.png"] = folder / "contact_sheet.png"
    files |= {f"parents/{path.name}": path for path in paths.values()}
    scores, apart = numbers(sheets)
    document = recipe_document(merged, formula=formula, names={alias: path.name for alias, path in paths.items()})
    draft = Draft(
        name="small",
        version=version,
        license="apache-2.0",
        license_why="all parents are under it",
        licenses={"apache-2.0": load_license("apache-2.0"), "unknown": load_license("unknown")},
        family="sdxl_tiny",
        architecture="stable-diffusion-xl-v1-base",
        pipeline="StableDiffusionXLPipeline",
        resolution=128,
        recipe=Recipe(**{**document, "models": {k: Parent(**row) for k, row in document["models"].items()}}),
        evaluation=Evaluation(
            prompts=Prompts("heldout", 12, prompts.digest),
            sampler=SAMPLER,
            objective="clip_score",
            columns=("clip_score", "mosaic"),
            sheets={label: f"scores/{label}.parquet" for label in sheets},
            scores=scores,
            differences=apart,
            scorers={
                name: Scorer(digest(made), name != "mosaic", METRICS[name])
                for name, made in sheets["small"].fingerprints.items()
            },
        ),
        samples=tuple(Sample(f"samples/{k}.png", rows[k].text, rows[k].negative, rows[k].seed) for k in range(2)),
        environment=environment(),
    )
    samples = [picture.pixels for picture in pictures["small"][:2]]
    return Small(draft, Payload(merged, BUILTIN / "sdxl_tiny", prompts, files=files, samples=samples))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """A release of the shipped models; two steps a picture, so the numbers mean nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return make_small(tmp_path_factory.mktemp("small") / "one", "rev1", 0.5)


@pytest.fixture
def release(small: Small, tmp_path: Path) -> Path:
    return small.build(tmp_path / "small-rev1")


__all__ = ["COMPUTE", "Drawing", "context_of", "replace"]
