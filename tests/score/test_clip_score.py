"""CLIP score against open_clip used plainly, and the two known ways to get it wrong."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from ambergrade.errors import BadInput, BadSetting, UnknownName
from ambergrade.nouns import Picture, Prompt, PromptSet
from ambergrade.score.comparison import remarks
from ambergrade.score.metrics.clip_score import ClipScore
from ambergrade.score.scoring import score


@pytest.fixture(scope="module")
def metric(folders: Any) -> ClipScore:
    return ClipScore(str(folders.clip))


def plain_cosines(folder: Path, pictures: list[Picture], texts: list[str]) -> np.ndarray:
    """As open_clip's README does it, with the padding resize."""
    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name, image_resize_mode="longest")
    model.eval()
    with torch.no_grad():
        images = model.encode_image(torch.stack([preprocess(Image.fromarray(p.pixels)) for p in pictures]))
        words = model.encode_text(open_clip.get_tokenizer(name)(texts))
    images, words = images / images.norm(dim=-1, keepdim=True), words / words.norm(dim=-1, keepdim=True)
    return (images * words).sum(1).numpy()


def test_score_is_open_clips_cosine_clamped_per_picture(
    metric: ClipScore, folders: Any, prompts: PromptSet, pictures: list[Picture]
) -> None:
    texts = [prompts.by_id()[picture.prompt_id].text for picture in pictures]
    cosines = plain_cosines(folders.clip, pictures, texts)
    found = metric.rows(pictures, prompts.by_id())["clip_score"]
    np.testing.assert_allclose(found, 100 * np.maximum(cosines, 0), atol=1e-3)


def test_negative_cosines_are_zero_before_the_mean(metric: ClipScore, folders: Any, pictures: list[Picture]) -> None:
    """The clamp of the batch mean, as torchmetrics has it, would give another mean."""
    texts = [f"{number} {('moon', 'hat', 'ribbon')[number % 3]}" * (1 + number % 5) for number in range(200)]
    cosines = plain_cosines(folders.clip, [pictures[0]] * 200, texts)
    assert (cosines < 0).any(), "choose texts so that some cosines are negative"
    prompts = PromptSet("n", tuple(Prompt(str(k), text, k) for k, text in enumerate(texts)))
    shown = [Picture(str(k), 0, pictures[0].pixels) for k in range(200)]
    found = score(shown, prompts, [metric]).columns["clip_score"]
    assert found[cosines < -1e-4].max() == 0
    assert found.mean() == pytest.approx(100 * np.maximum(cosines, 0).mean(), abs=1e-3)


def test_long_prompts_keep_their_end_token_and_are_reported(metric: ClipScore, pictures: list[Picture]) -> None:
    long = ", ".join(["long hair"] * 120)
    texts = ["hat " * 75, "hat " * 76, f"red eyes, {long}", f"moon, {long}"]  # 75 words and two ends are 77 tokens
    prompts = PromptSet("long", tuple(Prompt(str(k), text, k) for k, text in enumerate(texts)))
    shown = [Picture(str(k), 0, pictures[0].pixels) for k in range(4)]
    sheet = score(shown, prompts, [metric])
    np.testing.assert_array_equal(sheet.columns["clip_truncated"], [0, 1, 1, 1])
    features = [metric._text(text)[0] for text in texts[2:]]
    assert not torch.allclose(features[0], features[1], atol=1e-3)
    assert "prompts of 3 of 4 pictures were cut" in remarks(sheet)[0]


def test_a_tokenizer_that_loses_the_end_token_is_refused(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def cutting(name: str) -> Any:
        whole = open_clip.SimpleTokenizer()
        return lambda texts, context_length=77: whole(texts, context_length=2000)[:, :context_length]

    monkeypatch.setattr(open_clip, "get_tokenizer", cutting)
    with pytest.raises(BadInput, match="end-of-text"):
        ClipScore(str(folders.clip))


def test_each_text_is_encoded_once(folders: Any, prompts: PromptSet, pictures: list[Picture]) -> None:
    metric = ClipScore(str(folders.clip))
    calls = []
    encode = metric._model.encode_text
    metric._model.encode_text = lambda tokens, normalize: calls.append(1) or encode(tokens, normalize=normalize)
    for _ in range(3):
        score(pictures, prompts, [metric], batch=5)
    assert len(calls) == len(prompts.prompts)


def test_longest_sees_the_whole_of_a_tall_picture_and_shortest_does_not(folders: Any, prompts: PromptSet) -> None:
    tall = np.full((96, 32, 3), 128, dtype=np.uint8)
    hat = tall.copy()
    hat[:20] = 255
    for mode, sees in [("longest", True), ("squash", True), ("shortest", False)]:
        metric = ClipScore(str(folders.clip), resize_mode=mode)
        shown = [Picture(prompts.prompts[k].id, 0, pixels) for k, pixels in enumerate((tall, hat))]
        same_prompt = {prompt.id: prompts.prompts[0] for prompt in prompts.prompts}
        found = metric._model.encode_image(torch.stack([metric._transform(Image.fromarray(p.pixels)) for p in shown]))
        assert (not torch.allclose(found[0], found[1], atol=1e-5)) == sees, mode
        assert metric.fingerprint["resize_mode"] == mode
        assert metric.rows(shown, same_prompt)["clip_score"].shape == (2,)


def test_folders_without_readable_weights_are_refused(folders: Any, tmp_path: Path) -> None:
    shutil.copytree(folders.clip, tmp_path / "clip")
    (tmp_path / "clip" / "open_clip_model.safetensors").rename(tmp_path / "clip" / "open_clip_pytorch_model.bin")
    with pytest.raises(BadInput, match=r"one \.safetensors file, found 0"):
        ClipScore(str(tmp_path / "clip"))
    with pytest.raises(BadSetting, match="longest, squash, shortest"):
        ClipScore(str(folders.clip), resize_mode="longst")
    with pytest.raises(UnknownName):
        ClipScore("builtin://no_such_clip")
