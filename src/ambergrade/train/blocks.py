"""The UNet's transformer block as one node of autograd, with its backward pass written out, for training on a CPU.

SDXL has 70 such blocks. Where their tensors are small, most of a block's time goes into the bookkeeping of some sixty
recorded operations, not into sums; here the same kernels are called with none recorded. A GPU, mixed precision,
adapters and compiled blocks keep the stock form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import Attention, BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu

# The pair that torch's own scaled_dot_product_attention takes on a CPU, so that its values are the stock block's.
_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_norm_backward = torch.ops.aten.native_layer_norm_backward.default
_gelu_backward = torch.ops.aten.gelu_backward.default

ALL = [True, True, True]


class _Block(torch.autograd.Function):
    """x + self-attention, + attention to the words, + GEGLU, each of a layer norm.

    Tensors are flattened to rows; N images, T pixels, S words, C channels, H heads. `w` are weights, `b` biases.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, words: Tensor, heads: int, eps: tuple[float, float, float], *weights: Tensor
    ) -> Tensor:
        """(N, T, C) from (N, T, C), words (N, S, W) and the tensors that `_weights` lists."""
        w1, b1, wq, wk, wv, wo, bo, w2, b2, uq, uk, uv, uo, co, w3, b3, wi, bi, wf, bf = weights
        shape, count = x.shape, words.shape[0]
        width = [shape[-1]]
        x, words = x.reshape(-1, width[0]), words.reshape(-1, words.shape[-1])

        n1, mean1, rstd1 = torch.native_layer_norm(x, width, w1, b1, eps[0])
        q, k, v = (_by_head(torch.mm(n1, w.t()), count, heads) for w in (wq, wk, wv))
        a1, sums1 = _attention(q, k, v)
        x1 = torch.addmm(bo, _rows(a1), wo.t()).add_(x)

        n2, mean2, rstd2 = torch.native_layer_norm(x1, width, w2, b2, eps[1])
        p = _by_head(torch.mm(n2, uq.t()), count, heads)
        r, s = (_by_head(torch.mm(words, w.t()), count, heads) for w in (uk, uv))
        a2, sums2 = _attention(p, r, s)
        x2 = torch.addmm(co, _rows(a2), uo.t()).add_(x1)

        n3, mean3, rstd3 = torch.native_layer_norm(x2, width, w3, b3, eps[2])
        # two products, since what reads halves of one would walk over gaps
        value, gate = (torch.addmm(b, n3, w.t()) for b, w in zip(bi.chunk(2), wi.chunk(2), strict=True))
        open_ = gelu(gate)
        inner = value * open_
        out = torch.addmm(bf, inner, wf.t()).add_(x2)

        norms = (mean1, rstd1, mean2, rstd2, mean3, rstd3)
        attentions = (q, k, v, a1, sums1, p, r, s, a2, sums2)
        ctx.save_for_backward(x, words, x1, x2, n1, n2, n3, *norms, *attentions, value, gate, open_, inner, *weights)
        ctx.sizes = count, heads
        return out.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upper: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients in the order of `forward`'s arguments."""
        x, words, x1, x2, n1, n2, n3, mean1, rstd1, mean2, rstd2, mean3, rstd3, *rest = ctx.saved_tensors
        q, k, v, a1, sums1, p, r, s, a2, sums2, value, gate, open_, inner, *rest = rest
        w1, b1, wq, wk, wv, wo, _, w2, b2, uq, uk, uv, uo, _, w3, b3, wi, _, wf, _ = rest
        count, heads = ctx.sizes
        width, shape = [x.shape[-1]], upper.shape
        upper = upper.reshape(x.shape)

        inward = torch.mm(upper, wf)
        dwf, dbf = torch.mm(upper.t(), inner), upper.sum(0)
        dgate = _gelu_backward(inward * value, gate)
        dvalue = inward.mul_(open_)
        dwi, dbi = torch.empty_like(wi), torch.empty_like(wi[:, 0])
        for half, weight, bias in zip((dvalue, dgate), dwi.chunk(2), dbi.chunk(2), strict=True):
            torch.mm(half.t(), n3, out=weight)
            torch.sum(half, 0, out=bias)
        lower = torch.mm(dvalue, wi.chunk(2)[0]).addmm_(dgate, wi.chunk(2)[1])
        d2, dw3, db3 = _norm_backward(lower, x2, width, mean3, rstd3, w3, b3, ALL)
        d2 += upper

        duo, dco = torch.mm(d2.t(), _rows(a2)), d2.sum(0)
        lower = _by_head(torch.mm(d2, uo), count, heads)
        dp, dr, ds = map(_rows, _attention_backward(lower, p, r, s, a2, sums2, 0.0, False))
        duq, duk, duv = torch.mm(dp.t(), n2), torch.mm(dr.t(), words), torch.mm(ds.t(), words)
        dwords = torch.mm(dr, uk).addmm_(ds, uv).view(count, -1, words.shape[-1]) if ctx.needs_input_grad[1] else None
        d1, dw2, db2 = _norm_backward(torch.mm(dp, uq), x1, width, mean2, rstd2, w2, b2, ALL)
        d1 += d2

        dwo, dbo = torch.mm(d1.t(), _rows(a1)), d1.sum(0)
        lower = _by_head(torch.mm(d1, wo), count, heads)
        dq, dk, dv = map(_rows, _attention_backward(lower, q, k, v, a1, sums1, 0.0, False))
        dwq, dwk, dwv = (torch.mm(d.t(), n1) for d in (dq, dk, dv))
        lower = torch.mm(dq, wq).addmm_(dk, wk).addmm_(dv, wv)
        d0, dw1, db1 = _norm_backward(lower, x, width, mean1, rstd1, w1, b1, ALL)
        d0 += d1

        first = (dw1, db1, dwq, dwk, dwv, dwo, dbo)
        second = (dw2, db2, duq, duk, duv, duo, dco)
        return d0.view(shape), dwords, None, None, *first, *second, dw3, db3, dwi, dbi, dwf, dbf


@contextmanager
def blocks_as_one(unet: nn.Module) -> Iterator[None]:
    """While it lasts, the UNet's transformer blocks train as one node each where that is the same; else as they are."""
    changed = [block for block in unet.modules() if isinstance(block, BasicTransformerBlock) and _is_plain(block)]
    for block in changed:
        block.forward = _forward_of(block)
    try:
        yield
    finally:
        for block in changed:
            del block.forward


def _forward_of(block: BasicTransformerBlock) -> Callable[..., Tensor]:
    """A forward with the stock one's arguments. It decides call by call: validation and samples take the stock one."""
    stock, weights, heads = block.forward, _weights(block), block.num_attention_heads
    eps = (block.norm1.eps, block.norm2.eps, block.norm3.eps)

    def forward(
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        words, dtype = encoder_hidden_states, hidden_states.dtype
        if (
            words is None
            or attention_mask is not None
            or encoder_attention_mask is not None
            or cross_attention_kwargs
            or not (torch.is_grad_enabled() and weights[0].requires_grad)
            or hidden_states.device.type != "cpu"
            or not dtype == words.dtype == weights[0].dtype
            or dtype not in (torch.float32, torch.float64)
            or torch.is_autocast_enabled("cpu")
        ):
            found: Tensor = stock(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
            return found
        made: Tensor = _Block.apply(hidden_states, words, heads, eps, *weights)
        return made

    return forward


def _weights(block: BasicTransformerBlock) -> list[Tensor]:
    """In the order that `_Block` takes them."""
    found = []
    for norm, attention in ((block.norm1, block.attn1), (block.norm2, block.attn2)):
        found += [norm.weight, norm.bias, attention.to_q.weight, attention.to_k.weight, attention.to_v.weight]
        found += [attention.to_out[0].weight, attention.to_out[0].bias]
    outer, inner = block.ff.net[0].proj, block.ff.net[2]
    return [*found, block.norm3.weight, block.norm3.bias, outer.weight, outer.bias, inner.weight, inner.bias]


def _is_plain(block: BasicTransformerBlock) -> bool:
    """Whether the block computes what `_Block` does: SDXL's form, of layers that nobody has wrapped."""
    if block.norm_type != "layer_norm" or block.pos_embed is not None or block._chunk_size is not None:
        return False
    if block.attn2 is None or block.only_cross_attention or not isinstance(block.ff.net[0], GEGLU):
        return False
    layers = [block.ff.net[0].proj, block.ff.net[2]]
    for attention in (block.attn1, block.attn2):
        if not _is_plain_attention(attention):
            return False
        layers += [attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]]
    if any(type(layer) is not nn.Linear for layer in layers) or any(map(_is_wrapped, block.modules())):
        return False
    unused = [module for module in block.modules() if isinstance(module, nn.Dropout)]
    biased = [layer for layer in layers if layer.bias is not None]
    return (
        len(biased) == 4 and all(dropout.p == 0 for dropout in unused) and all(w is not None for w in _weights(block))
    )


def _is_wrapped(module: nn.Module) -> bool:
    """Whether somebody else computes or listens here; on the block itself, listeners are called as ever."""
    if isinstance(module, BasicTransformerBlock):
        return "forward" in vars(module)
    heard = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" in vars(module) or any(heard)


def _is_plain_attention(attention: Attention) -> bool:
    added = (attention.norm_q, attention.norm_k, attention.group_norm, attention.spatial_norm, attention.norm_cross)
    return (
        type(attention.processor) is AttnProcessor2_0
        and all(not part for part in added)
        and not attention.residual_connection
        and attention.rescale_output_factor == 1
    )


def _by_head(rows: Tensor, count: int, heads: int) -> Tensor:
    """(N, H, T, C / H) of (N T, C), a view."""
    return rows.view(count, -1, heads, rows.shape[-1] // heads).transpose(1, 2)


def _rows(by_head: Tensor) -> Tensor:
    """(N T, C) of (N, H, T, C / H); attention on a CPU lays it out so that nothing is copied."""
    count, heads, tokens, width = by_head.shape
    return by_head.transpose(1, 2).reshape(count * tokens, heads * width)
