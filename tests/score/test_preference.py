"""Preference and aesthetic scorers by path, against plain open_clip, plain torch and arithmetic by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ambergrade.errors import AmbergradeError, BadInput, BadSetting, MissingObject
from ambergrade.nouns import Picture, Prompt, PromptSet
from ambergrade.score.comparison import differences, remarks
from ambergrade.score.features import Extractor
from ambergrade.score.folders import load_timm
from ambergrade.score.metrics.aesthetic import Aesthetic, perceptron
from ambergrade.score.metrics.preference import Preference
from ambergrade.score.scoring import score

ASKED = {"a": Prompt("a", "1girl, red hair", 0), "b": Prompt("b", ", ".join(["long hair"] * 90), 0)}


@pytest.fixture(scope="module")
def shown() -> list[Picture]:
    rng = np.random.default_rng(0)
    return [Picture(key, seed, rng.integers(0, 256, (48, 32, 3), dtype=np.uint8)) for key in "ab" for seed in (0, 1)]


@pytest.fixture(scope="module")
def embeddings(folders: Any, shown: list[Picture]) -> torch.Tensor:
    """(4, 16): as the model's authors get them, by open_clip's own transform (shortest side, middle square)."""
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folders.clip}", require_pretrained=True)
    with torch.inference_mode():
        found: torch.Tensor = model.eval().encode_image(
            torch.stack([transform(Image.fromarray(picture.pixels)) for picture in shown]), normalize=True
        )
    return found


@pytest.mark.parametrize(("scale", "times"), [("logit", 1 / 0.07), ("cosine", 1.0)])
def test_preference_is_the_scaled_cosine_of_the_stock_model(
    folders: Any, shown: list[Picture], embeddings: torch.Tensor, scale: str, times: float
) -> None:
    """A new CLIP's temperature is ln(1/0.07) (Radford et al. 2021, section 2.5)."""
    model = open_clip.create_model(f"local-dir:{folders.clip}", require_pretrained=True).eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folders.clip}")
    with torch.inference_mode():
        texts = model.encode_text(tokenizer([ASKED[picture.prompt_id].text for picture in shown]), normalize=True)
    found = Preference(str(folders.clip), scale).rows(shown, ASKED)
    np.testing.assert_allclose(found["preference"], times * (embeddings * texts).sum(1).numpy(), rtol=1e-4, atol=1e-5)
    assert found["preference_truncated"].tolist() == [0, 0, 1, 1]


def test_preference_is_read_as_a_difference_and_says_so(folders: Any, shown: list[Picture]) -> None:
    metric, prompts = Preference(str(folders.clip)), PromptSet("two", tuple(ASKED.values()))
    sheet = score(shown, prompts, [metric])
    assert "means nothing without a baseline" in " ".join(remarks(sheet))
    assert "2 of 4 pictures were cut" in " ".join(remarks(sheet))
    swapped = [Picture(p.prompt_id, 1 - p.seed, p.pixels) for p in shown]
    other = score(swapped, prompts, [metric])
    assert differences(sheet, other)["preference"].value == pytest.approx(0, abs=1e-9)
    assert Preference(str(folders.clip), prefix="anime: ").fingerprint != metric.fingerprint
    with pytest.raises(BadSetting, match="logit, cosine"):
        Preference(str(folders.clip), "log")


def write_head(path: Path, activation: str) -> torch.nn.Module:
    """LAION's predictor in small (linear, dropout, linear, …), or waifu-scorer's (linear, ReLU, batch norm, …)."""
    torch.manual_seed(3)
    layers: list[torch.nn.Module]
    if activation == "none":
        layers = [torch.nn.Linear(16, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 4), torch.nn.Linear(4, 1)]
    else:
        layers = [
            torch.nn.Linear(16, 8),
            torch.nn.ReLU(),
            torch.nn.BatchNorm1d(8),
            torch.nn.Dropout(),
            torch.nn.Linear(8, 1),
        ]
        layers[2].running_mean.normal_()  # type: ignore[operator,union-attr]
        layers[2].running_var.uniform_(0.5, 2)  # type: ignore[operator,union-attr]
    made = torch.nn.Sequential(*layers).eval()
    save_file({f"layers.{key}": value for key, value in made.state_dict().items()}, path)
    return made


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_a_head_on_clip_embeddings_is_plain_torch(
    folders: Any, shown: list[Picture], embeddings: torch.Tensor, tmp_path: Path, activation: str
) -> None:
    head = write_head(tmp_path / "head.safetensors", activation)
    metric = Aesthetic(str(folders.clip), str(tmp_path / "head.safetensors"), activation)
    with torch.inference_mode():
        expected = head(embeddings)[:, 0].numpy()
    np.testing.assert_allclose(metric.rows(shown, {})["aesthetic"], expected, rtol=1e-4, atol=1e-5)
    write_head(tmp_path / "head.safetensors", "relu" if activation == "none" else "none")
    assert Aesthetic(str(folders.clip), str(tmp_path / "head.safetensors")).fingerprint != metric.fingerprint


def test_grades_are_expected_values_of_the_networks_shares(folders: Any, shown: list[Picture]) -> None:
    folder = load_timm(str(folders.tagger))
    extractor = Extractor(folder)
    with torch.inference_mode():
        pixels = torch.from_numpy(np.stack([picture.pixels for picture in shown])).permute(0, 3, 1, 2)
        shares = folder.network(extractor.prepared(pixels)).softmax(1).double().numpy()
    found = Aesthetic(str(folders.tagger)).rows(shown, {})["aesthetic"]
    np.testing.assert_allclose(found, shares @ np.arange(10), rtol=1e-4)
    assert (found > 0).all()
    assert (found < 9).all()
    reverse = Aesthetic(str(folders.tagger), grades=list(range(9, -1, -1))).rows(shown, {})["aesthetic"]
    np.testing.assert_allclose(found + reverse, 9, rtol=1e-5)


def test_scorers_that_cannot_serve_are_refused(folders: Any, tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="head=FILE"):
        Aesthetic(str(folders.clip))
    with pytest.raises(BadSetting, match="10 outputs, but 3 grades"):
        Aesthetic(str(folders.tagger), grades=[0, 1, 2])
    with pytest.raises(MissingObject):
        Aesthetic(str(folders.clip), str(tmp_path / "gone.safetensors"))
    with pytest.raises(BadSetting, match="none, relu"):
        Aesthetic(str(folders.tagger), activation="gelu")
    cases: list[tuple[dict[str, torch.Tensor], str]] = [
        ({"layers.0.weight": torch.zeros(1, 5), "layers.0.bias": torch.zeros(1)}, "reads 5 numbers"),
        ({"layers.0.weight": torch.zeros(3, 16)}, "must give one number"),
        ({"layers.0.weight": torch.zeros(1, 16), "layers.1.weight": torch.zeros(4)}, "neither linear nor"),
        ({"projection": torch.zeros(1, 16)}, "no layer's tensor"),
    ]
    for state, message in cases:
        save_file(state, tmp_path / "head.safetensors")
        with pytest.raises(BadInput, match=message):
            Aesthetic(str(folders.clip), str(tmp_path / "head.safetensors"))
    torch.save({}, tmp_path / "head.pth")
    with pytest.raises(AmbergradeError, match="pickle"):
        perceptron(tmp_path / "head.pth", "none")
    save_file({"weight": torch.ones(1, 16), "bias": torch.zeros(1)}, tmp_path / "linear.safetensors")
    assert perceptron(tmp_path / "linear.safetensors", "none")(torch.ones(1, 16)).item() == 16
