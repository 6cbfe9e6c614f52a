"""FLOP and kept activations, counted on the networks, are the published ones and the plan's."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ambergrade.family import sdxl
from ambergrade.train.flops import StepFlop, peak_flops
from ambergrade.train.plan import ACTIVATIONS_GB, DEVICES, FORWARD_TFLOP
from ambergrade.train.trainer import save_memory

SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}


def test_a_step_is_counted_on_the_networks(networks):
    """By torch's counter on real values, forward and backward, at every setting of what is trained."""
    given = (torch.randn(1, 4, 8, 8), torch.tensor([5]), torch.randn(1, 77, networks.unet.config.cross_attention_dim))
    pooled = networks.unet.config.projection_class_embeddings_input_dim
    pooled -= 6 * networks.unet.config.addition_time_embed_dim
    added = {"text_embeds": torch.randn(1, pooled), "time_ids": torch.ones(1, 6)}
    # the CPU's fused attention is not counted by torch
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        networks.unet(*given, added_cond_kwargs=added)
    forward = counter.get_total_flops()
    text = []
    for encoder in (networks.text_encoder, networks.text_encoder_2):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            encoder(torch.zeros(1, 77, dtype=torch.int64))
        text.append(counter.get_total_flops())
    pixels = 8 * 2 ** (len(networks.vae.config.block_out_channels) - 1)
    for trained in ((1, 1), (0, 1), (0, 0)):
        lr = {"unet": 1, "te1": trained[0], "te2": trained[1]}
        found = StepFlop(networks, lr, 75).of_image((pixels, pixels))
        assert found == pytest.approx(
            3 * forward + sum((3 if t else 1) * f for t, f in zip(trained, text, strict=True))
        )
    three = StepFlop(networks, {"unet": 1, "te1": 1, "te2": 1}, 225)
    assert three.of_image((pixels, pixels)) > 3 * forward + 9 * sum(text)
    assert three.of_image((2 * pixels, pixels)) > three.of_image((pixels, pixels))


def test_bf16_weights_take_as_many(networks, tiny_config):
    half = sdxl.from_config(tiny_config, seed=7)
    for module in half.modules().values():
        module.to(torch.bfloat16)
    lr = {"unet": 1, "te1": 1, "te2": 1}
    assert StepFlop(half, lr, 75).of_image((64, 64)) == StepFlop(networks, lr, 75).of_image((64, 64)) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("tokens", "length"), [(75, 77), (225, 227)])
def test_the_plan_s_table_is_what_the_full_size_unet_takes(tokens, length):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL)
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            unet(torch.empty(1, 4, 128, 128), torch.zeros(1), torch.empty(1, length, 2048), added_cond_kwargs=added)
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    assert counter.get_total_flops() / 1e12 == pytest.approx(FORWARD_TFLOP[tokens], rel=1e-3)


def test_a_cpu_has_no_peak_and_gpus_are_known_by_name(monkeypatch):
    assert peak_flops(torch.device("cpu")) is None
    names = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA GeForce RTX 3090": "3090", "NVIDIA T4": None}
    for name, kind in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        expected = DEVICES[kind].peak_tflops * 1e12 if kind else None
        assert peak_flops(torch.device("cuda")) == expected


class Flash(torch.autograd.Function):
    """What flash attention keeps; the meta device would keep whole matrices of attention."""

    @staticmethod
    def forward(ctx, query, key, value):
        made, sums = torch.empty_like(query), torch.empty(*query.shape[:3], device=query.device)
        ctx.save_for_backward(query, key, value, made, sums)
        return made


@pytest.mark.slow
def test_the_plan_s_activations_are_what_the_full_size_unet_keeps(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, **_: Flash.apply(q, k, v))
    half = {"dtype": torch.bfloat16}
    encoder = SimpleNamespace(activation_checkpointing_enable=lambda _: None, gradient_checkpointing_enable=None)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SDXL).to(torch.bfloat16).train()
        weights = {p.untyped_storage()._cdata for p in unet.parameters()}
        added = {"text_embeds": torch.empty(1, 1280, **half), "time_ids": torch.empty(1, 6)}
        for checkpointing, planned in ACTIVATIONS_GB.items():
            networks = SimpleNamespace(unet=unet, encoders={"te1": encoder, "te2": encoder})
            asked = SimpleNamespace(checkpointing=checkpointing, compile=False, channels_last=False)
            save_memory(networks, asked)
            kept = {}

            def keep(tensor, kept=kept):
                storage = tensor.untyped_storage()
                if storage._cdata not in weights:
                    kept[storage._cdata] = storage
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                noisy, context = torch.empty(1, 4, 128, 128, **half), torch.empty(1, 77, 2048, **half)
                predicted = unet(noisy, torch.zeros(1), context, added_cond_kwargs=added).sample
            assert sum(storage.nbytes() for storage in kept.values()) / 1e9 == pytest.approx(planned, rel=0.01)
            del predicted
