"""What saves memory or time changes no number, and what would not learn is refused."""

import shutil
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

from ambergrade.errors import BadSetting
from ambergrade.family import sdxl
from ambergrade.train.denoiser import Denoiser, choose_precision
from ambergrade.train.in_backward import StepsInBackward
from ambergrade.train.plan import memory
from ambergrade.train.settings import TrainSettings
from ambergrade.train.state import read_state
from ambergrade.train.trainer import STATES, fine_tune

SETTINGS = TrainSettings(
    images=12,
    batch=4,
    micro=4,
    lr={"unet": 1e-3, "te1": 5e-4, "te2": 5e-4},
    schedule={"name": "constant", "warmup": 8},
    loss={"name": "eps"},
    optimizer={"name": "adamw"},
    clip=0.0,
)


def gradient_of(networks, beginning, captions, latents, tmp_path, **changed):
    """The first step's gradient."""
    found = {}
    networks.assign(beginning)
    settings = replace(SETTINGS, images=4, **changed)
    keep = lambda gradients: found.update({name: value.clone() for name, value in gradients.items()})  # noqa: E731
    fine_tune(networks, captions, latents, settings, scratch=tmp_path, on_gradient=keep)
    return found


@pytest.mark.parametrize(
    ("precision", "optimizer"),
    [("fp32", "adamw"), ("fp32", "adafactor"), ("bf16-sr", "adafactor"), ("bf16-sr", "adamw_sr"), ("bf16-sr", "lion")],
)
def test_steps_within_the_backward_pass_end_in_the_same_bits(
    networks, beginning, tiny_config, captions, latents, tmp_path, precision, optimizer
):
    settings = replace(SETTINGS, precision=precision, optimizer={"name": optimizer})
    ends = []
    for in_backward in (False, True):
        fresh = sdxl.from_config(tiny_config, seed=7)
        report = fine_tune(
            fresh, captions, latents, replace(settings, in_backward=in_backward), scratch=tmp_path / str(in_backward)
        )
        ends.append((sdxl.weights_digest(fresh.tensors()), [row.loss for row in report.rows], report))
        assert all(p.grad is None for p in fresh.unet.parameters())
    assert ends[0][:2] == ends[1][:2]
    assert ends[0][0] != sdxl.weights_digest(beginning)
    norms = [[row.grad_norm for row in report.rows] for *_, report in ends]
    assert norms[0] == pytest.approx(norms[1], rel=1e-2 if precision == "bf16-sr" else 1e-5)


def test_one_gradient_at_a_time_is_there(networks):
    denoiser = Denoiser(networks)
    optimizer = torch.optim.SGD(denoiser.parameters(), lr=0.1)
    there = []
    optimizer.register_step_post_hook(lambda *_: there.append(sum(p.grad is not None for p in denoiser.parameters())))
    steps = StepsInBackward(optimizer)
    ids = torch.zeros(1, 77, dtype=torch.int64)
    denoiser(torch.ones(1, 4, 8, 8), torch.tensor([5]), [ids, ids], torch.ones(1, 6)).square().sum().backward()
    steps.remove()
    assert len(there) > 100
    assert set(there) == {1}
    assert float(steps.norm()) > 0


def test_a_killed_run_may_go_on_within_the_backward_pass(
    networks, beginning, captions, latents, tmp_path, kill_at, killed
):
    """The states are the same, so one may change over between a kill and the next start."""
    settings = replace(SETTINGS, save_every=4)
    fine_tune(networks, captions, latents, settings, scratch=tmp_path / "whole")
    expected = sdxl.weights_digest(networks.tensors())

    networks.assign(beginning)
    with pytest.raises(killed):
        fine_tune(networks, captions, latents, settings, scratch=tmp_path, on_log=kill_at(8))
    networks.assign(beginning)
    fine_tune(networks, captions, latents, replace(settings, in_backward=True), scratch=tmp_path)
    assert sdxl.weights_digest(networks.tensors()) == expected


def test_steps_within_the_backward_pass_are_refused_where_they_would_be_wrong():
    with pytest.raises(BadSetting, match="set clip to 0, or in_backward to false; found clip 1"):
        replace(SETTINGS, in_backward=True, clip=1.0)
    steps = replace(SETTINGS, in_backward=True)
    assert steps.accumulation(1) == 1
    with pytest.raises(BadSetting, match=r"takes 2 pass\(es\) on 1 process"):
        replace(steps, micro=2).accumulation(1)
    with pytest.raises(BadSetting, match=r"takes 1 pass\(es\) on 2 process"):
        steps.accumulation(2)


def test_the_plan_knows_that_gradients_are_gone():
    full = replace(SETTINGS, precision="bf16-sr", optimizer={"name": "adafactor"})
    kept, freed = (memory(replace(full, in_backward=chosen)) for chosen in (False, True))
    trained = 2_567_463_684 + 123_060_480 + 694_659_840
    assert kept[1].gb == pytest.approx(2 * trained / 1e9)
    assert freed[1].gb == pytest.approx(2 * 49_408 * 1280 / 1e9)
    assert [part for part in kept if part is not kept[1]] == [part for part in freed if part is not freed[1]]


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_computing_again_gives_the_same_gradient(networks, beginning, captions, latents, tmp_path, checkpointing):
    calls = {"down_blocks.1": 0, "down_blocks.2": 0, "mid_block": 0, "up_blocks.0": 0, "up_blocks.1": 0}
    hooks = [
        module.register_forward_pre_hook(lambda *_, part=part: calls.update({part: calls[part] + 1}))
        for name, module in networks.unet.named_modules()
        for part in calls
        if name.startswith(part) and isinstance(module, BasicTransformerBlock)
    ]
    plain = gradient_of(networks, beginning, captions, latents, tmp_path / "none")
    once = dict(calls)
    again = gradient_of(networks, beginning, captions, latents, tmp_path / "again", checkpointing=checkpointing)
    for hook in hooks:
        hook.remove()
    assert plain.keys() == again.keys()
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-7)
    times = {part: (calls[part] - once[part]) / once[part] for part in calls}
    deep = {"down_blocks.2", "mid_block", "up_blocks.0"}
    assert times == {part: 2 if checkpointing == "full" or part in deep else 1 for part in calls}


def test_channels_innermost_give_the_same_gradient_and_resume(
    tiny_config, networks, beginning, captions, latents, tmp_path, kill_at, killed
):
    plain = gradient_of(networks, beginning, captions, latents, tmp_path / "plain", channels_last=False)
    found = {}
    settings = replace(SETTINGS, channels_last=True, ema=0.9, save_every=4)

    ends = []
    for folder, on_log in (("whole", None), ("killed", kill_at(12)), ("killed", None)):
        fresh = sdxl.from_config(tiny_config, seed=7)
        keep = lambda gradients: found.update(gradients) if not found else None  # noqa: E731
        try:
            fine_tune(
                fresh, captions, latents, settings, scratch=tmp_path / folder, on_log=on_log, on_gradient=clones(keep)
            )
            ends.append(sdxl.weights_digest(fresh.tensors()))
        except killed:
            assert on_log
        weight = fresh.unet.mid_block.resnets[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
    assert len(ends) == 2
    assert len(set(ends)) == 1
    scale = max(float(value.abs().max()) for value in plain.values())
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5 * scale)


def clones(keep):
    return lambda gradients: keep({name: value.clone() for name, value in gradients.items()})


def test_embeddings_may_be_left_as_they_are(networks, beginning, captions, latents, tmp_path):
    fine_tune(networks, captions, latents, replace(SETTINGS, images=4, train_embeddings=False), scratch=tmp_path)
    tables = {key for key in beginning if "_embedding.weight" in key or key.endswith("positional_embedding")}
    moved = {key for key, value in networks.tensors().items() if not torch.equal(value, beginning[key])}
    assert len(tables) == 4  # tokens and positions of both encoders
    assert not moved & tables
    assert any(key.startswith("conditioner.embedders.1.") for key in moved)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU")
def test_compiled_blocks_give_the_same_gradient(tiny_config, beginning, captions, latents, tmp_path):
    eager, compiled = (sdxl.from_config(tiny_config, seed=7) for _ in range(2))
    plain = gradient_of(eager, beginning, captions, latents, tmp_path / "eager")
    fast = gradient_of(compiled, beginning, captions, latents, tmp_path / "compiled", compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    scale = max(float(value.abs().max()) for value in plain.values())
    for name, value in plain.items():
        torch.testing.assert_close(fast[name], value, rtol=1e-3, atol=1e-5 * scale)
    assert compiled.tensors().keys() == eager.tensors().keys()


def test_plain_bf16_is_refused_at_a_rate_it_cannot_express(networks):
    settings = replace(SETTINGS, precision="bf16-plain", lr={"unet": 8e-6, "te1": 2e-6, "te2": 2e-6})
    with pytest.raises(BadSetting, match=r"lr\.unet=8e-06 with precision=bf16-plain[\s\S]*%[\s\S]*bf16-sr"):
        choose_precision(Denoiser(networks), settings)
    assert networks.unet.dtype == torch.float32  # refused before anything was changed
    with pytest.raises(BadSetting, match=r"bf16-sr needs an optimizer that rounds stochastically, and adamw does not"):
        replace(settings, precision="bf16-sr").check()


def test_plain_bf16_is_taken_where_it_learns(tiny_config, captions, latents, tmp_path):
    fresh = sdxl.from_config(tiny_config, seed=7)
    settings = replace(SETTINGS, images=4, precision="bf16-plain", lr={"unet": 0.05, "te1": 0.05, "te2": 0.05})
    fine_tune(fresh, captions, latents, settings, scratch=tmp_path)
    assert {module.dtype for module in (fresh.unet, fresh.text_encoder, fresh.text_encoder_2)} == {torch.bfloat16}
    assert fresh.vae.dtype == torch.float32


def test_under_autocast_weights_and_state_stay_fp32(networks, captions, latents, tmp_path):
    settings = replace(SETTINGS, images=4, precision="bf16", save_every=4)
    report = fine_tune(networks, captions, latents, settings, scratch=tmp_path)
    state, _ = read_state(tmp_path / STATES)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert networks.unet.dtype == torch.float32
    assert report.rows[0].loss > 0


def test_the_average_of_bf16_weights_and_their_moments_are_fp32(tiny_config, captions, latents, tmp_path):
    """In bf16 an average at 0.9999 would never move: its step is below the spacing of the numbers."""
    fresh = sdxl.from_config(tiny_config, seed=7)
    settings = replace(SETTINGS, precision="bf16-sr", optimizer={"name": "adamw_sr"}, ema=0.9999, save_every=4)
    fine_tune(fresh, captions, latents, settings, scratch=tmp_path)
    first, last = sorted((tmp_path / STATES).iterdir())
    states = [read_state(tmp_path / STATES)[0]]
    (last / "state.json").unlink()
    states.append(read_state(tmp_path / STATES)[0])
    for state in states:
        assert {value.dtype for name, value in state.items() if name.startswith("weights.")} == {torch.bfloat16}
        assert {value.dtype for name, value in state.items() if name.startswith("ema.")} == {torch.float32}
        assert {value.dtype for name, value in state.items() if name.endswith("/exp_avg")} == {torch.float32}
    moved = [not torch.equal(value, states[1][name]) for name, value in states[0].items() if name.startswith("ema.")]
    assert sum(moved) > 0.9 * len(moved)
    assert first.name < last.name


def test_parts_are_loaded_in_their_own_precision(beginning, tiny_config, tmp_path):
    """bf16 weights never lie in memory as fp32, and a VAE may be all that is loaded."""
    sdxl.write_checkpoint(tmp_path / "begin.safetensors", beginning, {})
    half = dict.fromkeys(sdxl.FAMILY.trained, torch.bfloat16)
    networks = sdxl.load(tmp_path / "begin.safetensors", tiny_config, dtype=half)
    assert {name: module.dtype for name, module in networks.modules().items()} == {**half, "vae": torch.float32}
    one = sdxl.load(tmp_path / "begin.safetensors", tiny_config, only=["vae"])
    assert all(torch.equal(a, b) for a, b in zip(one.vae.parameters(), networks.vae.parameters(), strict=True))
    assert one.unet.device.type == "meta"
