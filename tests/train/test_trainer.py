"""Fine-tuning: the properties that make a run trustworthy."""

import resource
from dataclasses import replace

import pytest
import torch

from ambergrade.errors import BadSetting, MissingObject, UnknownName
from ambergrade.family import sdxl
from ambergrade.identity import digest
from ambergrade.train.denoiser import Denoiser, freeze, parameter_groups
from ambergrade.train.diffusion import draw_timesteps
from ambergrade.train.run import QUARTERS
from ambergrade.train.settings import TrainSettings
from ambergrade.train.state import read_state
from ambergrade.train.trainer import STATES, fine_tune, unfinished_run
from ambergrade.train.validation import validation_loss

SETTINGS = TrainSettings(
    images=24,
    batch=4,
    micro=4,
    lr={"unet": 1e-3, "te1": 5e-4, "te2": 5e-4},
    schedule={"name": "constant", "warmup": 8},
    loss={"name": "eps"},
    optimizer={"name": "adamw"},
    caption_dropout=0.1,
    tag_dropout=0.1,
)


def weights(networks: sdxl.Networks) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in networks.tensors().items()}


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_killed_run_resumes_and_ends_in_the_same_bits(
    networks, beginning, captions, latents, tmp_path, ema, kill_at, killed
):
    settings = replace(SETTINGS, save_every=8, log_every=8, ema=ema)
    validation = (captions, latents)
    whole = fine_tune(networks, captions, latents, settings, scratch=tmp_path / "whole", validation=validation)
    expected = sdxl.weights_digest(networks.tensors())

    networks.assign(beginning)
    with pytest.raises(killed):
        fine_tune(networks, captions, latents, settings, scratch=tmp_path, on_log=kill_at(16), validation=validation)
    networks.assign(beginning)  # a new process would load them afresh
    heard = []
    again = fine_tune(
        networks, captions, latents, settings, scratch=tmp_path, on_log=heard.append, validation=validation
    )
    assert [row.seen for row in heard] == [16, 24]  # it went on from 8
    assert sdxl.weights_digest(networks.tensors()) == expected
    assert again == whole


def test_a_scratch_folder_of_another_run_is_refused(networks, captions, latents, tmp_path):
    settings = replace(SETTINGS, images=4, save_every=4)
    fine_tune(networks, captions, latents, settings, scratch=tmp_path)
    with pytest.raises(BadSetting, match="other settings: seed"):
        fine_tune(networks, captions, latents, replace(settings, seed=1), scratch=tmp_path)


def test_a_run_with_another_micro_begins_anew_and_says_so(networks, captions, latents, tmp_path, kill_at, killed):
    """Other passes add the same numbers in another order; passes that stay as they are go on."""

    def scratch_of(settings):
        return tmp_path / digest(settings.what)

    settings = replace(SETTINGS, save_every=8)
    assert unfinished_run(settings, scratch_of) is None
    with pytest.raises(killed):
        fine_tune(networks, captions, latents, settings, scratch=scratch_of(settings), on_log=kill_at(12))
    whole = replace(settings, micro=32, save_every=4, checkpointing="full")  # 32 or 4 of a batch of 4: one pass
    assert scratch_of(whole) == scratch_of(settings)
    assert unfinished_run(whole, scratch_of) is None
    message = unfinished_run(replace(settings, micro=2), scratch_of)
    assert "trainer.micro=4 was broken off after 8 of 24 images" in message
    assert "With trainer.micro=2" in message
    assert "go on with that one: trainer.micro=4" in message
    assert "trainer.channels_last=true" in unfinished_run(replace(settings, channels_last=False), scratch_of)
    assert unfinished_run(replace(settings, seed=1), scratch_of) is None


def test_a_weight_of_a_tag_that_no_caption_has_is_refused(networks, captions, latents, tmp_path):
    settings = replace(SETTINGS, images=4, loss_weights={"blue hiar": 2.0})
    with pytest.raises(UnknownName, match=r"'blue hiar' is not known[\s\S]*'blue hair'"):
        fine_tune(networks, captions, latents, settings, scratch=tmp_path)


def test_micro_batches_give_the_gradient_of_the_whole_batch(networks, beginning, captions, latents, tmp_path):
    found = []
    for micro in (4, 2, 1):
        networks.assign(beginning)
        settings = replace(SETTINGS, images=4, micro=micro, clip=0.0, schedule={"name": "constant"})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", lambda self, closure=None: found.append(trained_gradients(self)))
            fine_tune(networks, captions, latents, settings, scratch=tmp_path)
    whole = found[0]
    assert len(found) == 3
    scale = float(max(gradient.abs().max() for gradient in whole))
    assert scale > 0
    for other in found[1:]:
        for gradient, same in zip(whole, other, strict=True):
            torch.testing.assert_close(same, gradient, rtol=1e-4, atol=scale * 1e-5)


def trained_gradients(optimizer):
    return [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]


def test_loss_falls_when_a_few_pictures_are_learnt_by_heart(networks, captions, latents, tmp_path):
    settings = replace(SETTINGS, images=120, caption_dropout=0.0, tag_dropout=0.0, log_every=40)
    report = fine_tune(networks, captions, latents, settings, scratch=tmp_path, validation=(captions, latents))
    assert report.after.mean < 0.8 * report.before.mean
    assert report.rows[-1].loss < report.rows[0].loss
    assert [row.seen for row in report.rows] == [40, 80, 120]


@pytest.mark.parametrize(
    ("lr", "still"),
    [
        ({"unet": 1e-3, "te1": 0, "te2": 0}, {"te1", "te2"}),
        ({"unet": 0, "te1": 1e-3, "te2": 0}, {"unet", "te2"}),
        ({"unet": 0, "te1": 0, "te2": 1e-3}, {"unet", "te1"}),
    ],
)
def test_a_part_without_learning_rate_stays_as_it_is(networks, beginning, captions, latents, tmp_path, lr, still):
    fine_tune(networks, captions, latents, replace(SETTINGS, images=4, lr=lr), scratch=tmp_path)
    prefixes = {
        "unet": "model.diffusion_model.",
        "te1": "conditioner.embedders.0.",
        "te2": "conditioner.embedders.1.",
        "vae": "first_stage_model.",
    }
    changed = {
        part
        for part, prefix in prefixes.items()
        for key, value in networks.tensors().items()
        if key.startswith(prefix) and not torch.equal(value, beginning[key])
    }
    assert changed == {"unet", "te1", "te2"} - still


def test_every_trained_tensor_moves_and_the_unread_ones_do_not(networks, beginning, captions, latents, tmp_path):
    # Adam moves whatever has a gradient, and decay is off: what stays equal got none.
    settings = replace(SETTINGS, images=8, optimizer={"name": "adamw", "weight_decay": 0.0})
    fine_tune(networks, captions, latents, settings, scratch=tmp_path)
    text_1 = "conditioner.embedders.0.transformer.text_model."
    still = {key for key, value in networks.tensors().items() if torch.equal(value, beginning[key])}
    still -= {
        key for key in still if key.startswith("first_stage_model.") or key.endswith(("position_ids", "logit_scale"))
    }
    assert still
    assert all(key.startswith((f"{text_1}encoder.layers.1.", f"{text_1}final_layer_norm.")) for key in still)


def test_weight_decay_spares_norms_biases_and_embeddings(networks):
    denoiser = Denoiser(networks)
    freeze(denoiser, SETTINGS.lr)
    decayed = {id(p) for group in parameter_groups(denoiser, SETTINGS.lr) if group["decayed"] for p in group["params"]}
    names = {name for name, p in denoiser.named_parameters() if id(p) in decayed}
    assert "unet.conv_in.weight" in names
    assert "te2.text_projection.weight" in names
    assert not [name for name in names if "norm" in name or "embedding.weight" in name or name.endswith("bias")]
    total = sum(len(group["params"]) for group in parameter_groups(denoiser, SETTINGS.lr))
    assert total == sum(p.requires_grad for p in denoiser.parameters())


def test_the_average_of_the_weights_is_the_result(networks, beginning, captions, latents, tmp_path):
    """Against the average written out by hand from the weights after every step."""
    key = "model.diffusion_model.input_blocks.0.0.weight"
    raw = []
    settings = replace(SETTINGS, images=12)
    fine_tune(
        networks, captions, latents, settings, scratch=tmp_path, on_log=lambda row: raw.append(weights(networks)[key])
    )
    networks.assign(beginning)
    fine_tune(networks, captions, latents, replace(settings, ema=0.25), scratch=tmp_path)
    average = beginning[key]
    for step, value in enumerate(raw, start=1):
        decay = min(0.25, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value
    torch.testing.assert_close(weights(networks)[key], average)
    assert not torch.equal(average, raw[-1])


def test_samples_are_drawn_from_the_average_and_training_goes_on_raw(networks, captions, latents, tmp_path):
    key = "model.diffusion_model.out.2.weight"
    seen = []
    settings = replace(SETTINGS, images=12, ema=0.5, sample_every=8)
    fine_tune(
        networks,
        captions,
        latents,
        settings,
        scratch=tmp_path,
        on_sample=lambda live, images: seen.append((images, weights(live)[key])),
    )
    assert [images for images, _ in seen] == [8, 12]
    assert torch.equal(seen[-1][1], weights(networks)[key])


def test_the_schedule_is_followed_and_gradients_are_measured_before_clipping(networks, captions, latents, tmp_path):
    report = fine_tune(networks, captions, latents, replace(SETTINGS, images=12, clip=1e-6), scratch=tmp_path)
    assert [row.lr["unet"] for row in report.rows] == [0.0005, 0.001, 0.001]
    assert all(row.grad_norm > 1e-3 for row in report.rows)


def test_clipping_scales_the_whole_gradient_of_all_three_networks(networks, beginning, captions, latents, tmp_path):
    found = []
    for clip in (0.0, 0.01):
        networks.assign(beginning)
        settings = replace(SETTINGS, images=4, clip=clip)
        keep = lambda gradients: found.append({name: g.clone() for name, g in gradients.items()})  # noqa: E731
        fine_tune(networks, captions, latents, settings, scratch=tmp_path / str(clip), on_gradient=keep)
    free, clipped = found
    norm = sum(float(g.double().square().sum()) for g in free.values()) ** 0.5
    assert norm > 0.01
    assert {name.split(".")[0] for name in free} == {"unet", "te1", "te2"}
    for name, gradient in free.items():
        torch.testing.assert_close(clipped[name], gradient * 0.01 / norm, rtol=1e-3, atol=1e-9)


def test_a_row_is_the_mean_over_passes_and_steps(networks, beginning, captions, latents, tmp_path):
    """And the learning rate follows images, in however many passes they come."""
    rows = {}
    for micro, log_every in ((4, 4), (1, 4), (2, 8)):
        networks.assign(beginning)
        settings = replace(SETTINGS, images=8, micro=micro, log_every=log_every, lr={"unet": 1e-6, "te1": 0, "te2": 0})
        folder = tmp_path / f"{micro} {log_every}"
        rows[micro] = fine_tune(networks, captions, latents, settings, scratch=folder).rows
    first, second = rows[4]
    assert first.loss != pytest.approx(second.loss, rel=1e-3)
    assert [row.loss for row in rows[1]] == pytest.approx([first.loss, second.loss], rel=1e-4)
    assert [row.loss for row in rows[2]] == pytest.approx([(first.loss + second.loss) / 2], rel=1e-4)
    assert [row.grad_norm for row in rows[2]] == pytest.approx([(first.grad_norm + second.grad_norm) / 2], rel=1e-3)
    assert [row.lr for row in rows[1]] == [row.lr for row in rows[4]]
    drawn = draw_timesteps(1000, settings.seed, range(8)) // 250  # of the eight images
    counts = [torch.bincount(drawn[start:end], minlength=4).tolist() for start, end in ((0, 4), (4, 8), (0, 8))]
    for row, count in zip([first, second, rows[2][0]], counts, strict=True):
        assert list(row.by_timestep) == [name for name, n in zip(QUARTERS, count, strict=True) if n]
        whole = sum(row.by_timestep[name] * n for name, n in zip(QUARTERS, count, strict=True) if n)
        assert whole / sum(count) == pytest.approx(row.loss, rel=1e-5)
    assert rows[2][-1].lr == second.lr


def test_validation_on_the_way_is_of_the_average_and_changes_nothing(
    networks, beginning, captions, latents, tmp_path, killed
):
    settings = replace(SETTINGS, images=16, ema=0.5, save_every=4)
    fine_tune(networks, captions, latents, settings, scratch=tmp_path / "plain")
    expected = sdxl.weights_digest(networks.tensors())
    held, seen, drawn = (captions, latents), [], []

    def kill(loss, images):
        seen.append((images, loss))
        if images == 12 and len(seen) == 2:
            raise killed

    settings = replace(settings, validate_every=6, sample_every=6)
    for again in (False, True):
        networks.assign(beginning)
        try:
            report = fine_tune(
                networks,
                captions,
                latents,
                settings,
                scratch=tmp_path,
                validation=held,
                on_validation=kill,
                on_sample=lambda live, images: drawn.append((images, validation_loss(live, *held))),
            )
        except killed:
            assert not again
    assert sdxl.weights_digest(networks.tensors()) == expected
    assert [images for images, _ in seen] == [8, 12, 12]  # the states of 8 and what came before are kept
    assert list(report.between) == [8, 12]
    assert report.between == dict(seen)
    assert all(report.between[images] == loss for images, loss in drawn if images < 16)
    assert list(report.between[8].by_timestep) == [100, 200, 300, 400, 500, 600, 700, 800, 900]


def test_a_disk_that_fills_up_leaves_the_last_good_state(networks, beginning, captions, latents, tmp_path):
    settings = replace(SETTINGS, save_every=8, log_every=8)
    fine_tune(networks, captions, latents, settings, scratch=tmp_path / "whole")
    expected = sdxl.weights_digest(networks.tensors())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(row):
        if row.seen == 16:  # the kernel refuses the next large file, half-way
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))

    networks.assign(beginning)
    try:
        with pytest.raises(MissingObject, match=r"after 16 images cannot[\s\S]*last whole one is of 8 images"):
            fine_tune(networks, captions, latents, settings, scratch=tmp_path, on_log=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [path.name for path in (tmp_path / STATES).iterdir()] == ["000000008"]
    assert read_state(tmp_path / STATES)[1]["seen"] == 8
    networks.assign(beginning)
    fine_tune(networks, captions, latents, settings, scratch=tmp_path)
    assert sdxl.weights_digest(networks.tensors()) == expected


def test_a_run_that_diverges_stops_and_says_so(networks, captions, latents, tmp_path):
    settings = replace(SETTINGS, images=40, lr={"unet": 1e30, "te1": 0, "te2": 0}, clip=0.0)
    with pytest.raises(BadSetting, match="diverged after"):
        fine_tune(networks, captions, latents, settings, scratch=tmp_path)
