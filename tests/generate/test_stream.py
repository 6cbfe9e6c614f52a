"""The picture stream, judged by the stock pipeline called the ordinary way."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from ambergrade.errors import BadInput, BadSetting
from ambergrade.family import sdxl
from ambergrade.family.sdxl import Networks
from ambergrade.generate.stream import _draw_alike, pictures, scheduler
from ambergrade.generate.text_cache import remembered_text
from ambergrade.generate.texts import TextEncoder
from ambergrade.nouns import Prompt, PromptSet, SamplerSettings

SETTINGS = SamplerSettings(name="euler", steps=3, guidance=4.0, width=64, height=48, batch=8)
TEXTS = ["1girl, hair", "zebra", "1girl, hair"]
SEEDS = [7, 7, 2**62]


def drawn(
    networks: Networks, settings: SamplerSettings = SETTINGS, texts: Sequence[str] = TEXTS, negative: str = ""
) -> npt.NDArray[np.int64]:
    prompts = [Prompt(str(n), text, seed, negative) for n, (text, seed) in enumerate(zip(texts, SEEDS, strict=True))]
    stream = pictures(networks, PromptSet("test", tuple(prompts)), settings, progress=None)
    return np.stack([picture.pixels for picture in stream]).astype(np.int64)


def stock(networks: Networks, negative: str = "", **changes: object) -> npt.NDArray[np.int64]:
    pipeline = networks.pipeline(scheduler("euler", networks.scheduler_config))
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "width": 64, "height": 48, **changes}
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    images = pipeline(prompt=TEXTS, negative_prompt=[negative] * 3, generator=generators, **settings).images
    return np.stack([np.asarray(image) for image in images]).astype(np.int64)


@pytest.fixture(scope="module")
def ours(networks: Networks) -> npt.NDArray[np.int64]:
    return drawn(networks)


def test_the_pictures_are_the_stock_pipelines(networks: Networks, ours: npt.NDArray[np.int64]) -> None:
    assert ours.shape == (3, 48, 64, 3)
    assert abs(ours - stock(networks)).max() <= 1
    assert abs(ours[0] - ours[1]).mean() > 5  # the text is heard
    assert abs(ours[0] - ours[2]).mean() > 5  # and so is the seed


def test_a_negative_prompt_and_guidance_are_the_stock_pipelines(
    networks: Networks, ours: npt.NDArray[np.int64]
) -> None:
    with_negative = drawn(networks, negative="hair")
    assert abs(with_negative - stock(networks, "hair")).max() <= 1
    assert abs(with_negative - ours).mean() > 2
    unguided = drawn(networks, dataclasses.replace(SETTINGS, guidance=1.0))
    assert abs(unguided - stock(networks, guidance_scale=1.0)).max() <= 1
    assert abs(unguided - ours).mean() > 2


def test_rescaled_guidance_is_the_stock_pipelines(networks: Networks, ours: npt.NDArray[np.int64]) -> None:
    rescaled = drawn(networks, dataclasses.replace(SETTINGS, rescale=0.7))
    assert abs(rescaled - stock(networks, guidance_rescale=0.7)).max() <= 1
    assert abs(rescaled - ours).mean() > 1
    for wrong in ({"rescale": 1.5}, {"clip_skip": 0}, {"clip_skip": 3}):
        with pytest.raises(BadSetting, match=f"{next(iter(wrong))} is"):
            drawn(networks, dataclasses.replace(SETTINGS, **wrong))


def test_clip_skip_reads_another_layer_of_both_encoders(networks: Networks, ours: npt.NDArray[np.int64]) -> None:
    """1 is the last layer before its norm; short, weighted and long texts alike."""
    ids_1, ids_2 = sdxl.tokenize(networks, ["hair"])
    states = [
        encoder(ids, output_hidden_states=True).hidden_states[-1]
        for encoder, ids in ((networks.text_encoder, ids_1), (networks.text_encoder_2, ids_2))
    ]
    encoder = TextEncoder(networks)
    (plain, _), (heavy, _) = encoder(["hair", "(hair:1.5)"], skip=1)
    (usual, _), _ = encoder(["hair", "zebra"])
    empty = encoder([""], skip=1)[0][0]
    torch.testing.assert_close(plain, torch.cat(states, -1)[0])
    assert not torch.allclose(plain, usual, atol=1e-3)
    tokens = slice(1, 1 + len(networks.tokenizer("hair", add_special_tokens=False).input_ids))
    torch.testing.assert_close(heavy[tokens], (empty + 1.5 * (plain - empty))[tokens], rtol=1e-4, atol=1e-5)
    assert abs(drawn(networks, dataclasses.replace(SETTINGS, clip_skip=1)) - ours).mean() > 1


def test_pictures_do_not_depend_on_the_batch(networks: Networks, ours: npt.NDArray[np.int64]) -> None:
    for batch in (1, 2):
        assert abs(drawn(networks, dataclasses.replace(SETTINGS, batch=batch)) - ours).max() <= 1


def test_booru_spelling_is_taken_out(networks: Networks, ours: npt.NDArray[np.int64]) -> None:
    long_hair = drawn(networks, texts=["long hair (x)", "zebra", "hair"])
    assert np.array_equal(long_hair, drawn(networks, texts=[r"long_hair_\(x\)", "zebra,", "hair"]))
    assert not np.array_equal(long_hair, ours)


def test_every_level_of_a_pixel_comes_through_rounded(networks: Networks) -> None:
    """Trap 1: [-1, 1] to [0, 1] to 255 levels and cut instead of rounded, 63 of 256 levels fall by one."""
    levels = torch.arange(256, dtype=torch.float32).reshape(16, 16)
    decoded = ((levels / 127.5 - 1) / 2 + 0.5).expand(1, 3, 16, 16)
    assert ((decoded * 255).byte()[0, 0] != levels).sum() > 50

    class Decoded:
        def __call__(self, **settings: object) -> object:
            return SimpleNamespace(images=decoded)

    nothing = (torch.zeros(3, 4), torch.zeros(4))
    found = _draw_alike(Decoded(), networks, [Prompt("a", "", 0)], SETTINGS, [(nothing, nothing)])[0]
    assert found is not None
    assert torch.equal(found, levels.to(torch.uint8)[..., None].expand(16, 16, 3))


def test_the_stream_yields_in_order_and_lazily(networks: Networks) -> None:
    prompts = PromptSet("test", tuple(Prompt(f"p{n}", "hair", n) for n in range(3)))
    stream = pictures(networks, prompts, dataclasses.replace(SETTINGS, batch=1, steps=1), progress=None)
    calls: list[int] = []
    hook = networks.unet.register_forward_hook(lambda *_: calls.append(1))
    first = next(stream)
    hook.remove()
    assert (first.prompt_id, first.seed, len(calls)) == ("p0", 0, 1)
    assert [picture.prompt_id for picture in stream] == ["p1", "p2"]
    assert first.pixels.dtype == np.uint8


def test_bad_settings_and_broken_weights_are_refused(networks: Networks) -> None:
    wrong = SamplerSettings("euler", steps=0, guidance=0.5, width=60, height=64)
    with pytest.raises(BadSetting, match=r"steps is 0.*guidance is 0.5.*width is 60"):
        drawn(networks, wrong)
    bias = networks.unet.conv_out.bias
    kept = bias.detach().clone()
    try:
        bias.data[0] = float("nan")
        with pytest.raises(BadInput, match="prompt '0'"):
            drawn(networks)
        prompts = PromptSet("test", (Prompt("a", "hair", 5), Prompt("b", "zebra", 6)))
        faulty = list(pictures(networks, prompts, SETTINGS, progress=None, faulty=True))
        assert [(p.prompt_id, p.seed, p.pixels.size) for p in faulty] == [("a", 5, 0), ("b", 6, 0)]
        assert all("NaN" in p.fault for p in faulty)
    finally:
        bias.data.copy_(kept)


def test_remembered_text_spares_calls_and_changes_no_bit(networks: Networks) -> None:
    projection = next(module for name, module in networks.unet.named_modules() if name.endswith("attn2.to_k"))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    texts = [networks.encode_text([text] * 2) for text in ("hair", "zebra")]

    def denoised(text: tuple[Tensor, Tensor]) -> Tensor:
        condition = {"text_embeds": text[1], "time_ids": torch.full((2, 6), 64.0)}
        guess: Tensor = networks.unet(latents, 500, text[0], added_cond_kwargs=condition, return_dict=False)[0]
        return guess

    with torch.inference_mode():
        expected = [denoised(text) for text in texts]
        with remembered_text(networks.unet):
            first = [denoised(texts[0]), denoised(texts[0])]
            answers = [projection(texts[0][0]) is projection(texts[0][0])]
            second = denoised(texts[1])
    assert all(torch.equal(guess, expected[0]) for guess in first)
    assert torch.equal(second, expected[1])
    assert not torch.equal(expected[0], expected[1])
    assert answers == [True]
    assert "forward" not in vars(projection)


def test_streams_that_share_an_encoder_encode_a_text_once(networks: Networks) -> None:
    prompts = PromptSet("test", (Prompt("a", "hair", 1),))
    settings = dataclasses.replace(SETTINGS, steps=1)
    texts, calls = TextEncoder(networks), []
    hook = networks.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    one, two = (next(pictures(networks, prompts, settings, progress=None, texts=texts)) for _ in range(2))
    hook.remove()
    assert len(calls) == 1
    assert np.array_equal(one.pixels, two.pixels)
