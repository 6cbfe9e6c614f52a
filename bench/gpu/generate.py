"""Full-size SDXL at random weights on one GPU: our stream against a stock diffusers pipeline, in one run.

python bench/gpu/generate.py [--pictures 16] [--batch 8] [--steps 28] [--side 1024]

Prints pictures a second of both, their ratio, our share of the bf16 matrix rate measured in the same run (389 TFLOP a
picture of 28 steps at 1024²; UNet 6.761 a step and half of guidance, VAE 10.47), and what a battery of scorers at
random weights (CLIP ViT-L/14, WD SwinV2, Inception, DINOv2-L) adds. Needs no weights and no network.

`--tiny` walks through every line with the embedded world's networks and scorers on whatever is here: it shows that the
bench runs, and its figures mean nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import open_clip
import timm
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ambergrade.family import sdxl
from ambergrade.generate.fast import accelerate, drawn_ahead
from ambergrade.generate.stream import pictures
from ambergrade.nouns import Prompt, PromptSet, SamplerSettings
from ambergrade.store import find_file

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
UNET, DECODER, TEXT = 6.761e12, 10.47e12, 0.11e12
"""FLOP of one UNet call and one decode at 1024², and of both text encoders (facts/evaluation.md, section 3)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    if not torch.cuda.is_available() and not asked.tiny:
        raise SystemExit("No GPU here: this bench measures nothing on a CPU. --tiny shows that it runs.")
    prompts = PromptSet("bench", tuple(Prompt(str(k), "1girl, dragon horns", k) for k in range(asked.pictures)))
    sampler = SamplerSettings("euler", asked.steps, 7.0, asked.side, asked.side, asked.batch)
    networks = tiny() if asked.tiny else full_size()

    stock = networks.pipeline(EulerDiscreteScheduler.from_config(networks.scheduler_config))
    stock.set_progress_bar_config(disable=True)

    def draw_stock() -> None:
        for start in range(0, asked.pictures, asked.batch):
            some = [prompt.text for prompt in prompts.prompts[start : start + asked.batch]]
            stock(some, num_inference_steps=asked.steps, guidance_scale=7.0, width=asked.side, height=asked.side)

    rate = matrix_rate(256 if asked.tiny else 8192)
    stock_s = seconds(draw_stock)
    accelerate(networks, backend="eager" if asked.tiny else "inductor")
    ours_s = seconds(lambda: list(pictures(networks, prompts, sampler, progress=None)))
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    networks.assign({key: value * 0.999 for key, value in networks.tensors().items() if value.ndim})
    seconds(lambda: list(pictures(networks, prompts, sampler, progress=None)), warm=False)
    again = torch._dynamo.utils.counters["stats"]["unique_graphs"] - compiled
    score = tiny_battery() if asked.tiny else battery()

    def scored() -> None:
        waiting: list[Any] = []
        for picture in drawn_ahead(pictures(networks, prompts, sampler, progress=None), ahead=2 * asked.batch):
            waiting.append(torch.from_numpy(picture.pixels))
            if len(waiting) == asked.batch:
                score(torch.stack(waiting).to(DEVICE).permute(0, 3, 1, 2).float() / 127.5 - 1)
                waiting.clear()
        if waiting:
            score(torch.stack(waiting).to(DEVICE).permute(0, 3, 1, 2).float() / 127.5 - 1)

    scored_s = seconds(scored)
    scale = (asked.side / 1024) ** 2
    flop = asked.pictures * (scale * (2 * asked.steps * UNET + DECODER) + TEXT)
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"{where}, torch {torch.__version__}, bf16 matrices {rate / 1e12:.0f} TFLOP/s")
    print(f"stock pipeline, bf16      {asked.pictures / stock_s:6.3f} pictures/s")
    print(f"ours                      {asked.pictures / ours_s:6.3f} pictures/s   {stock_s / ours_s:.2f} x")
    print(f"share of the matrix rate  {100 * flop / ours_s / rate:6.1f} %   (at least 45 wanted)")
    print(f"graphs compiled anew after a swap of weights: {again}")
    added = 100 * (scored_s / ours_s - 1)
    print(
        f"with scorers              {asked.pictures / scored_s:6.3f} pictures/s   {added:+.1f} %   (at most 5 wanted)"
    )


def full_size() -> sdxl.Networks:
    """SDXL's four networks in bf16 at random weights; the tiny world's tokenizers stand in for CLIP's."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        scaling_factor=0.13025,
        force_upcast=False,
    )
    folder = find_file("builtin://sdxl_tiny")
    tokenizers = [CLIPTokenizer.from_pretrained(folder / name) for name in ("tokenizer", "tokenizer_2")]
    common = {"vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": tokenizers[0].eos_token_id}
    one = CLIPTextConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        **common,
    )
    two = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_hidden_layers=32,
        num_attention_heads=20,
        projection_dim=1280,
        hidden_act="gelu",
        **common,
    )
    scheduler = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    networks = sdxl.Networks(
        unet, CLIPTextModel(one), CLIPTextModelWithProjection(two), vae, *tokenizers, scheduler_config=scheduler
    )
    return ready(networks)


def tiny() -> sdxl.Networks:
    return ready(sdxl.load(find_file("builtin://beta7.safetensors"), find_file("builtin://sdxl_tiny")))


def ready(networks: sdxl.Networks) -> sdxl.Networks:
    """Both pipelines start from the same: bf16, on the device."""
    for module in networks.modules().values():
        module.to(DEVICE, torch.bfloat16).eval().requires_grad_(False)
    return networks


Sized = tuple[Any, int, torch.dtype]
"""A network that pictures are shown to, its side, and its precision."""


def battery() -> Callable[[torch.Tensor], None]:
    """Scorers at random weights, each at the size that its weights ask for, fed from pictures that lie on the GPU."""
    clip = open_clip.create_model("ViT-L-14", precision="bf16", device=DEVICE).eval()
    made: list[tuple[str, int, torch.dtype, dict[str, Any]]] = [
        ("swinv2_base_window8_256", 448, torch.bfloat16, {"img_size": 448, "num_classes": 10861}),  # WD v3
        ("inception_v3", 299, torch.float32, {}),  # features of FD stay in fp32 (facts 5.20)
        ("vit_large_patch14_dinov2", 224, torch.float32, {"img_size": 224, "num_classes": 0}),
    ]
    others: list[Sized] = [
        (timm.create_model(name, pretrained=False, **more).to(DEVICE, dtype).eval(), size, dtype)
        for name, size, dtype, more in made
    ]
    return shown_to([(clip.encode_image, 224, torch.bfloat16), *others])


def tiny_battery() -> Callable[[torch.Tensor], None]:
    network = timm.create_model("resnet10t", pretrained=False).to(DEVICE).eval()
    return shown_to([(network, 32, torch.float32)])


def shown_to(scorers: list[Sized]) -> Callable[[torch.Tensor], None]:
    @torch.inference_mode()
    def score(x: torch.Tensor) -> None:
        for network, side, dtype in scorers:
            network(torch.nn.functional.interpolate(x, (side, side), mode="bicubic", antialias=True).to(dtype))

    return score


def matrix_rate(size: int) -> float:
    """FLOP/s of bf16 matrix products of `size`."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))

    def multiply() -> None:
        for _ in range(50):
            torch.mm(a, b)

    return 50 * 2 * size**3 / seconds(multiply)


def seconds(action: Callable[[], object], *, warm: bool = True) -> float:
    """Wall time of one run, after one that warms up."""
    if warm:
        action()
    finish()
    start = time.perf_counter()
    action()
    finish()
    return time.perf_counter() - start


def finish() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
