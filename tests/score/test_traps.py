"""Known ways to measure wrongly (facts/evaluation.md, section 5): which test holds each, and the tests of the rest."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ambergrade.errors import BadInput
from ambergrade.nouns import Prompt, PromptSet
from ambergrade.pictures import read_rgb
from ambergrade.score.folders import scoring_mode
from ambergrade.score.pictures import folder_pictures, folder_prompts

TESTS = Path(__file__).parents[1]
TRAPS = {
    "1 dtype and range": "generate/test_stream.py test_every_level_of_a_pixel_comes_through_rounded",
    "2 rescaled twice or by half": "score/test_sheet.py test_streams_that_cannot_be_scored_are_refused",
    "3 resize": "score/test_fid.py test_features_are_timms_penultimate_ones_after_an_antialiased_resize",
    "3 unlike resizes": "score/test_reference.py test_statistics_of_another_extractor_are_refused",
    "4 crop": "score/test_clip_score.py test_longest_sees_the_whole_of_a_tall_picture_and_shortest_does_not",
    "5 JPEG and WebP": "score/test_sensitivity.py test_damage_moves_every_metric_the_way_it_claims",
    "6 FID's bias is the model's": "score/test_distances.py "
    "test_the_bias_of_frechet_is_the_models_own_and_equal_n_does_not_cancel_it",
    "7 reference of other prompts": "score/test_sensitivity.py "
    "test_distances_measure_the_prompts_where_the_reference_has_others",
    "8 FD is blind to swaps": "score/test_sensitivity.py "
    "test_a_shuffle_is_seen_by_adherence_alone_and_a_collapse_by_distances_alone",
    "9 CLIP and anime": "score/test_clip_score.py test_margin_and_first_place_by_hand",
    "10 77 tokens": "score/test_clip_score.py test_long_prompts_keep_their_end_token_and_are_reported",
    "11 tag syntax": "score/test_tag_adherence.py test_every_spelling_of_a_tag_comes_back_to_its_name",
    "12 ratings' words": "score/test_tag_adherence.py test_the_rating_that_a_prompts_words_ask_for",
    "13 unseeable tags": "score/test_tag_adherence.py test_columns_of_a_right_picture_by_hand",
    "13 contrast": "score/test_mosaic.py test_a_word_that_works_is_told_from_one_that_only_shuffles",
    "14 implied tags": "score/test_tag_adherence.py "
    "test_an_implied_tag_is_neither_counted_twice_nor_held_against_its_picture",
    "14 aliases": "score/test_tag_adherence.py test_an_alias_is_the_tag_that_it_stands_for",
    "15 tagger's circle": "score/test_tagger_agreement.py "
    "test_a_model_that_learned_one_taggers_error_is_better_by_that_tagger_alone",
    "16 vocabulary's end": "score/test_tag_adherence.py test_nothing_asked_is_not_a_number_and_never_zero",
    "17 BGR, padding": "score/test_tag_adherence.py test_preparation_pads_with_white_and_swaps_to_bgr",
    "17 timm": "score/test_tag_adherence.py test_probabilities_are_those_of_the_stock_timm_recipe",
    "17 ONNX": "score/test_tag_adherence.py test_an_exported_tagger_answers_as_its_timm_folder",
    "18 thresholds": "score/test_tag_adherence.py test_card_thresholds_are_for_the_card_architectures_only",
    "19 batch": "generate/test_stream.py test_pictures_do_not_depend_on_the_batch",
    "19 ancestral noise": "contracts/test_samplers.py test_a_picture_does_not_depend_on_its_neighbours",
    "19 A/A row": "score/test_comparison.py "
    "test_kernel_noise_is_what_another_batch_changes_and_nothing_else_is_let_pass",
    "20 batch norm": "contracts/test_metrics.py test_a_pictures_row_does_not_depend_on_its_neighbours",
    "20 TF32": "score/test_traps.py test_scoring_is_in_full_precision_whatever_the_caller_set",
    "21 blackened pictures": "score/test_bad_input.py test_a_picture_of_one_colour_is_scored_and_told",
    "21 NaN": "score/test_bad_input.py test_more_than_a_few_faulty_pictures_fail_with_all_their_names",
    "22 order of files": "score/test_traps.py test_files_belong_to_prompts_by_name_and_never_by_order",
    "23 failing scorer": "score/test_bad_input.py test_a_scorer_that_raises_ends_the_scoring_and_is_named",
    "24 pickles": "score/test_tag_adherence.py test_a_broken_tagger_folder_is_refused",
}


def test_every_trap_has_its_test() -> None:
    assert {int(re.match(r"\d+", trap)[0]) for trap in TRAPS} == set(range(1, 25))  # type: ignore[index]
    for trap, place in TRAPS.items():
        file, name = place.split()
        assert re.search(rf"^def {name}\(", (TESTS / file).read_text(), re.MULTILINE), trap


@pytest.mark.parametrize("asked", ["highest", "high"])
def test_scoring_is_in_full_precision_whatever_the_caller_set(asked: str) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(asked)
    try:
        with scoring_mode():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
            assert torch.is_inference_mode_enabled()
        assert torch.get_float32_matmul_precision() == asked
    finally:
        torch.set_float32_matmul_precision(before)


def test_files_belong_to_prompts_by_name_and_never_by_order(tmp_path: Path) -> None:
    """Ids that sort otherwise than they were written, 10 before 9, and two seeds of one prompt."""
    names = ["10", "9", "b-7", "b-30", "a"]
    for level, name in enumerate(names):
        Image.new("RGB", (4, 4), (level, 0, 0)).save(tmp_path / f"{name}.png")
    prompts = PromptSet("p", tuple(Prompt(name, "", 0) for name in ("b", "a", "10", "9")))
    found = folder_pictures(tmp_path, prompts)
    assert list(found) == [("b", 7), ("b", 30), ("a", 0), ("10", 0), ("9", 0)]
    levels = {key: int(read_rgb(path)[0, 0, 0]) for key, path in found.items()}
    assert levels == {("b", 7): 2, ("b", 30): 3, ("a", 0): 4, ("10", 0): 0, ("9", 0): 1}
    for name in names:
        (tmp_path / f"{name}.txt").write_text(f"hat {name}")
    told = folder_prompts(tmp_path, {})
    assert {prompt.id: prompt.text for prompt in told.prompts} == {name: f"hat {name}" for name in names}
    (tmp_path / "9.jpg").write_bytes((tmp_path / "9.png").read_bytes())
    with pytest.raises(BadInput, match="are both picture"):
        folder_pictures(tmp_path, prompts)
    np.testing.assert_array_equal(read_rgb(tmp_path / "9.png"), read_rgb(tmp_path / "9.jpg"))
