"""Captions as tokens: two pads, up to three windows, no half tags, and what guidance is contrasted with."""

from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler
from transformers import CLIPTokenizer

from ambergrade.family import sdxl
from ambergrade.generate.texts import TextEncoder
from ambergrade.train.diffusion import alpha_bars
from ambergrade.train.settings import TrainSettings
from ambergrade.train.tokens import encode, tokenize_captions, unread_layer_left_out
from ambergrade.train.trainer import draw_micro_batch, fine_tune

SETTINGS = TrainSettings(
    images=4,
    batch=4,
    micro=4,
    lr={"unet": 1e-3, "te1": 1e-3, "te2": 1e-3},
    schedule={"name": "constant"},
    loss={"name": "eps"},
    optimizer={"name": "adamw"},
)


@pytest.fixture
def padded(networks, tiny_config) -> sdxl.Networks:
    """As SDXL's files have it: the second tokenizer pads with '!', which is token 0."""
    second = CLIPTokenizer.from_pretrained(tiny_config / "tokenizer_2", pad_token="!")
    assert second.pad_token_id == 0
    return replace(networks, tokenizer_2=second)


def special(networks):
    return networks.tokenizer.bos_token_id, networks.tokenizer.eos_token_id


@pytest.mark.parametrize("tokens", [75, 150, 225])
def test_each_window_begins_ends_and_pads_as_its_tokenizer_does(padded, tokens):
    begin, end = special(padded)
    word = padded.tokenizer("hair", add_special_tokens=False).input_ids
    comma = padded.tokenizer(",", add_special_tokens=False).input_ids
    assert len(word) == len(comma) == 1
    text = (word + comma) * 39 + word  # 79 tokens of 40 tags
    for ids, pad in zip(tokenize_captions(padded, [["hair"] * 40], tokens), (end, 0), strict=True):
        rows = [[begin, *text[:75], end]]
        if tokens > 75:
            rows.append([begin, *text[75:], end, *[pad] * 71])
        if tokens > 150:
            rows.append([begin, end, *[pad] * 75])  # empty, and still a window
        assert ids.tolist() == ([rows[0]] if tokens == 75 else [rows])


def test_one_window_is_the_stock_pipeline_s(padded):
    texts = [["1girl", "blue hair"], [], ["a long tag that goes on and on"] * 5]
    for ids, tokenizer in zip(
        tokenize_captions(padded, texts, 75), (padded.tokenizer, padded.tokenizer_2), strict=True
    ):
        stock = tokenizer(
            [", ".join(tags) for tags in texts],
            padding="max_length",
            max_length=77,
            truncation=True,
            return_tensors="pt",
        )
        assert torch.equal(ids, stock.input_ids)


@pytest.mark.parametrize("tokens", [150, 225])
def test_no_tag_is_cut_in_half(padded, tokens):
    tags = [f"tag number {n}" for n in range(60)]  # of 11 and more tokens
    tokenizer = padded.tokenizer
    _, end = special(padded)
    rows = tokenize_captions(padded, [tags], tokens)[0][0].tolist()
    shown = [token for row in rows for token in row[1 : row.index(end)]]
    whole = {count: tokenizer(", ".join(tags[:count]), add_special_tokens=False).input_ids for count in range(61)}
    fits = max(count for count, ids in whole.items() if len(ids) <= tokens)
    assert 0 < fits < 60
    assert shown == whole[fits]
    alone = tokenize_captions(padded, [["x" * 300]], tokens)[0][0]
    assert (alone[:, 1:76] != end).all()  # one tag that is too long is cut, having no better place


@pytest.mark.parametrize("tokens", [150, 225])
def test_windows_lie_side_by_side_and_the_first_is_pooled(padded, tokens):
    """Against the stock encoders run on each window."""
    ids_1, ids_2 = tokenize_captions(padded, [["hair"] * 40, ["horns"]], tokens)
    with torch.no_grad():
        states, pooled = encode(padded, (ids_1, ids_2))
        for number in range(2):
            first = padded.text_encoder(ids_1[number], output_hidden_states=True).hidden_states[-2]
            second = padded.text_encoder_2(ids_2[number], output_hidden_states=True)
            both = torch.cat([first, second.hidden_states[-2]], dim=-1)
            expected = torch.cat([both[0, :1], *(window[1:76] for window in both), both[-1, 76:]])
            torch.testing.assert_close(states[number], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(pooled[number], second.text_embeds[0], rtol=1e-4, atol=1e-5)
    assert states.shape == (2, tokens + 2, 16 + 24)


@pytest.mark.parametrize("tokens", [150, 225])
def test_words_beyond_the_first_window_are_learnt(networks, captions, latents, tmp_path, tokens):
    """A letter that only the last tag has, beyond 75 tokens, gets a gradient in both encoders; with 75 it gets none."""
    pictures = [replace(p, caption=replace(p.caption, keep=("hair",) * 40, flexible=("q",))) for p in captions.pictures]
    long = replace(captions, pictures=tuple(pictures))
    letter = networks.tokenizer("q", add_special_tokens=False).input_ids[0]
    sizes = {}
    for asked in (75, tokens):
        settings = replace(SETTINGS, tokens=asked, clip=0.0)

        def keep(gradients, asked=asked):
            tables = [name for name in gradients if name.endswith("token_embedding.weight")]
            sizes[asked] = [float(gradients[name][letter].abs().max()) for name in tables]

        held, folder = (long, latents), tmp_path / str(asked)
        report = fine_tune(networks, long, latents, settings, scratch=folder, on_gradient=keep, validation=held)
        assert report.after.mean > 0
    assert sizes[75] == [0.0, 0.0]  # of both encoders
    assert min(sizes[tokens]) > 0


def test_a_dropped_caption_is_what_guidance_is_contrasted_with(networks, captions, latents):
    """Training's empty caption, the stock pipeline's negative prompt, and its absence are one and the same."""
    alphas = alpha_bars(networks.scheduler_config)
    settings = replace(SETTINGS, caption_dropout=0.999999)
    micro = draw_micro_batch(networks, captions.pictures[:1], latents.rows((64, 64), [0]), [0], alphas, settings)
    pipe = networks.pipeline(DDPMScheduler.from_config(networks.scheduler_config))
    with torch.no_grad():
        states, pooled = encode(networks, micro.ids)
        for negative in (None, ""):
            _, uncond, _, uncond_pooled = pipe.encode_prompt("1girl", negative_prompt=negative)
            torch.testing.assert_close(states, uncond)
            torch.testing.assert_close(pooled, uncond_pooled)
    assert uncond.abs().max() > 0


def test_a_long_caption_is_read_alike_in_training_and_in_sampling(padded):
    tags = ["hair"] * 100  # 199 tokens
    encoder = TextEncoder(padded)
    with torch.no_grad():
        ids = tokenize_captions(padded, [tags], 225)
        states, pooled = encode(padded, ids)
        ((drawn, drawn_pooled),) = encoder([", ".join(tags)])
    torch.testing.assert_close(drawn, states[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(drawn_pooled, pooled[0], rtol=1e-4, atol=1e-5)


def test_the_layer_that_nobody_reads_is_not_computed_and_changes_nothing(padded):
    ids = tokenize_captions(padded, [["hair", "horns"], ["tail"]], 75)
    whole = encode(padded, ids)
    last, calls = padded.text_encoder.encoder.layers[-1], []
    hook = last.self_attn.register_forward_hook(lambda *_: calls.append(1))
    with unread_layer_left_out(padded):
        for found, value in zip(encode(padded, ids), whole, strict=True):
            assert torch.equal(found, value)
        assert not calls
    encode(padded, ids)
    hook.remove()
    assert len(calls) == 1
