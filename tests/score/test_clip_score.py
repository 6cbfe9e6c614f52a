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
from safetensors.torch import load_file
from scipy import stats

from ambergrade.errors import BadInput, BadSetting, UnknownName
from ambergrade.nouns import Picture, Prompt, PromptSet
from ambergrade.score import clip
from ambergrade.score.comparison import remarks
from ambergrade.score.metrics.clip_score import ClipScore
from ambergrade.score.metrics.preference import Preference
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


def test_long_prompts_keep_their_end_token_and_are_reported(folders: Any, pictures: list[Picture]) -> None:
    metric = ClipScore(str(folders.clip), long="head")
    long = ", ".join(["long hair"] * 120)
    texts = ["hat " * 75, "hat " * 76, f"red eyes, {long}", f"moon, {long}"]  # 75 words and two ends are 77 tokens
    prompts = PromptSet("long", tuple(Prompt(str(k), text, k) for k, text in enumerate(texts)))
    shown = [Picture(str(k), 0, pictures[0].pixels) for k in range(4)]
    sheet = score(shown, prompts, [metric])
    np.testing.assert_array_equal(sheet.columns["clip_truncated"], [0, 1, 1, 1])
    lost = [len(open_clip.SimpleTokenizer().encode(text)) - 75 for text in texts[2:]]
    np.testing.assert_array_equal(sheet.columns["clip_tokens_lost"], [0, 1, *lost])
    features = [metric._text(text)[0] for text in texts[2:]]
    assert not torch.allclose(features[0], features[1], atol=1e-3)
    assert "prompts of 3 of 4 pictures were cut" in remarks(sheet)[0]


def test_a_tokenizer_that_loses_the_end_token_is_refused(folders: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def cutting(folder: Path, text: Any) -> Any:
        whole = open_clip.SimpleTokenizer()
        return lambda texts, context_length=77: whole(texts, context_length=2000)[:, :context_length]

    monkeypatch.setattr(clip, "_tokenizer", cutting)
    monkeypatch.setattr(clip, "_open", {})
    with pytest.raises(BadInput, match="end-of-text"):
        ClipScore(str(folders.clip))


def test_the_text_that_was_drawn_is_scored_and_an_empty_one_is_not(folders: Any) -> None:
    """Spellings that condition equal bits score equally; a text without words asks for nothing."""
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    texts = [
        "blue hair, moon",
        "blue_hair,moon",
        "(blue hair:1.0), moon",
        "(blue_hair:1.3), [moon]",
        "red",
        "",
        " , BREAK",
    ]
    prompts = PromptSet("t", tuple(Prompt(str(k), text, 0) for k, text in enumerate(texts)))
    shown = [Picture(prompt.id, 0, pixels) for prompt in prompts.prompts]
    sheet = score(shown, prompts, [ClipScore(str(folders.clip)), Preference(str(folders.clip))])
    for column in ("clip_cosine", "clip_margin", "preference"):
        values = sheet.columns[column]
        assert len(set(values[:4])) == 1, column
        assert values[4] != values[0], column
        assert np.isnan(values[5:]).all(), column
    for column in ("clip_score", "clip_r1"):
        assert np.isnan(sheet.columns[column]).tolist() == [False] * 5 + [True] * 2
    assert sum("2 of 7 pictures not scored" in line for line in remarks(sheet)) == 5


def test_each_text_is_encoded_once(folders: Any, prompts: PromptSet, pictures: list[Picture]) -> None:
    metric = ClipScore(str(folders.clip))
    calls: list[int] = []
    encode = metric._clip.model.encode_text
    metric._clip._texts.clear()
    metric._clip.model.encode_text = lambda tokens, normalize: calls.append(1) or encode(tokens, normalize=normalize)
    for _ in range(3):
        score(pictures, prompts, [metric], batch=5)
    metric._clip.model.encode_text = encode
    assert len(calls) == len(prompts.prompts)


def test_longest_sees_the_whole_of_a_tall_picture_and_shortest_does_not(folders: Any, prompts: PromptSet) -> None:
    tall = np.full((96, 32, 3), 128, dtype=np.uint8)
    hat = tall.copy()
    hat[:20] = 255
    for mode, sees in [("longest", True), ("squash", True), ("shortest", False)]:
        metric = ClipScore(str(folders.clip), resize_mode=mode)
        shown = [Picture(prompts.prompts[k].id, 0, pixels) for k, pixels in enumerate((tall, hat))]
        same_prompt = {prompt.id: prompts.prompts[0] for prompt in prompts.prompts}
        found = metric._clip.images([picture.pixels for picture in shown])
        assert (not torch.allclose(found[0], found[1], atol=1e-5)) == sees, mode
        assert metric.fingerprint["resize_mode"] == mode
        assert metric.rows(shown, same_prompt)["clip_score"].shape == (2,)


def test_folders_without_readable_weights_are_refused(folders: Any, tmp_path: Path) -> None:
    shutil.copytree(folders.clip, tmp_path / "clip")
    (tmp_path / "clip" / "open_clip_model.safetensors").rename(tmp_path / "clip" / "open_clip_pytorch_model.bin")
    with pytest.raises(BadInput, match="Found: none"):
        ClipScore(str(tmp_path / "clip"))
    with pytest.raises(BadSetting, match="longest, squash, shortest"):
        ClipScore(str(folders.clip), resize_mode="longst")
    with pytest.raises(UnknownName):
        ClipScore("builtin://no_such_clip")


def test_a_long_prompt_in_chunks_is_the_token_weighted_mean_of_its_parts(
    metric: ClipScore, folders: Any, pictures: list[Picture]
) -> None:
    parts = [", ".join(["long hair"] * 25), ", ".join(["moon"] * 30), "red eyes"]  # 74, 60 and 2 words, commas joined
    text = ", ".join(parts)
    cut = metric._parts(text)
    assert ", ".join(cut) == text
    words = [len(open_clip.SimpleTokenizer().encode(part)) for part in cut]
    assert len(cut) == 2
    assert max(words) <= 75
    cosines = plain_cosines(folders.clip, [pictures[0]] * 2, cut)
    prompts = {"p": Prompt("p", text, 0)}
    found = metric.rows([Picture("p", 0, pictures[0].pixels)], prompts)
    expected = 100 * (cosines * words).sum() / sum(words)
    assert found["clip_cosine"][0] == pytest.approx(expected, abs=1e-3)
    assert found["clip_tokens_lost"][0] == 0
    endless = metric.rows([Picture("p", 0, pictures[0].pixels)], {"p": Prompt("p", "moon, " + "hat " * 80, 0)})
    assert endless["clip_tokens_lost"][0] == 5  # one tag of 80 words has nowhere to be cut


def test_margin_and_first_place_by_hand(metric: ClipScore, folders: Any, pictures: list[Picture]) -> None:
    texts = [f"{word} hair" for word in ("red", "green", "blue", "black")]
    prompts = {str(k): Prompt(str(k), text, k) for k, text in enumerate(texts)}
    table = np.array([[plain_cosines(folders.clip, [pictures[k]], [text])[0] for text in texts] for k in range(4)])
    shown = [Picture(str(k), 0, pictures[k].pixels) for k in range(4)]
    found = metric.rows(shown, prompts)
    score_table = 100 * np.maximum(table, 0)
    others = (score_table.sum(1) - np.diag(score_table)) / 3
    np.testing.assert_allclose(found["clip_margin"], np.diag(score_table) - others, atol=1e-3)
    np.testing.assert_array_equal(found["clip_r1"], table.argmax(1) == np.arange(4))
    alone = metric.rows(shown[:1], {"0": prompts["0"]})
    assert np.isnan([alone["clip_margin"][0], alone["clip_r1"][0]]).all()


def test_pictures_are_encoded_once_for_all_metrics_of_a_folder(folders: Any, pictures: list[Picture]) -> None:
    first, second = ClipScore(str(folders.clip)), ClipScore(str(folders.clip), long="head")
    assert first._clip is second._clip
    pixels = [picture.pixels for picture in pictures[:3]]
    assert first._clip.images(pixels) is second._clip.images(list(pixels))
    assert first._clip.images(pixels) is not second._clip.images(pixels[:2])


class Plain:
    """CLIP's forward in numpy float64, after Radford et al. 2021: pre-norm blocks, GELU, text read at its end."""

    def __init__(self, folder: Path) -> None:
        self.w = {
            key: value.double().numpy() for key, value in load_file(folder / "open_clip_model.safetensors").items()
        }

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    def linear(self, x: np.ndarray, name: str, dot: str = ".") -> np.ndarray:
        return x @ self.w[f"{name}{dot}weight"].T + self.w[f"{name}{dot}bias"]

    def block(self, x: np.ndarray, name: str, causal: bool) -> np.ndarray:
        tokens, width = x.shape
        q, k, v = np.split(self.linear(self.norm(x, f"{name}.ln_1"), f"{name}.attn.in_proj", "_"), 3, axis=1)
        found = np.empty_like(x)
        for start in range(0, width, 8):  # heads of 8
            part = slice(start, start + 8)
            logits = q[:, part] @ k[:, part].T / np.sqrt(8)
            if causal:
                logits = np.where(np.tri(tokens, dtype=bool), logits, -np.inf)
            weights = np.exp(logits - logits.max(1, keepdims=True))
            found[:, part] = weights / weights.sum(1, keepdims=True) @ v[:, part]
        x = x + self.linear(found, f"{name}.attn.out_proj")
        hidden = self.linear(self.norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc")
        return x + self.linear(hidden * stats.norm.cdf(hidden), f"{name}.mlp.c_proj")

    def image(self, pixels: np.ndarray) -> np.ndarray:
        """32 × 32 pixels, so that nothing is resized; patches of 8."""
        x = (pixels / 255 - [0.48, 0.46, 0.41]) / [0.27, 0.26, 0.28]
        patches = x.reshape(4, 8, 4, 8, 3).transpose(0, 2, 4, 1, 3).reshape(16, -1)
        seen = patches @ self.w["visual.conv1.weight"].reshape(16, -1).T
        x = np.vstack([self.w["visual.class_embedding"], seen]) + self.w["visual.positional_embedding"]
        x = self.block(self.norm(x, "visual.ln_pre"), "visual.transformer.resblocks.0", causal=False)
        return self.norm(x, "visual.ln_post")[0] @ self.w["visual.proj"]

    def text(self, text: str) -> np.ndarray:
        tokens = [49406, *open_clip.SimpleTokenizer().encode(text)[:75], 49407]
        x = self.w["token_embedding.weight"][tokens] + self.w["positional_embedding"][: len(tokens)]
        x = self.block(x, "transformer.resblocks.0", causal=True)
        return self.norm(x, "ln_final")[-1] @ self.w["text_projection"]


def test_the_score_is_that_of_clip_written_out_in_numpy(folders: Any) -> None:
    """Facts, section 7: no line of open_clip's model is on the other side of this comparison."""
    plain, metric = Plain(folders.clip), ClipScore(str(folders.clip), long="head")
    rng = np.random.default_rng(4)
    texts = ["1girl, red hair", "moon", "x", "hat, " * 60]
    prompts = {str(k): Prompt(str(k), text, k) for k, text in enumerate(texts)}
    shown = [Picture(str(k), 0, rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for k in range(4)]
    found = metric.rows(shown, prompts)["clip_cosine"]
    for k, picture in enumerate(shown):
        image, text = plain.image(picture.pixels), plain.text(texts[k])
        cosine = image @ text / np.linalg.norm(image) / np.linalg.norm(text)
        assert found[k] == pytest.approx(100 * cosine, abs=1e-3)
    assert np.ptp(found) > 1
