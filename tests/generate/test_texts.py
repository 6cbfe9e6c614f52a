"""Booru prompts: spelling, weights, windows of 75 tokens, each judged by plain encoder calls."""

from __future__ import annotations

import pytest
import torch

from ambergrade.errors import BadInput
from ambergrade.family import sdxl
from ambergrade.family.sdxl import Networks
from ambergrade.generate.stream import pictures
from ambergrade.generate.texts import TextEncoder, plain_text, weighted_text
from ambergrade.nouns import Prompt, PromptSet, SamplerSettings

SETTINGS = SamplerSettings(name="euler", steps=2, guidance=3.0, width=32, height=32, batch=8)


@pytest.mark.parametrize(
    ("prompt", "pieces"),
    [
        ("1girl, hat", (("1girl, hat", 1.0),)),
        ("(hat:1.2)", (("hat", 1.2),)),
        ("a_b_c, (red_hair:0.5), moon", (("a b c, ", 1.0), ("red hair", 0.5), (", moon", 1.0))),
        (r"(kohaku_\(world\):1.3)", (("kohaku (world)", 1.3),)),
        ("kohaku (world), (hat)", (("kohaku (world), (hat)", 1.0),)),
        ("(^_^:1.1), >_<", (("^_^", 1.1), (", >_<", 1.0))),
        ("time 12:30, (x: 1.25 )", (("time 12:30, ", 1.0), ("x", 1.25))),
        ("", ()),
        (" , ,", ()),
    ],
)
def test_weights_are_read_and_nothing_else_is(prompt: str, pieces: tuple[tuple[str, float], ...]) -> None:
    assert weighted_text(prompt) == pieces
    assert plain_text(prompt) == "".join(text for text, _ in pieces)


def test_a_plain_prompt_is_the_pipelines_own(networks: Networks) -> None:
    states, pooled = sdxl.encode_text(networks, ["hair, zebra", ""])
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
    expected_states, expected_pooled = sdxl.encode_text(networks, [first])
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
