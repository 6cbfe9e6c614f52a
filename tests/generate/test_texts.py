"""Booru prompts: spelling, weights, windows of 75 tokens, each judged by plain encoder calls."""

from __future__ import annotations

import pytest
import torch

from ambergrade.errors import BadInput
from ambergrade.family.sdxl import Networks
from ambergrade.generate.stream import pictures
from ambergrade.generate.texts import TextEncoder
from ambergrade.nouns import Prompt, PromptSet, SamplerSettings
from ambergrade.prompts import plain_text, read_prompt

SETTINGS = SamplerSettings(name="euler", steps=2, guidance=3.0, width=32, height=32, batch=8)


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("1girl, hat", (("1girl, hat", 1.0),)),
        ("(hat:1.2)", (("hat", 1.2),)),
        ("a_b_c, (red_hair:0.5), moon", (("a b c, ", 1.0), ("red hair", 0.5), (", moon", 1.0))),
        (r"(kohaku_\(world\):1.3)", (("kohaku (world)", 1.3),)),
        ("kohaku (world), (hat)", (("kohaku (world), ", 1.0), ("hat", 1.1))),
        ("(^_^:1.1), >_<", (("^_^", 1.1), (", >_<", 1.0))),
        ("time 12:30, (x: 1.25 )", (("time 12:30, ", 1.0), ("x", 1.25))),
        ("(1girl, (red_eyes:1.3), hat:1.2)", (("1girl, ", 1.2), ("red eyes", 1.56), (", hat", 1.2))),
        ("((smile:1.2)), 1girl", (("smile", 1.32), (", 1girl", 1.0))),
        ("[smile], [[hat]]", (("smile", round(1 / 1.1, 6)), (", ", 1.0), ("hat", round(1 / 1.21, 6)))),
        ("{smile}", (("smile", 1.05),)),
        ("(hat:1.), (smile:.5), (red_eyes : 1.2 )", (("hat, ", 1.0), ("smile", 0.5), (", ", 1.0), ("red eyes", 1.2))),
        ("(smile)(frown)", (("smile", 1.1), (", ", 1.0), ("frown", 1.1))),
        ("1girl ((smile))", (("1girl ", 1.0), ("smile", 1.21))),
        (r"by the sea, (o)_(o), kohaku \(world\)", (("by the sea, (o) (o), kohaku (world)", 1.0),)),
        (":(, >:), (:3), (9), (花)", ((":(, >:), ", 1.0), (":3", 1.1), (", (9), ", 1.0), ("花", 1.1))),
        ("(blue hair:1.0), (kohaku (world):1.2)", (("blue hair, ", 1.0), ("kohaku (world)", 1.2))),
        ("1girl\nhat,\n", (("1girl, hat", 1.0),)),
    ],
)
def test_weights_are_read_and_nothing_else_is(prompt: str, pieces: tuple[tuple[str, float], ...]) -> None:
    read = read_prompt(prompt)
    assert read.windows == (pieces,)
    assert plain_text(prompt) == "".join(text for text, _ in pieces)
    assert read.refused == ()


@pytest.mark.parametrize("prompt", ["", " , ,", "BREAK"])
def test_a_prompt_of_nothing_has_no_window(prompt: str) -> None:
    assert read_prompt(prompt).windows == ()
    assert plain_text(prompt) == ""


UNDRAWABLE = {
    "<lora:style_v2:0.8>, 1girl": "'<lora:style_v2:0.8>' loads a network",
    "embedding:bad_hands, 1girl": "'embedding:bad_hands' names a textual inversion",
    "1girl, __hair__": "'__hair__' is a wildcard",
    "cat AND dog": "'AND' joins two prompts",
    "(dress:-0.5), 1girl": "'(dress:-0.5)' has a negative weight",
    "[hat:scarf:0.5]": "'[hat:scarf:0.5]' changes or chooses words",
    "{red|blue} hair": "'{red|blue}' changes or chooses words",
    "(1girl, hat": "'(1girl' has no partner",
    "1girl, hat:1.2)": "'hat:1.2)' has no partner",
}


def test_what_cannot_be_drawn_is_refused_by_name_before_the_first_picture(networks: Networks) -> None:
    prompts = [Prompt(f"p{k}", text, k) for k, text in enumerate(UNDRAWABLE)]
    prompts.append(Prompt("negated", "1girl", 1, negative="<lora:other:1>"))
    with pytest.raises(BadInput) as caught:
        next(pictures(networks, PromptSet("t", (Prompt("ok", "hair", 1), *prompts)), SETTINGS, progress=None))
    for k, reason in enumerate(UNDRAWABLE.values()):
        assert f"Prompt 'p{k}': {reason}" in str(caught.value)
    assert "Prompt 'negated': '<lora:other:1>'" in str(caught.value)
    assert "'ok'" not in str(caught.value)


def test_equal_readings_are_one_condition_to_the_bit(networks: Networks) -> None:
    encoder = TextEncoder(networks)
    found = encoder(["blue_hair", "hair", "blue hair", "(blue hair:1.0)", "(blue hair:1.1)"])
    assert torch.equal(found[0][0], found[2][0])
    assert torch.equal(found[0][0], found[3][0])
    assert not torch.equal(found[0][0], found[4][0])
    alone = TextEncoder(networks)(["(blue hair:1.0)"])[0]
    assert torch.equal(alone[0], TextEncoder(networks)(["blue_hair"])[0][0])


def test_break_begins_a_new_window(networks: Networks) -> None:
    encoder = TextEncoder(networks)
    states, pooled = encoder(["hair, BREAK red_zebra"])[0]
    (first, first_pooled), (second, _) = encoder(["hair", "red zebra"])
    assert states.shape[0] == 2 * 75 + 2
    torch.testing.assert_close(states[:76], first[:76], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states[76:], second[1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, first_pooled, rtol=1e-4, atol=1e-5)
    with pytest.raises(BadInput, match="tokens in 9 windows"):
        encoder([" BREAK ".join(["hair"] * 9)])


def test_a_plain_prompt_is_the_pipelines_own(networks: Networks) -> None:
    states, pooled = networks.encode_text(["hair, zebra", ""])
    found = TextEncoder(networks)(["hair, zebra", ""])
    for k in (0, 1):
        torch.testing.assert_close(found[k][0], states[k])
        torch.testing.assert_close(found[k][1], pooled[k])


def test_a_weight_moves_only_its_tokens_away_from_the_empty_text(networks: Networks) -> None:
    encoder = TextEncoder(networks)
    plain, strong, none = encoder(["hair, zebra", "hair, (zebra:1.5)", "hair, (zebra:0)"])
    empty = encoder([""])[0]
    before = 1 + len(networks.tokenizer("hair, ", add_special_tokens=False).input_ids)
    zebra = slice(before, before + len(networks.tokenizer("zebra", add_special_tokens=False).input_ids))
    torch.testing.assert_close(strong[0][:before], plain[0][:before])
    torch.testing.assert_close(strong[0][zebra], empty[0][zebra] + 1.5 * (plain[0] - empty[0])[zebra])
    torch.testing.assert_close(none[0][zebra], empty[0][zebra])
    torch.testing.assert_close(strong[1], plain[1])  # the pooled text knows no weights


def test_long_prompts_are_windows_of_75_side_by_side(networks: Networks) -> None:
    words = ["hair"] * 90 + ["zebra"] * 70
    encoder = TextEncoder(networks)
    states, pooled = encoder([" ".join(words)])[0]
    tokens = networks.tokenizer(" ".join(words), add_special_tokens=False).input_ids
    windows = -(-len(tokens) // 75)
    assert windows >= 2
    assert states.shape[0] == 75 * windows + 2
    assert encoder.windows((states, pooled)) == windows
    first = networks.tokenizer.decode(tokens[:75])
    expected_states, expected_pooled = networks.encode_text([first])
    torch.testing.assert_close(states[:76], expected_states[0, :76], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled, expected_pooled[0], rtol=1e-4, atol=1e-5)


def test_neighbours_of_other_lengths_change_nothing(networks: Networks) -> None:
    short, long = Prompt("s", "hair", 1), Prompt("l", ", ".join(["zebra hair"] * 60), 2)

    def drawn(*prompts: Prompt) -> list[torch.Tensor]:
        stream = pictures(networks, PromptSet("t", prompts), SETTINGS, progress=None)
        return [torch.from_numpy(picture.pixels).int() for picture in stream]

    together = drawn(short, long)
    assert abs(together[0] - drawn(short)[0]).max() <= 1
    assert abs(together[1] - drawn(long)[0]).max() <= 1
    cut = Prompt("l", ", ".join(["zebra hair"] * 18), 2)
    assert abs(together[1] - drawn(cut)[0]).max() > 1  # what stands behind the first window is heard


def test_an_endless_prompt_is_refused_by_name(networks: Networks) -> None:
    endless = PromptSet("t", (Prompt("ok", "hair", 1), Prompt("endless", ", ".join(["zebra"] * 5000), 2)))
    with pytest.raises(BadInput, match="Prompt 'endless' has"):
        list(pictures(networks, endless, SETTINGS, progress=None))


def test_each_text_is_encoded_once_a_stream(networks: Networks) -> None:
    prompts = PromptSet("t", tuple(Prompt(str(k), "hair", k) for k in range(4)))
    calls: list[int] = []
    hook = networks.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    list(pictures(networks, prompts, SamplerSettings("euler", 1, 3.0, 32, 32, batch=1), progress=None))
    hook.remove()
    assert len(calls) == 1
