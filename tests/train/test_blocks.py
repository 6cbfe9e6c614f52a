"""A transformer block as one node against diffusers' own block, in double precision, and where it steps aside."""

from contextlib import nullcontext

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import nn

from ambergrade.family import sdxl
from ambergrade.train.blocks import blocks_as_one
from ambergrade.train.tokens import encode, tokenize_captions, unread_layer_left_out

HEADS, WIDTH, WORDS = 2, 12, 10


class Net(nn.Module):
    """One block, where `blocks_as_one` finds it."""

    def __init__(self, **changed) -> None:
        super().__init__()
        torch.manual_seed(3)
        kind = {"num_attention_heads": HEADS, "attention_head_dim": WIDTH // HEADS, "cross_attention_dim": WORDS}
        self.block = BasicTransformerBlock(WIDTH, **kind, **changed).double().train()
        for parameter in self.parameters():  # norms begin at 1 and 0, which would hide a factor
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x, words):
        return self.block(x, encoder_hidden_states=words)


@pytest.fixture
def given():
    draw = torch.Generator().manual_seed(4)
    x, words = (torch.randn(3, n, c, generator=draw, dtype=torch.float64) for n, c in ((7, WIDTH), (5, WORDS)))
    return x.requires_grad_(), words.requires_grad_(), torch.randn(3, 7, WIDTH, generator=draw, dtype=torch.float64)


def gradients(net, x, words, upper):
    """The block's output and every gradient by name."""
    made = net(x, words)
    wanted = {"x": x, "words": words, **dict(net.named_parameters())}
    wanted = {name: value for name, value in wanted.items() if value.requires_grad}
    found = torch.autograd.grad(made, list(wanted.values()), upper)
    return made, dict(zip(wanted, found, strict=True))


def nodes(net, x, words):
    """Nodes of autograd between the output and its leaves."""
    seen, todo = set(), [net(x, words).grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen and type(node).__name__ != "AccumulateGrad":
            seen.add(node)
            todo += [upper for upper, _ in node.next_functions]
    return len(seen)


def test_one_node_gives_the_stock_block_s_output_and_gradients(given):
    net = Net()
    made, stock = gradients(net, *given)
    many = nodes(net, *given[:2])
    with blocks_as_one(net):
        ours, found = gradients(net, *given)
        assert nodes(net, *given[:2]) == 1
    assert many > 40
    torch.testing.assert_close(ours, made, rtol=1e-12, atol=1e-12)
    assert len(found) == 2 + 20
    assert found.keys() == stock.keys()
    for name, value in stock.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=lambda text, name=name: name + text)


def test_its_gradient_is_that_of_finite_differences(given):
    net, (x, words, _) = Net(), given
    with blocks_as_one(net):
        assert torch.autograd.gradcheck(lambda *inputs: net(*inputs), (x, words), eps=1e-6, atol=1e-7)


def test_frozen_weights_and_words_get_no_gradient(given):
    x, words, upper = given
    net = Net()
    net.requires_grad_(False)
    _, stock = gradients(net, x, words, upper)
    with blocks_as_one(net):
        _, found = gradients(net, x, words, upper)
        assert found.keys() == stock.keys() == {"x", "words"}
        torch.testing.assert_close(found, stock, rtol=1e-10, atol=1e-12)
        net.requires_grad_(True)
        _, found = gradients(net, x, words.detach(), upper)
        assert "words" not in found
        net(x.detach(), words.detach()).backward(upper)
    assert all(parameter.grad is not None for parameter in net.parameters())


@pytest.mark.parametrize(
    "changed", [{"dropout": 0.1}, {"activation_fn": "gelu"}, {"attention_bias": True}, {"norm_type": "ada_norm_zero"}]
)
def test_blocks_of_another_form_are_left_alone(changed):
    net = Net(**changed, **({"num_embeds_ada_norm": 4} if "norm_type" in changed else {}))
    with blocks_as_one(net):
        assert "forward" not in vars(net.block)


def test_wrapped_layers_masks_and_drawing_keep_the_stock_form(given):
    x, words, _ = given
    net = Net()
    with blocks_as_one(net):
        assert "forward" in vars(net.block)
        with torch.no_grad():  # the very same bits as without
            drawn = net(x, words)
        with torch.autocast("cpu", torch.bfloat16):
            half = net(x, words)
        mask = torch.tensor([[0.0, 0.0, -1e4, 0.0, 0.0]] * 3, dtype=torch.float64)[:, None]
        masked = net.block(x, encoder_hidden_states=words, encoder_attention_mask=mask)
    assert "forward" not in vars(net.block)
    assert torch.equal(drawn, net(x, words))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half, net(x, words))
    assert torch.equal(masked, net.block(x, encoder_hidden_states=words, encoder_attention_mask=mask))
    assert not torch.allclose(masked, drawn)
    hook = net.block.norm2.register_forward_hook(lambda *_: None)
    with blocks_as_one(net):
        assert "forward" not in vars(net.block)
    hook.remove()
    net.block.attn1.to_q.forward = lambda rows: rows * 0  # as LyCORIS wraps a layer
    with blocks_as_one(net):
        assert "forward" not in vars(net.block)


def test_all_three_networks_get_the_stock_gradient_to_single_precision(tiny_config):
    """In fp32, as the embedded world trains; the measure is the same gradient in double precision."""
    found = {}
    for name, dtype, ours in (("exact", torch.float64, False), ("stock", None, False), ("ours", None, True)):
        live = sdxl.from_config(tiny_config, seed=7)
        modules = nn.ModuleList([live.unet, live.text_encoder, live.text_encoder_2]).train().to(dtype)
        ids = tokenize_captions(live, [["hair", "horns"], ["tail"]], 75)
        draw = torch.Generator().manual_seed(2)
        noisy, upper = torch.randn(2, 2, 4, 8, 8, generator=draw).to(dtype or torch.float32)
        with (
            blocks_as_one(live.unet) if ours else nullcontext(),
            unread_layer_left_out(live.text_encoder) if ours else nullcontext(),
        ):
            states, pooled = encode(modules[1], modules[2], *ids)
            added = {"text_embeds": pooled, "time_ids": torch.ones(2, 6, dtype=pooled.dtype)}
            predicted = live.unet(noisy, torch.tensor([3, 700]), states, added_cond_kwargs=added).sample
            predicted.backward(upper)
        found[name] = {key: p.grad.double() for key, p in modules.named_parameters() if p.grad is not None}
    assert found["ours"].keys() == found["stock"].keys() == found["exact"].keys()
    assert any("attn2.to_k" in key for key in found["ours"])
    off = {
        name: torch.stack([(found[name][key] - exact).square().sum() for key, exact in found["exact"].items()]).sum()
        for name in ("stock", "ours")
    }
    whole = torch.stack([exact.square().sum() for exact in found["exact"].values()]).sum()
    assert off["ours"] / whole < 1e-10  # squares: 1e-5 of the norm
    assert off["ours"] < 16 * off["stock"]  # no worse than rounding makes the stock form
