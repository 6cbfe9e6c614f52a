"""Gamma's card, as printed: rev1, rev2 and the block weights, judged block by block by numpy in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from ambergrade.family import sdxl
from ambergrade.merge.engine import merge
from ambergrade.merge.files import read_recipe
from ambergrade.merge.formula import Formula
from ambergrade.merge.job import open_job
from ambergrade.store import BUILTIN

REV1 = "gamma rev1 = beta7 + 0.8 * (anxl3 - anxl2) + 0.5 * (base7 - beta7)"
REV2 = "gamma rev2 = beta7 + 1.0 * (anxl3 - anxl2) + 0.25 * (base8 - beta7)"
MBW = "0,0.1,0.1,0,0.1,0.1,0,0.1,0.1,0,0,0,0,0,0.05,0.05,0.05,0.05,0.05,0.05"
"""BASE, IN00 to IN08, M00, OUT00 to OUT08, as SuperMerger orders an SDXL model's blocks."""


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny SDXL models, and two fine-tunes of beta7 under the names of the card."""
    folder = tmp_path_factory.mktemp("card")
    found = {alias: BUILTIN / f"{alias}.safetensors" for alias in ("beta7", "anxl2", "anxl3")}
    for number, alias in enumerate(("base7", "base8")):
        random = torch.Generator().manual_seed(number)
        tuned = {
            name: tensor + (1e-2 * torch.randn(tensor.shape, generator=random)).to(tensor.dtype)
            if tensor.is_floating_point() and "logit_scale" not in name
            else tensor
            for name, tensor in load_file(found["beta7"]).items()
        }
        save_file(tuned, folder / f"{alias}.safetensors")
        found[alias] = folder / f"{alias}.safetensors"
    return found


def own_block(name: str) -> int:
    """Place in the 20 values: the file's own numbering, with the embeddings of time and size in IN00."""
    words = name.removeprefix("model.diffusion_model.").split(".")
    if not name.startswith("model.diffusion_model."):
        return 0
    if words[0] in ("input_blocks", "output_blocks"):
        return int(words[1]) + (1 if words[0] == "input_blocks" else 11)
    return {"time_embed": 1, "label_emb": 1, "middle_block": 10, "out": 19}[words[0]]


@pytest.mark.parametrize(("line", "blocks"), [(REV1, False), (REV2, True)])
def test_the_cards_lines_run_verbatim(paths: dict[str, Path], tmp_path: Path, line: str, blocks: bool) -> None:
    name = line.partition(" =")[0]
    text = f'{line}\nout = mbw({name}, anxl3, "{MBW}", dialect="supermerger")' if blocks else line
    out = tmp_path / "out.safetensors"
    merge(open_job(Formula.parse(text, paths), paths), out)
    x = {alias: load_file(path) for alias, path in paths.items()}
    a, b, tuned = (0.8, 0.5, "base7") if line == REV1 else (1.0, 0.25, "base8")
    shares = [float(value) if blocks else 0.0 for value in MBW.split(",")]
    seen: set[int] = set()
    for key, found in load_file(out).items():
        if key.startswith("first_stage_model") or "position_ids" in key or "logit_scale" in key:
            assert torch.equal(found, x["beta7"][key]), key
            continue
        beta7, anxl2, anxl3, base = (x[alias][key].double().numpy() for alias in ("beta7", "anxl2", "anxl3", tuned))
        share = shares[own_block(key)]
        seen.add(own_block(key))
        truth = (1 - share) * (beta7 + a * (anxl3 - anxl2) + b * (base - beta7)) + share * anxl3
        rounded = truth.astype(np.float16)
        error = np.abs(found.double().numpy() - truth)  # float64 cannot tell which side of a tie: either is as near
        assert (error <= 0.5001 * np.spacing(np.abs(rounded)).astype(np.float64)).all(), key
    assert seen == set(range(20))


@pytest.mark.parametrize("name", ["gamma_rev1", "gamma_rev2", "gamma_rev2_mbw"])
def test_the_shipped_formulas_are_the_cards(name: str) -> None:
    settings = yaml.safe_load((Path(__file__).parents[2] / "conf" / "merge" / f"{name}.yaml").read_text())
    aliases = ("beta7", "anxl2", "anxl3", "base7", "base8")
    text = settings["formula"]
    for coefficient, value in settings["coefficients"].items():
        text = text.replace(f" {coefficient} *", f" {value} *")
    printed = {"gamma_rev1": REV1, "gamma_rev2": REV2}.get(
        name, f'{REV2}\ngamma = mbw(gamma rev2, anxl3, "{MBW}", dialect="supermerger")'
    )
    assert Formula.parse(text, aliases) == Formula.parse(printed, aliases)


@pytest.mark.slow
def test_a_merged_file_draws_the_same_picture_in_stock_diffusers_and_here(
    paths: dict[str, Path], tmp_path: Path
) -> None:
    """Every pixel of two steps at guidance 5, from one start: single-file loading of theirs, and ours."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    out, config = tmp_path / "out.safetensors", BUILTIN / "sdxl_tiny"
    merge(open_job(Formula.parse(REV1, paths), paths), out)
    theirs = StableDiffusionXLPipeline.from_single_file(
        str(out), config=str(config), local_files_only=True, torch_dtype=torch.float32, add_watermarker=False
    )
    networks = sdxl.load(out, config)
    ours = networks.pipeline(EulerDiscreteScheduler.from_config(networks.scheduler_config))
    theirs.scheduler = EulerDiscreteScheduler.from_config(networks.scheduler_config)
    pictures = []
    for pipe in (theirs, ours):
        pipe.set_progress_bar_config(disable=True)
        drawn = pipe(
            prompt="1girl, dragon horns",
            negative_prompt="low quality",
            num_inference_steps=2,
            guidance_scale=5.0,
            height=64,
            width=64,
            generator=torch.Generator().manual_seed(7),
            output_type="np",
        )
        pictures.append(drawn.images[0])
    assert pictures[0].shape == (64, 64, 3)
    assert pictures[0].std() > 0.02  # a picture, not one colour
    np.testing.assert_array_equal(pictures[0], pictures[1])


def test_the_blocks_of_a_recipe_file(paths: dict[str, Path], tmp_path: Path) -> None:
    """The printed lines in a yaml, names with spaces and all: the dry run tells each block's own formula."""
    formula = f'{REV2}\ngamma = mbw(gamma rev2, anxl3, "{MBW}", dialect="supermerger")'
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"formula": formula, "models": {alias: str(path) for alias, path in paths.items()}}))
    told = read_recipe(file).job().told()
    plain = next(line for line in told.splitlines() if "unet middle_block" in line)
    assert all(f"unet {block} " in plain for block in ("input_blocks.2", "input_blocks.5", "output_blocks.2"))  # 0
    assert "te2 (" in plain
    assert not any(f"unet {block} " in plain for block in ("input_blocks.0", "time_embed", "output_blocks.3", "out"))
