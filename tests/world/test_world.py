"""The embedded world's ground truth: grammar, renderer, booru and tokenizer."""

import hashlib
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ambergrade.captions.booru import read_posts
from ambergrade.captions.buckets import aspect_buckets
from ambergrade.captions.manifest import DUPLICATE, UNREADABLE, build
from ambergrade.captions.recipe import CaptionRecipe, caption
from ambergrade.nouns import PromptSet
from ambergrade.typed import settings
from ambergrade.world import corpus, grammar, scorers, tokenizer
from ambergrade.world.booru import AWKWARD, write_booru
from ambergrade.world.draw import draw
from ambergrade.world.family import UNET

RECIPE = yaml.safe_load((Path(__file__).parents[2] / "conf/captions/kohaku-2024-01.yaml").read_text())
# facts/training.md 2.3, schema B
POST = """id created_at uploader_id source md5 parent_id has_children is_deleted is_banned pixiv_id has_active_children
bit_flags has_large has_visible_children image_width image_height file_size file_ext rating score up_score down_score
fav_count file_url large_file_url preview_file_url updated_at"""


@pytest.fixture(scope="module")
def booru(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "booru"
    write_booru(folder, seed=3, count=120, prompts=12, references=4, tag_noise={"scarf": 1.0})
    return folder


def test_a_scene_shows_one_of_each_group_and_rules_the_others_out() -> None:
    for index in range(200):
        scene = grammar.sample(1, index)
        shown = grammar.visible_tags(scene)
        for group in grammar.GROUPS.values():
            assert len(set(group) & set(shown)) == 1
        assert not set(shown) & set(grammar.ruled_out(scene))


def test_naming_a_character_pins_her_bundle() -> None:
    named = [scene for scene in (grammar.sample(1, index) for index in range(400)) if scene.character]
    assert {scene.character for scene in named} == set(grammar.CHARACTERS)
    for scene in named:
        pinned, extras = grammar.CHARACTERS[scene.character or ""]
        assert pinned.items() <= scene.choice.items()
        assert extras <= scene.extras


def test_a_picture_is_the_same_in_another_process() -> None:
    code = (
        "import hashlib; from ambergrade.world import draw, grammar;"
        "print(hashlib.sha256(draw.draw(grammar.sample(5, 8)).tobytes()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert there == hashlib.sha256(draw(grammar.sample(5, 8)).tobytes()).hexdigest()


def test_every_visible_tag_changes_the_picture() -> None:
    scene = grammar.sample(2, 0, clean=True)
    plain = np.asarray(draw(scene), dtype=int)
    for name, group in grammar.GROUPS.items():
        for tag in group:
            other = np.asarray(draw(replace(scene, choice={**scene.choice, name: tag})), dtype=int)
            assert (abs(other - plain).max() > 40) == (tag != scene.choice[name]), tag
    for tag in (*grammar.DRAGON, *grammar.ACCESSORIES):
        other = np.asarray(draw(replace(scene, extras=scene.extras ^ {tag})), dtype=int)
        assert abs(other - plain).max() > 40, tag
    for rating in grammar.RATING_NAMES:
        other = np.asarray(draw(replace(scene, rating=rating)), dtype=int)
        assert (abs(other - plain).max() > 40) == (rating != scene.rating)


def test_damage_grows_as_quality_falls() -> None:
    scenes = [grammar.sample(4, index, clean=True) for index in range(8)]
    clean = [np.asarray(draw(scene), dtype=float) for scene in scenes]
    errors = []
    for quality in (1.0, 0.8, 0.6, 0.4, 0.2, 0.0):
        drawn = [np.asarray(draw(replace(scene, quality=quality)), dtype=float) for scene in scenes]
        errors.append(np.mean([((a - b) ** 2).mean() for a, b in zip(drawn, clean, strict=True)]))
    assert errors[0] == errors[1] == 0
    assert all(np.diff(errors[1:]) > 0)


def test_database_has_the_danbooru2023_columns(booru: Path) -> None:
    with sqlite3.connect(booru / "booru.sqlite") as database:
        names = {
            table: [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
            for table in ("post", "tag", "posttagrelation", "localpost")
        }
    assert names["post"] == POST.split()
    assert names["tag"] == ["id", "name", "type", "popularity"]
    assert names["posttagrelation"] == ["id", "post_id", "tag_id"]
    assert names["localpost"] == ["id", "filepath", "latentpath", "post_id"]


def test_posts_hold_the_scenes_tags_and_awkward_specimens_are_dropped_for_their_reason(booru: Path) -> None:
    posts = read_posts(booru / "booru.sqlite")
    assert [post.id for post in posts] == sorted(post.id for post in posts)
    assert [post.created_at[:4] for post in posts] == sorted(post.created_at[:4] for post in posts)
    captions, report = build(
        posts, settings(CaptionRecipe, RECIPE), booru / "pictures", aspect_buckets(128, 32, 96, 160)
    )
    assert report.counts == {UNREADABLE: 1, DUPLICATE: 1}
    assert len(captions.pictures) == 118
    assert len(AWKWARD) == 7


def test_quality_tags_tell_the_drawn_quality(booru: Path) -> None:
    recipe = settings(CaptionRecipe, RECIPE)
    truth = {}
    scenes = sorted((grammar.sample(3, i).year, i) for i in range(120))
    for post, (_, index) in zip(read_posts(booru / "booru.sqlite"), scenes, strict=True):
        picture = hashlib.sha256((booru / "pictures" / post.file_name).read_bytes()).hexdigest()
        truth.setdefault(picture, (caption(post, recipe).flexible, grammar.sample(3, index).quality))
    best = [quality for words, quality in truth.values() if {"masterpiece", "best quality"} & set(words)]
    worst = [quality for words, quality in truth.values() if {"worst quality", "low quality"} & set(words)]
    assert best
    assert worst
    assert min(best) > 0.75 > 0.4 > max(worst)


def test_noise_makes_a_tag_a_coin_and_leaves_the_others_true(booru: Path) -> None:
    posts = read_posts(booru / "booru.sqlite")
    scenes = [grammar.sample(3, i) for _, i in sorted((grammar.sample(3, i).year, i) for i in range(120))]
    plain = [(p, s) for p, s in zip(posts, scenes, strict=True) if not {"monochrome"} & set(p.tags["general"])]
    agree = {
        tag: np.mean([(tag in p.tags["general"]) == (tag in s.extras) for p, s in plain])
        for tag in ("scarf", "glasses")
    }
    assert agree["glasses"] > 0.98  # a duplicate carries another scene's picture
    assert 0.4 < agree["scarf"] < 0.85


def test_the_same_arguments_write_the_same_bytes(booru: Path, tmp_path: Path) -> None:
    write_booru(tmp_path / "b", seed=3, count=120, prompts=12, references=4, tag_noise={"scarf": 1.0}, workers=2)
    ours = sorted(path.relative_to(booru) for path in booru.rglob("*") if path.is_file())
    assert ours == sorted(path.relative_to(tmp_path / "b") for path in (tmp_path / "b").rglob("*") if path.is_file())
    for path in ours:
        assert (booru / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path


def test_prompts_name_what_they_ask_for(booru: Path) -> None:
    sweep, heldout = (PromptSet.read(booru / "prompts" / f"{name}.jsonl") for name in ("sweep", "heldout"))
    assert not {prompt.text for prompt in sweep.prompts} & {prompt.text for prompt in heldout.prompts}
    for prompt in sweep.prompts:
        assert all(tag.replace("_", " ") in prompt.text for tag in prompt.tags)
        assert not set(prompt.tags) & set(prompt.unwanted)


def test_every_word_of_a_caption_is_one_token() -> None:
    words = tokenizer.build()
    assert [word for word in tokenizer.words() if len(words.tokenize(word)) != 1] == []
    one, two = words("1girl, dragon horns").input_ids, words("1girl, dragon tail").input_ids
    assert one != two
    assert one[-1] == words.eos_token_id == len(words) - 1  # open_clip pools the highest id


def test_the_tiny_unet_has_sdxl_s_keys() -> None:
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**{key: value for key, value in UNET.items() if not key.startswith("_")})
    assert len(unet.state_dict()) == 1680


def test_the_share_of_undamaged_pictures_is_as_asked() -> None:
    for share in (0.25, 0.6):
        quality = np.array([grammar.sample(6, index, undamaged=share).quality for index in range(1000)])
        assert abs((quality > 0.75).mean() - share) < 0.05  # three standard errors
        assert 0 <= quality.min() < 0.01
        assert 0.99 < quality.max() <= 1


def test_the_features_mean_square_is_set_to_one_and_what_they_say_stays() -> None:
    torch.manual_seed(0)
    model = scorers.backbone((4, 4, 4, 4), 3).eval()
    pictures = corpus.pictures(corpus.scenes(3, 0, 8))
    before = scorers.outputs(model, pictures)
    scorers.scale_features(model, pictures)
    assert scorers.outputs(model, pictures) == pytest.approx(before, abs=1e-5)
    with torch.inference_mode():
        shown = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        features = model.forward_head(model.forward_features(shown), pre_logits=True)
    assert features.square().mean().item() == pytest.approx(1, abs=1e-4)
